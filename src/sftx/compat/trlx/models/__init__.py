"""Models of reinforcement learning: each is refused by name."""
