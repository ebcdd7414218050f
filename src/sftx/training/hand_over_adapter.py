"""Whether a server that loads an adapter really gets it.

vLLM and others match tensors by name, and serve the base without a word where no name fits.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from sftx.training.parity import Measured, Question, distance, measure
from sftx.types import UserError

WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A|B)\.weight")


def check_adapter(
    folder: Path, base: PreTrainedModel, questions: Sequence[Question], stops: Sequence[int]
) -> Measured:
    """What `base` says with the adapter in `folder`, loaded by peft as a server loads it.

    Raises:
        UserError: a tensor has a name that a server does not match, or the adapter changes nothing.
    """
    check_names(folder, base)
    alone = measure(base, questions, stops)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        served = PeftModel.from_pretrained(base, str(folder)).eval()
    found = measure(cast("PreTrainedModel", served.get_base_model()), questions, stops)
    if distance(alone, found) == 0:
        raise UserError(
            "sftx export: with this adapter the base gives the same logits as without it: it was not "
            "loaded, or has learned nothing; nothing was written"
        )
    return found


def check_names(folder: Path, base: PreTrainedModel) -> list[str]:
    """The modules that the adapter in `folder` adapts, by the names that vLLM matches:
    `base_model.model.MODULE.lora_A.weight` and `lora_B`.

    Raises:
        UserError: a name is another, its module is not in the base, or one of a pair is missing.
    """
    with safe_open(folder / WEIGHTS, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
        names = list(cast("Iterable[str]", file.keys()))
    modules = {name for name, _ in cast("Iterator[tuple[str, object]]", base.named_modules())}
    parts: dict[str, set[str]] = {}
    for name in names:
        found = _NAME.fullmatch(name)
        if found is None or found["module"] not in modules:
            raise UserError(
                f"sftx export: the adapter holds {name}, which servers such as vLLM do not match: "
                "they would serve it without. Rows of added tokens, DoRA and experts need the "
                "merged model: format=hf"
            )
        parts.setdefault(found["module"], set()).add(found["part"])
    half = sorted(module for module, found in parts.items() if len(found) < 2)
    if half or not parts:
        raise UserError(f"sftx export: the adapter lacks one of the two matrices of {half[:1]}")
    return sorted(parts)
