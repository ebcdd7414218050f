"""sftx: supervised fine-tuning of causal language models in which every token is accounted for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in `_PUBLIC`, for editors and type checkers
    from sftx.data.encode_row import encode
    from sftx.data.tokenizer import Tokenizer
    from sftx.settings.load import load_config
    from sftx.settings.make import make_config
    from sftx.settings.schema import Config
    from sftx.training.control import Steps
    from sftx.training.loop import steps, train
    from sftx.training.result import Result
    from sftx.types import Example, Ledger, Pack, StepRecord, UserError

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Example",
    "Ledger",
    "Pack",
    "Result",
    "StepRecord",
    "Steps",
    "Tokenizer",
    "UserError",
    "__version__",
    "encode",
    "load_config",
    "make_config",
    "steps",
    "train",
]

_PUBLIC = {
    "Config": "sftx.settings.schema",
    "encode": "sftx.data.encode_row",
    "Tokenizer": "sftx.data.tokenizer",
    "load_config": "sftx.settings.load",
    "make_config": "sftx.settings.make",
    "Steps": "sftx.training.control",
    "steps": "sftx.training.loop",
    "train": "sftx.training.loop",
    "Result": "sftx.training.result",
    "Example": "sftx.types",
    "Ledger": "sftx.types",
    "Pack": "sftx.types",
    "StepRecord": "sftx.types",
    "UserError": "sftx.types",
}
"""Public names and the modules they are imported from when first used: `import sftx` loads no
torch.
"""


if not TYPE_CHECKING:  # a type checker would take every name for a name of ours

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'sftx' has no attribute {name!r}")
        return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
