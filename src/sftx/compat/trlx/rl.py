"""What sftx says to a script that asks for reinforcement learning."""

from __future__ import annotations

from typing import NoReturn

from sftx.types import UserError


def refuse(what: str) -> NoReturn:
    """Raise UserError: sftx is for supervised fine-tuning, and where the trained model can go next."""
    raise UserError(
        f"{what}: sftx does supervised fine-tuning, not reinforcement learning; train on `samples` here, then give the "
        "folder that `save_pretrained` writes to an RL or preference library (TRL, verl, OpenRLHF) as its first model."
    )


def refuse_import(name: str) -> NoReturn:
    """The `__getattr__` of modules that trlx has for reinforcement learning."""
    if name.startswith("__"):  # the import system looks for such names, and may not find them
        raise AttributeError(name)
    refuse(name)
