"""Names on the hub: what cannot be one, and a hub that cannot be reached, are told in seconds."""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path

from sftx.boundary import boundary
from sftx.types import UserError

PATIENCE = 10.0
"""Seconds that the hub has for a first answer; its own library would try for half a minute."""
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WITHOUT_OWNER = re.compile(r"(distil)?gpt2(-medium|-large|-xl)?")
"""Models that are as old as the hub, and are asked for by these names."""


@cache
def ask_hub(name: str, setting: str = "") -> None:
    """Ask whether the hub is there, before a model is fetched that is not a folder here; nothing is
    asked where files of it were fetched before, or the hub is not to be asked. Messages begin with
    `setting`, the one that gave the name, and a colon.

    Raises:
        UserError: no model of the hub is named so, or the hub does not answer.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    fetched = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if fetched.is_dir():
        return
    missing = f"{setting}{name}: there is no such folder or file here"
    if not _NAME.fullmatch(name) and not _WITHOUT_OWNER.fullmatch(name):
        raise UserError(f"{missing}; a model on the hub would be OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{missing}, and HF_HUB_OFFLINE says not to ask the hub")
    if os.environ.get("RANK", "0") == "0":
        print(f"asking {constants.ENDPOINT} for {name}", file=sys.stderr)
    hint = "; name a folder, or fetch the model where there is a network"
    with boundary(f"{missing}, and {constants.ENDPOINT} cannot be reached", hint):
        get_session().head(f"{constants.ENDPOINT}/{name}", timeout=PATIENCE)
