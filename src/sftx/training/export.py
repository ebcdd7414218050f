"""What a run trained, as one Hugging Face folder: adapters merged, quantised bases dequantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sftx.config import Adapter, Data, Model
from sftx.data.render import Encoder
from sftx.data.tokenizer import Tokenizer
from sftx.model.freeze import choose_weights
from sftx.model.load import PackLoss, load_model, stored_dtype
from sftx.model.save import load_tokenizer, save_model
from sftx.training.checkpoint import load_weights
from sftx.types import UserError

TRLX = "trlx"
"""The fact in run.json that tells a run of a trlx script (`sftx.compat.trlx`)."""


def export(folder: Path, target: Path, dtype: str = "", step: str = "") -> tuple[float, float]:
    """Write the run in `folder`, or the checkpoint after its `step`, into `target`, in `dtype` or that of the run.

    Returns how far a logit moves, relative to the largest one: by merging, and as stored. Raises UserError where
    merging moves one by more than 1e-5, or there is nothing to export.
    """
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if not step and facts["status"] != "finished":
        raise UserError(f"sftx export: the run is {facts['status']}, not finished; step=N takes one of its checkpoints")
    if TRLX in facts:  # every checkpoint of such a run holds a whole model
        folder, step = _model_of_trlx(folder, int(step or facts["num_steps"])), ""
    settings, given = facts["config"], facts["config"]["adapter"]
    source = Model.model_validate(settings["model"] | ({"save_dtype": dtype} if dtype else {}))
    adapter = Adapter()
    if given["method"] != "none":
        start = given["path"] if step else str(folder)
        adapter = Adapter.model_validate({"method": given["method"], "path": start} if start else given)
    elif not step:
        source = Model(path=str(folder), save_dtype=source.save_dtype, trust_remote_code=source.trust_remote_code)
    tokenizer = Tokenizer.of_model(source)
    nf4 = torch.float32 if given["quantize"] == "nf4" else None
    model = load_model(source, torch.device("cpu"), nf4=nf4)
    model = model.dequantize() if nf4 else model
    adapted, _ = choose_weights(model, source, adapter, settings["seed"], tokenizer.taught)
    if step:
        load_weights(folder / "checkpoints" / f"step-{step:0>8}", loss := PackLoss(model))
        loss.use_segments(False)
    before = _probe(model)
    merged: Any = model if adapted is None else adapted.merge_and_unload()
    moved = float((_probe(merged) - before).abs().max() / before.abs().max())
    if moved > 1e-5:
        raise UserError(f"sftx export: merging moves the logits by {moved:.1e} of the largest; nothing was written")
    encoder = Encoder(tokenizer, Data.model_validate(settings["data"]), 1 << 20)
    served = load_tokenizer(source)
    served.chat_template = encoder.chat_template or served.chat_template
    card = f"Exported by sftx from a run that started from `{settings['model']['path']}`.\n"
    merged.config.use_cache = True
    target.mkdir(parents=True, exist_ok=True)
    save_model(target, merged, served, sorted(encoder.stop_ids), card, stored_dtype(source))
    written = _probe(load_model(Model(path=str(target)), torch.device("cpu")))
    return moved, float((written - before).abs().max() / before.abs().max())


def _model_of_trlx(folder: Path, step: int) -> Path:
    """The model after `step` of a run whose record is in `folder`: trlx's layout has it beside that."""
    found = {int(path.name.removeprefix("checkpoint_")): path for path in folder.parent.glob("checkpoint_*[0-9]")}
    if step not in found:
        known = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(f"sftx export: {folder.parent} has no checkpoint of step {step}; there are: {known}")
    return found[step] / "hf_model"


def _probe(model: Any) -> torch.Tensor:
    """Logits [1, 64, V] of tokens drawn from the whole vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (1, 64), generator=torch.Generator().manual_seed(0))
    ids[0, -8:] = torch.arange(rows - 8, rows)  # the rows of added tokens are the last
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()
