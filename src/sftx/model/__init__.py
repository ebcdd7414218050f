"""All contact with torch modules, transformers and peft."""
