"""Fine-tune a model: `sftx train run.yaml batch.epochs=2`.

Reads the YAML file, applies the overrides, trains, and leaves the model and the record of the run in `output`.
"""

from __future__ import annotations

from sftx.config import Config


def run(config: Config) -> int:
    """Train to the end; a run that finds its own checkpoint in `output` continues there."""
    from sftx.training.loop import train

    train(config)
    return 0
