"""What a run trained, as one Hugging Face folder: adapters merged, quantised bases dequantised."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sftx.data.chat.template_files import bundled_templates
from sftx.data.encoder import Encoder
from sftx.data.tokenizer import Tokenizer
from sftx.files import make_folder, sync
from sftx.model.folder import on_disk
from sftx.model.load import load_model, stored_dtype
from sftx.model.pack_loss import PackLoss
from sftx.model.save import load_tokenizer, save_model
from sftx.model.trainable import choose_weights
from sftx.report.facts import check_needed, damaged, read_facts, section
from sftx.report.model_card import public_name
from sftx.settings.schema import Adapter, Config, Data, Model
from sftx.training.checkpoint import load_weights
from sftx.types import UserError

TRLX = "trlx"
"""The fact in run.json that tells a run of a trlx script (`sftx.compat.trlx`)."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the caller of an export names and allows. What run.json says of the same is a record,
    not a permission.

    `trust_remote_code`: code that comes with the model may run. `model`, `tokenizer` and `adapter`
    are read in place of those that run.json names, and fetched where they are names on the hub;
    what only run.json names is never fetched. `template` is the chat template's file, which is not
    read because run.json names it.
    """

    trust_remote_code: bool = False
    model: str = ""
    tokenizer: str = ""
    adapter: str = ""
    template: str = ""

    @classmethod
    def of(cls, config: Config) -> Allowed:
        """What the settings of a run allow the run itself."""
        model = config.model
        start = config.adapter.path or ""
        return cls(
            model.trust_remote_code, model.path, model.tokenizer or "", start, config.data.template
        )


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's model in float32, its adapter still apart (`adapted`, if there is one), and what goes
    with it: `served` is the tokenizer with the template of the run.
    """

    source: Model
    model: Any
    adapted: PeftModel | None
    encoder: Encoder
    served: Any
    facts: dict[str, Any]

    def merged(self) -> tuple[Any, float]:
        """The model with its adapter merged in (in place), and how far a logit moved by that,
        relative to the largest one. UserError where it is more than 1e-5.
        """
        before = probe(self.model)
        merged: Any = self.model if self.adapted is None else self.adapted.merge_and_unload()
        moved = apart(before, probe(merged))
        if moved > 1e-5:
            raise UserError(
                f"sftx export: merging moves the logits by {moved:.1e} of the largest; nothing was "
                "written"
            )
        merged.config.use_cache = True
        return merged, moved


def _check_finished(facts: dict[str, Any], step: str) -> None:
    if not step and facts["status"] != "finished":
        raise UserError(
            f"sftx export: the run is {facts['status']}, not finished; step=N takes one of its "
            "checkpoints"
        )


def read_trained(folder: Path, dtype: str, step: str, allowed: Allowed) -> Trained:
    """What the run in `folder` trained, or its checkpoint after `step`; `dtype` takes the place of
    the run's `save_dtype`.

    Raises:
        UserError: the run is not finished, damaged, or names what the caller does not allow.
    """
    path = folder / "run.json"
    facts = read_facts(path)
    check_needed(facts, path)
    _check_finished(facts, step)
    if TRLX in facts:  # every checkpoint of such a run holds a whole model
        folder, step = _model_of_trlx(folder, int(step or facts["num_steps"])), ""
    source, adapter = sources(folder, facts, bool(step), allowed)
    if dtype:
        source = section(Model, source.model_dump() | {"save_dtype": dtype}, path, "model")
    tokenizer = Tokenizer.of_model(source)
    encoder = Encoder(*_encoding(folder, facts, tokenizer, bool(step), allowed), 1 << 20)
    nf4 = torch.float32 if adapter.quantize == "nf4" else None
    model = load_model(source, torch.device("cpu"), nf4=nf4)
    model = model.dequantize() if nf4 else model
    seed = facts["config"].get("seed", 0)
    adapted, _ = choose_weights(
        model, source, adapter, seed if type(seed) is int else 0, tokenizer.added_token_ids
    )
    if step:
        load_weights(folder / "checkpoints" / f"step-{step:0>8}", loss := PackLoss(model))
        loss.use_segments(False)
    served = load_tokenizer(source)
    served.chat_template = encoder.chat_template or served.chat_template
    return Trained(source, model, adapted, encoder, served, facts)


def export(
    folder: Path, target: Path, dtype: str = "", step: str = "", allowed: Allowed | None = None
) -> tuple[float, float]:
    """Write the run in `folder`, or the checkpoint after its `step`, into `target`, in `dtype` or
    that of the run.

    `target` appears whole or not at all; one that an export left behind is replaced by the next.
    `allowed` is what the caller allows; default: nothing that run.json names beyond this disk, and
    no code.

    Returns how far a logit moves, relative to the largest one: by merging, and as stored. Raises
    UserError where merging moves one by more than 1e-5, or there is nothing to export.
    """
    trained = read_trained(folder, dtype, step, allowed or Allowed())
    before = probe(trained.model)
    merged, moved = trained.merged()
    started_from = public_name(trained.facts["config"]["model"].get("path", ""))
    card = f"Exported by sftx from a run that started from `{started_from}`.\n"
    stops, stored = sorted(trained.encoder.stop_ids), stored_dtype(trained.source)
    with beside(target) as temporary:
        save_model(temporary, merged, trained.served, stops, card, stored)
        written = probe(load_model(Model(path=str(temporary)), torch.device("cpu")))
    return moved, apart(before, written)


def sources(
    folder: Path, facts: dict[str, Any], is_step: bool, allowed: Allowed
) -> tuple[Model, Adapter]:
    """The model to load and the adapter to put in, as the caller allows them."""
    path, config = folder / "run.json", facts["config"]
    _check_sections(config, path)
    trust = allowed.trust_remote_code
    recorded = section(Model, config["model"] | {"trust_remote_code": trust}, path, "model")
    given = dict(config["adapter"])
    method = given.get("method", "none")
    if method == "none" and not is_step:
        return Model(
            path=str(folder), save_dtype=recorded.save_dtype, trust_remote_code=trust
        ), Adapter()
    base = allowed.model or _on_disk(recorded.path, "model")
    tokenizer = allowed.tokenizer or recorded.tokenizer
    if tokenizer and not allowed.tokenizer:
        tokenizer = _on_disk(tokenizer, "tokenizer")
    source = recorded.model_copy(update={"path": base, "tokenizer": tokenizer})
    if method == "none":
        return source, Adapter()
    start = str(folder)  # a finished run holds its adapter itself
    if is_step:
        start = _first_adapter(given, allowed)
        if not start:
            return source, section(Adapter, given, path, "adapter")
    kept = {"method": method, "path": start, "quantize": given.get("quantize", "none")}
    return source, section(Adapter, kept, path, "adapter")


def _check_sections(config: dict[str, Any], path: Path) -> None:
    for name in ("model", "adapter", "data"):
        if not isinstance(config.get(name), dict):
            raise damaged(path, f"config.{name} must be an object")


def _first_adapter(given: dict[str, Any], allowed: Allowed) -> str:
    """The saved adapter that a run began with; empty where it began with a new one."""
    if allowed.adapter:
        return allowed.adapter
    recorded = given.get("path")
    return _on_disk(recorded, "adapter") if recorded else ""


def _on_disk(name: Any, key: str) -> str:
    """A model's folder that run.json names; a name on the hub only where its files have been
    fetched before.
    """
    hint = f"; if you want it, name it yourself: sftx export RUN {key}=..."
    place = f"sftx export: the {key} {name!r}, which run.json names, is not on this disk"
    return on_disk(name, place, hint)


def _encoding(
    folder: Path, facts: dict[str, Any], tokenizer: Tokenizer, is_step: bool, allowed: Allowed
) -> tuple[Tokenizer, Data]:
    """The tokenizer and the settings that say where trained outputs end: with the template that the
    run has saved, else one that comes with the model or with sftx. A file that only run.json names
    is not read.
    """
    path = folder / "run.json"
    recorded = dict(facts["config"]["data"])
    template = recorded.get("template", "auto")
    if allowed.template:
        template = allowed.template
    elif template not in ("auto", "none", *bundled_templates()):
        if is_step and not (folder / "tokenizer.json").exists():
            raise UserError(
                f"sftx export: run.json names the template {template!r}, which is not read for "
                "that; name the file "
                "yourself: template=FILE"
            )
        tokenizer, template = Tokenizer.load(str(folder)), "auto"
    data = section(Data, recorded | {"template": template}, path, "data")
    return tokenizer, data


@contextmanager
def beside(target: Path) -> Generator[Path]:
    """A folder beside `target` that takes its place at the end, and is deleted where something goes
    wrong before.
    """
    host = socket.gethostname()
    clear_leftovers(target)
    temporary = target.with_name(f".{target.name}.export-{host}-{os.getpid()}")
    try:
        make_folder(target.parent)
        temporary.mkdir()
        yield temporary
        if target.exists():
            if any(target.iterdir()) and not (target / "config.json").exists():
                raise UserError(
                    f"{target}: holds files that are no model, and is not replaced; choose "
                    "another folder"
                )
            shutil.rmtree(target)
        temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(target: Path) -> None:
    """Delete what exports into `target` left that were killed: folders beside it, and a target
    without a model.
    """
    prefix = f".{target.name}.export-{socket.gethostname()}-"
    for left in target.parent.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix)
        if owner.isdecimal() and not _is_alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    if (target / ".model.tmp").is_dir() and not (target / "config.json").exists():
        shutil.rmtree(target / ".model.tmp", ignore_errors=True)
        with suppress(OSError):  # it holds something else: that is not ours to delete
            target.rmdir()


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, but is somebody else's
        return True
    return True


def _model_of_trlx(folder: Path, step: int) -> Path:
    """The model after `step` of a run whose record is in `folder`: trlx's layout has it beside
    that.
    """
    found = {
        int(path.name.removeprefix("checkpoint_")): path
        for path in folder.parent.glob("checkpoint_*[0-9]")
    }
    if step not in found:
        known = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(
            f"sftx export: {folder.parent} has no checkpoint of step {step}; there are: {known}"
        )
    return found[step] / "hf_model"


def probe(model: Any) -> torch.Tensor:
    """Logits [1, 64, V] of tokens drawn from the whole vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (1, 64), generator=torch.Generator().manual_seed(0))
    ids[0, -8:] = torch.arange(rows - 8, rows)  # the rows of added tokens are the last
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far a logit of `other` is from that of `one` at most, relative to the largest of `one`."""
    return float((other - one).abs().max() / one.abs().max())
