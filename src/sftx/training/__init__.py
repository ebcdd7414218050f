"""The optimiser step, its schedule, the loop over steps, and checkpoints."""
