"""sftx: supervised fine-tuning of causal language models in which every token is accounted for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "sftx.config",
    "UserError": "sftx.types",
    "Example": "sftx.types",
    "Pack": "sftx.types",
    "StepRecord": "sftx.types",
    "encode": "sftx.data.encode",
    "train": "sftx.training.loop",
    "steps": "sftx.training.loop",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import public names when first used, so that `import sftx` loads neither torch nor transformers."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sftx' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
