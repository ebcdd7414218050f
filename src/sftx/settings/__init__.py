"""The settings of a run: what they are, where they are read, how they are described."""
