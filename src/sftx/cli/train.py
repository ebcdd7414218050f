"""Fine-tune a model: `sftx train run.yaml batch.epochs=2`.

Reads the YAML file, applies the overrides, trains, and leaves the model and the record of the run
in `output`. Several processes: `torchrun --nproc-per-node 8 -m sftx train run.yaml`, or in short
`sftx train run.yaml nproc=8`.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
from types import FrameType

from sftx.report.progress import working
from sftx.settings.schema import Config
from sftx.types import UserError

STAGE = "train"
EXAMPLE = "sftx train run.yaml batch.epochs=2"
EXTRA = {
    "nproc": "Start so many processes on this machine, through torchrun; `gpu` = one for each GPU."
}


def run(config: Config, nproc: str = "") -> int:
    """Train to the end; a run that finds its own checkpoint in `output` continues there."""
    if nproc:
        return _launch(config, nproc)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, _nothing_to_save) for number in numbers}
    with working("loading libraries", config.runtime.progress):
        # This takes seconds, in which signals come too.
        from torch.distributed.elastic.multiprocessing.errors import record

        from sftx.training.loop import train

    for number, handler in before.items():
        signal.signal(number, handler)
    record(train)(
        config
    )  # hands a failure's traceback to torchrun, which names the rank; alone it does nothing
    return 0


def _launch(config: Config, nproc: str) -> int:
    """The same run under torchrun; returns the exit code of the first rank that ended with another
    than 0.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from sftx.training.signals import EXIT_STOPPED

    if nproc != "gpu" and not (nproc.isdecimal() and int(nproc)):
        raise UserError(f"sftx train: nproc={nproc!r}: expected a number of processes, or gpu")
    # Ranks that are asked to stop finish their step and save: they get as long for it as for
    # anything else.
    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(config.runtime.rank_timeout))
    )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(config.model_dump_json(exclude_unset=True))
        file.flush()
        try:
            torchrun.main(
                [
                    "--standalone",
                    f"--nproc-per-node={nproc}",
                    "--module",
                    "sftx",
                    "train",
                    file.name,
                ]
            )
        except ChildFailedError as failed:
            return max(failed.get_first_failure()[1].exitcode, 1)
        except SignalException:
            return EXIT_STOPPED
    return 0


def _nothing_to_save(number: int, _: FrameType | None) -> None:
    from sftx.training.signals import EXIT_STOPPED, NOTHING_TO_SAVE

    print(f"ended    {NOTHING_TO_SAVE.format(number)}", file=sys.stderr)
    sys.exit(EXIT_STOPPED)
