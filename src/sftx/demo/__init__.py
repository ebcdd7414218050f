"""The quick start: an invented village, a tiny model, and the two stages of fine-tuning. `python -m
sftx.demo`.
"""
