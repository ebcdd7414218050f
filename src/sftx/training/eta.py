"""How long a run will still take, from the steps that it took just now."""

from __future__ import annotations

from sftx.data.plan import Plan

MEMORY = 0.95
"""How much of what earlier steps took stays with every new one: about the last twenty count, as
other work on the machine comes and goes.
"""


class Eta:
    """Seconds left, corrected by each step: the work that is left, at the speed of the latest
    steps.

    Work is what `plan.work` says of each example, so that a long step that took long is no sign of
    a slow machine; what is left is counted by an average example. Evaluations and checkpoints are
    not in it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._seconds = self._work = 0.0
        self._taken = 0

    def after(self, step: int, seconds: float) -> float | None:
        """Seconds left after `step` (0-based), which took so many; None after the first, which
        warms up too.
        """
        plan = self.plan
        self._taken += 1
        if self._taken <= 2:  # what was learned from the first is forgotten with the second
            self._seconds = self._work = 0.0
        self._seconds = MEMORY * self._seconds + seconds
        self._work = MEMORY * self._work + float(plan.work[plan.examples(step)].sum())
        if step + 1 == plan.num_steps:
            return 0.0
        if self._taken == 1:
            return None
        epochs_left = plan.epoch(plan.num_steps - 1) - plan.epoch(step)
        return epochs_left * float(plan.work.sum()) * self._seconds / max(self._work, 1e-9)
