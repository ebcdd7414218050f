"""Answers of a model as it says them: the chat of the terminal, and an endpoint for other programs."""
