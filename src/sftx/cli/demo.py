"""Run the quick start: a small model learns a village's chronicle, then to answer questions about
it.
"""

from __future__ import annotations

STAGE = "begin"
EXAMPLE = "sftx demo"
EXTRA = {"folder": "where to write; default runs/demo"}


def run(folder: str = "runs/demo") -> int:
    """Run it in `folder`; returns the exit code."""
    from sftx.demo.quickstart import run as quickstart

    quickstart(folder)
    return 0
