"""A first YAML for a model, data and a goal: what `sftx init` sees, chooses and writes."""
