"""trlx's interface for supervised fine-tuning, on sftx.

`import sftx.compat.trlx` as the first line of a trlx SFT script runs it unchanged otherwise: from
then on `import trlx`, there and in what it imports, gives this package. Module paths are trlx's.
Everything is translated into sftx's settings and loop; what cannot be translated is refused with a
reason.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sftx.compat.trlx.names import install

if TYPE_CHECKING:
    from sftx.compat.trlx.trlx import train
    from sftx.compat.trlx.utils import logging

__all__ = ["logging", "train"]
_PUBLIC = {"train": "sftx.compat.trlx.trlx", "logging": "sftx.compat.trlx.utils"}

install()


def __getattr__(name: str) -> Any:
    """A public name, or a module: loaded when it is first asked for, as torch comes with them."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return import_module(f"{__name__}.{name}")
