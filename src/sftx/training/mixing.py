"""Models made of several: the mean of checkpoints, and a mixture with the base."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sftx.data.encoder import DEFAULT_LENGTH, Encoder
from sftx.eval.questions import read_general
from sftx.model.load import load_model
from sftx.model.trainable import add_rows
from sftx.model_config import positions_in
from sftx.settings.make import make_config
from sftx.training.export import Allowed, read_trained, refuse_other_base, sources
from sftx.training.merging import Trained
from sftx.types import Example, Json, UserError


def read_averaged(
    folder: Path, dtype: str, steps: Sequence[str], allowed: Allowed
) -> tuple[Trained, PreTrainedModel, float]:
    """The mean of the merged weights after these steps, and what goes with the last of them.

    The mean is that of whole weights: the mean of the two matrices of an adapter would be another.
    The number is the largest movement of a logit by merging.
    """
    trained = read_trained(folder, dtype, steps[-1], allowed)
    mean, moved = trained.merged()
    for step in steps[:-1]:
        other, further = read_trained(folder, dtype, step, allowed).merged()
        moved = max(moved, further)
        theirs = dict(other.named_parameters())
        with torch.no_grad():
            for name, parameter in mean.named_parameters():
                parameter.add_(theirs[name])
    with torch.no_grad():
        for parameter in mean.parameters():
            parameter.div_(len(steps))
    return trained, mean, moved


def read_base(folder: Path, trained: Trained, allowed: Allowed) -> PreTrainedModel:
    """The model that the run started from, with rows for the tokens that the run added.

    Raises:
        UserError: run.json names one that is not on this disk.
    """
    config = trained.facts["config"]
    without_adapter = {"config": config | {"adapter": {}}}
    source, _ = sources(folder, without_adapter, True, allowed)
    base = load_model(source, torch.device("cpu"))
    if not allowed.model:
        refuse_other_base(source.path, trained.facts)
    seed = config.get("seed")
    ids = trained.encoder.tokenizer.added_token_ids
    add_rows(base, ids, seed if isinstance(seed, int) else 0)
    return base


def general_text(trained: Trained) -> list[Example]:
    """The text of the run's `eval.general`, encoded; [] where the run has none, or its file is not
    here any more.
    """
    general = _general_of(cast("dict[str, Json]", trained.facts["config"].get("eval") or {}))
    if general is False:
        return []
    config = make_config(
        model="unused",
        data={"format": "auto"},
        output="unused",
        eval={"prompts": "unused", "general": general},
    )
    known = positions_in(trained.model.config.get_text_config().to_dict()) or DEFAULT_LENGTH
    data = trained.encoder.data
    longest = data.max_length or min(known, DEFAULT_LENGTH)
    corpus = read_general(config, Encoder(trained.encoder.tokenizer, data, longest))
    if corpus is None:
        return []
    return [corpus.example(i) for i in range(len(corpus))]


def _general_of(evaluated: dict[str, Json]) -> str | bool:
    """What `eval.general` was; False where no prompts were asked, or its file is gone."""
    if not evaluated.get("prompts"):
        return False
    general = evaluated.get("general", True)
    if not isinstance(general, str):
        return general is not False
    if Path(general).exists():
        return general
    return False  # or rows that were in memory


def text_loss(model: PreTrainedModel, text: Sequence[Example]) -> float:
    """The loss of a model on some examples, in nats per unit of weight."""
    total = weight = 0.0
    with torch.no_grad():
        for example in text:
            ids = torch.from_numpy(example.ids.astype("int64"))
            weights = torch.from_numpy(example.weights[1:]).double()
            logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            log_p = logits.double().log_softmax(-1)
            chosen = log_p.gather(1, ids[1:, None])[:, 0]
            total -= float((weights * chosen).sum())
            weight += float(weights.sum())
    return total / weight


def mix(model: Any, base: PreTrainedModel, share: float) -> None:
    """Make the weights of `model` (in place) `share` of theirs and the rest of the base's."""
    theirs = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in theirs or theirs[name].shape != parameter.shape:
                raise UserError(f"sftx export: mix: the base has no {name} of that shape")
            parameter.copy_(torch.lerp(theirs[name], parameter, share))
