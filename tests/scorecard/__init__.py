"""The reliability scorecard: checks of what a training run must survive, on tiny random models,
without a network.

`make scorecard` runs them all, `SCORECARD="only=1,5,7"` some of them, and `json=FILE` writes the
results to a file. It is a test suite and needs what the tests need. Without make: `python -m
scorecard`, with `tests` in `PYTHONPATH`. Every check runs in a process of its own with a time
limit. What must hold is the docstring of its function.
"""
