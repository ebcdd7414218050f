"""The reliability scorecard: 30 checks of what a training run must survive, on tiny random models, without a network.

`python -m sftx_scorecard` runs them all, `only=1,5,7` some of them, and `json=FILE` writes the results to a file.
Every check runs in a process of its own with a time limit. What must hold is the docstring of its function.
"""
