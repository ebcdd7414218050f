"""Encoded examples on disk: the cache, the corpus and the processes that fill them."""
