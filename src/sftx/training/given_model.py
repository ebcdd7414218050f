"""A model that the caller gives as an object: written into the run's folder first, then trained as
any folder is.

So the run can be checked, continued, exported and repeated like every other. The folder is named
after a digest of the weights, the configuration and the tokenizer; as it is the `model.path` of the
run, it stands in its identity, and another object does not continue it. The caller's object stays
as it is.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from sftx import distributed
from sftx.files import sync
from sftx.model.architecture import auto_class
from sftx.types import UserError


@dataclass(frozen=True)
class GivenModel:
    """A model and its tokenizer, and the folder in which the run finds them."""

    model: PreTrainedModel
    tokenizer: Any
    output: Path
    digest: str

    @property
    def folder(self) -> Path:
        """Where it is written: `OUTPUT/base/DIGEST`."""
        return self.output / "base" / self.digest

    def write(self) -> None:
        """Write the folder, unless it is there. UserError where `output` holds the run of another
        model.
        """
        if self.folder.exists():
            return
        if (self.output / "run.json").exists():
            raise UserError(
                f"output: {self.output} holds a run that started from another model or tokenizer "
                "than the objects "
                f"given now (their digest is {self.digest}); choose another folder"
            )
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        transformers_logging.disable_progress_bar()
        temporary = self.folder.with_name(self.folder.name + ".tmp")
        try:
            self.model.save_pretrained(str(temporary))
            self.tokenizer.save_pretrained(str(temporary))
            for path in temporary.rglob("*"):
                sync(path)
            temporary.rename(self.folder)
            sync(self.folder.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.folder.parent, ignore_errors=True)
            raise UserError(
                f"{self.folder}: the given model cannot be written there: {error}"
            ) from error


def without_object(sections: dict[str, Any]) -> tuple[dict[str, Any], GivenModel | None]:
    """The sections with the path of a folder in place of a model object, and what is to be written
    there.

    Raises UserError for an object that a folder would not bring back as it is.
    """
    sections = dict(sections)
    tokenizer = sections.pop("tokenizer", None)
    section = sections.get("model")
    model: Any = section
    if isinstance(section, Mapping):
        model = cast(Mapping[str, Any], section).get("path")
    if not isinstance(model, torch.nn.Module):
        if tokenizer is not None:
            raise UserError(
                "tokenizer: it comes with a model object; beside a folder write model.tokenizer"
            )
        return sections, None
    if isinstance(section, Mapping) and "tokenizer" in section:
        raise UserError(
            "model.tokenizer: a model object comes with tokenizer=..., a tokenizer of transformers"
        )
    if not hasattr(tokenizer, "save_pretrained"):
        raise UserError(
            "model: a model object comes with its tokenizer: "
            "tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    output = sections.get("output")
    _refuse_unlike_a_folder(model, sections)
    path = "output is missing"
    given = None
    if isinstance(output, str | os.PathLike):
        given = GivenModel(model, tokenizer, Path(output), _digest(model, tokenizer))  # pyright: ignore
        path = str(given.folder)
    sections["model"] = {**section, "path": path} if isinstance(section, Mapping) else path
    return sections, given


def _refuse_unlike_a_folder(model: torch.nn.Module, sections: Mapping[str, Any]) -> None:
    """Whatever of the object would be lost on the way through a folder is named."""
    name = type(model).__name__
    use_folder = "write it to a folder with save_pretrained and name that"
    if isinstance(model, PeftModel):
        raise UserError(
            f"model: {name} is an adapter; {use_folder} as adapter.path, and its base as model"
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: {name} is no PreTrainedModel of transformers")
    if distributed.world_size() > 1:
        raise UserError(f"model: an object trains in one process; for several, {use_folder}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"model: {name} has no contents: its weights are on the meta device")
    if "quantization_config" in model.config.to_dict():
        raise UserError(
            f"model: {name} is quantised; name the folder of its base, and set adapter.quantize"
        )
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen and sections.get("adapter", "none") in ("none", {"method": "none"}):
        raise UserError(
            f"model: {len(frozen)} parameters of the object are frozen ({frozen[0]}); use "
            "model.freeze"
        )
    _refuse_changed_modules(model)


def _refuse_changed_modules(model: PreTrainedModel) -> None:
    with torch.device("meta"):
        twin = auto_class(model.config).from_config(model.config)
    expected: dict[str, Any] = {key: type(module) for key, module in twin.named_modules()}
    for key, module in cast(Any, model).named_modules():
        hooks = [*module._forward_hooks, *module._forward_pre_hooks]
        changed = ""
        if hooks or "forward" in vars(module):
            changed = " with a changed forward"
        if changed or expected.get(key) is not type(module):
            raise UserError(
                f"model: {key or 'the model'} is {type(module).__name__}{changed}, which no folder "
                f"of a {type(twin).__name__} would bring back"
            )


def _digest(model: PreTrainedModel, tokenizer: Any) -> str:
    """16 hex digits of a hash of all that decides what the model computes."""
    state = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous()
        state.update(values.reshape(-1).view(torch.uint8).numpy())
    about_text = [str(tokenizer.chat_template), str(tokenizer.special_tokens_map), len(tokenizer)]
    state.update(json.dumps(about_text).encode())
    state.update(
        tokenizer.backend_tokenizer.to_str().encode()
        if hasattr(tokenizer, "backend_tokenizer")
        else b""
    )
    return state.hexdigest()[:16]
