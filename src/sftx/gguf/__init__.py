"""GGUF, the file format of llama.cpp: read as a Hugging Face folder, and written from one. No torch."""
