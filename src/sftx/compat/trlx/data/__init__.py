"""Configuration of a run, in trlx's words."""
