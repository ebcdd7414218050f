"""Fine-tune a model: `sftx train run.yaml batch.epochs=2`.

Reads the YAML file, applies the overrides, trains, and leaves the model and the record of the run in `output`.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from sftx.config import Config


def run(config: Config) -> int:
    """Train to the end; a run that finds its own checkpoint in `output` continues there."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, _nothing_to_save) for number in numbers}
    from sftx.training.loop import train  # this takes seconds, in which signals come too

    for number, handler in before.items():
        signal.signal(number, handler)
    train(config)
    return 0


def _nothing_to_save(number: int, _: FrameType | None) -> None:
    from sftx.training.stop import EXIT_STOPPED, NOTHING_TO_SAVE

    print(f"ended    {NOTHING_TO_SAVE.format(number)}", file=sys.stderr)
    sys.exit(EXIT_STOPPED)
