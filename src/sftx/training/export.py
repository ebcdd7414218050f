"""What a run trained, read from its folder: as much of run.json as the caller allows is followed."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sftx.data.chat.template_files import bundled_templates
from sftx.data.encoder import Encoder
from sftx.data.tokenizer import Tokenizer
from sftx.model.on_disk import on_disk
from sftx.model.pack_loss import PackLoss
from sftx.model.same_files import digest_of
from sftx.report.facts import check_needed, damaged, read_facts
from sftx.settings.flat import flat
from sftx.settings.schema import Adapter, Config, Data, Model
from sftx.training.checkpoint import load_weights
from sftx.training.merging import Trained, load_trained, write_merged
from sftx.types import UserError

_Model = TypeVar("_Model", bound=BaseModel)
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
        folder = _model_of_trlx(folder, int(step or facts["num_steps"]))
        step = ""
    source, adapter = sources(folder, facts, bool(step), allowed)
    if dtype:
        source = _section(Model, source.model_dump() | {"save_dtype": dtype}, path, "model")
    tokenizer = Tokenizer.of_model(source)
    encoder = Encoder(*_encoding(folder, facts, tokenizer, bool(step), allowed), 1 << 20)
    seed = facts["config"].get("seed", 0)
    seed = seed if type(seed) is int else 0
    trained = load_trained(source, adapter, encoder, tokenizer.added_token_ids, seed, facts)
    if source.path != str(folder) and not allowed.model:
        refuse_other_base(source.path, facts)
    if step:
        loss = PackLoss(trained.model)
        load_weights(folder / "checkpoints" / f"step-{step:0>8}", loss)
        loss.use_segments(False)
    return trained


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
    return write_merged(read_trained(folder, dtype, step, allowed or Allowed()), target)


def sources(
    folder: Path, facts: dict[str, Any], is_step: bool, allowed: Allowed
) -> tuple[Model, Adapter]:
    """The model to load and the adapter to put in, as the caller allows them."""
    path = folder / "run.json"
    config = facts["config"]
    _check_sections(config, path)
    trust = allowed.trust_remote_code
    recorded = _section(Model, config["model"] | {"trust_remote_code": trust}, path, "model")
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
            return source, _section(Adapter, given, path, "adapter")
    kept = {"method": method, "path": start, "quantize": given.get("quantize", "none")}
    return source, _section(Adapter, kept, path, "adapter")


def _check_sections(config: dict[str, Any], path: Path) -> None:
    for name in ("model", "adapter", "data"):
        if not isinstance(config.get(name), dict):
            raise damaged(path, f"config.{name} must be an object")


def refuse_other_base(base: str, facts: dict[str, Any]) -> None:
    """UserError where a folder holds another model than it did when the run began."""
    before = flat(facts["mathematics"]).get("model.files")
    if before is not None and before != digest_of(base):
        raise UserError(
            f"sftx export: {base} holds another model than the one that the run started from; "
            "name the one to take: sftx export RUN model=..."
        )


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
        tokenizer = Tokenizer.load(str(folder))
        template = "auto"
    data = _section(Data, recorded | {"template": template}, path, "data")
    return tokenizer, data


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


def _section(kind: type[_Model], values: object, path: Path, name: str) -> _Model:
    """A section of the settings that a run.json records; UserError where it does not fit."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, ("config", name, *first["loc"])))
        raise damaged(path, f"{field}: {first['msg']}") from None
