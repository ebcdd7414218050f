"""From files to weighted tokens to packs. Numpy, tokenizers and jinja2; never torch."""
