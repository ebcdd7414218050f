"""What is measured on the model before the first step."""
