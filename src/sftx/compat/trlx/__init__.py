"""trlx's interface for supervised fine-tuning, on sftx.

`import sftx.compat.trlx as trlx` runs a trlx SFT script unchanged otherwise; so does
`sys.modules["trlx"] = sftx.compat.trlx` before the script's own imports. Module paths are trlx's. Everything is
translated into sftx's settings and loop; what cannot be translated is refused with a reason.
"""

from __future__ import annotations

from sftx.compat.trlx.alias import install
from sftx.compat.trlx.trlx import train
from sftx.compat.trlx.utils import logging

install(__name__)

__all__ = ["logging", "train"]
