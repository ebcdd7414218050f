"""`sftx export`: a trained model as a Hugging Face folder, as GGUF, or as an adapter, each checked
against what was trained before it appears under its name.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sftx.boundary import boundary
from sftx.eval.divergence import divergence
from sftx.model.load import load_model, stored_dtype
from sftx.model.save import load_tokenizer, save_model
from sftx.settings.schema import Model
from sftx.training.export import Allowed, read_trained
from sftx.training.hand_over_adapter import check_adapter
from sftx.training.hand_over_card import card_of
from sftx.training.hand_over_gguf import kind_of, read_back, round_as_gguf, write
from sftx.training.llama_cpp_check import ByLlamaCpp, check_llama_cpp
from sftx.training.merging import Trained, beside
from sftx.training.mixing import general_text, mix, read_averaged, read_base, text_loss
from sftx.training.parity import (
    LOOKED_AT,
    Measured,
    Question,
    check_ids,
    check_model,
    continuations,
    distance,
    measure,
    own_rows,
    questions_of,
    reading_of,
)
from sftx.types import Row, UserError

FORMATS = ("hf", "gguf", "adapter")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Wish:
    """What to write. `dtype`: empty = as the run says; `average`: steps whose checkpoints are
    averaged; `mix`: share of the trained weights, the rest from the base; `rows`: conversations to
    check with, default: some that come with sftx.
    """

    format: str = "hf"
    dtype: str = ""
    step: str = ""
    average: tuple[str, ...] = ()
    mix: float | None = None
    rows: tuple[Row, ...] = ()


@dataclass(slots=True)
class Checked:
    """What the checks of an export measured, in shares of the largest logit.

    `merging`: by merging the adapter. `conversion`: what was read back, from the trained weights in
    the dtype of the file. `rounding`: the same from the trained weights in float32. `same_answers` of
    `answers`. `forgotten`: what is forgotten, by name of the model: KL from the base in nats per
    token, and, where the run has `eval.general`, the loss on that text.
    """

    questions: int
    readers: list[str]
    merging: float
    conversion: float = 0.0
    rounding: float = 0.0
    same_answers: int = 0
    answers: int = 0
    llama_cpp: ByLlamaCpp | None = None
    forgotten: dict[str, str] = field(default_factory=dict[str, str])

    def line(self) -> str:
        """The whole in one line."""
        forgotten = "".join(f"; {name}: {value}" for name, value in self.forgotten.items())
        llama_cpp = "" if self.llama_cpp is None else f"; llama.cpp: {self.llama_cpp.line()}"
        return (
            f"{self.questions} rows give the token ids of training in {', '.join(self.readers)}; "
            f"logits moved by {self.merging:.1e} of the largest in merging, by {self.rounding:.1e} as "
            f"stored ({self.conversion:.1e} beyond the rounding of the dtype); {self.same_answers} of "
            f"{self.answers} greedy answers equal{llama_cpp}{forgotten}"
        )


def hand_over(folder: Path, target: Path, wish: Wish, allowed: Allowed) -> Checked:
    """Write the run in `folder` into `target` as `wish` says; nothing is left where a check fails.

    Raises:
        UserError: there is nothing to export, the format does not hold this model, or what was
            written is not what was trained.
    """
    if wish.format == "adapter":
        return _adapter(folder, target, wish, allowed)
    trained, model, checked = _model(folder, wish, allowed)
    questions = questions_of(wish.rows or own_rows(), trained.encoder)
    checked.questions = len(questions)
    stops = sorted(trained.encoder.stop_ids)
    before = measure(model, questions, stops)
    with beside(target) as temporary:
        if wish.format == "gguf":
            kind = kind_of(wish.dtype, stored_dtype(trained.source))
            found = _gguf(temporary, trained, model, kind, questions, checked)
        else:
            found = _folder(temporary, trained, model, wish.dtype, questions, checked)
        checked.rounding = distance(before, found)
        checked.answers = len(before.answers)
        pairs = zip(before.answers, found.answers, strict=True)
        checked.same_answers = sum(ours == theirs for ours, theirs in pairs)
        card = card_of(trained.facts, checked.line())
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return checked


def _model(folder: Path, wish: Wish, allowed: Allowed) -> tuple[Trained, PreTrainedModel, Checked]:
    """The model to write, merged, averaged and mixed; how far it is from its base then."""
    if wish.average:
        trained, model, moved = read_averaged(folder, "", wish.average, allowed)
    else:
        trained = read_trained(folder, "", wish.step, allowed)
        model, moved = trained.merged()
    checked = Checked(0, [], moved)
    if wish.mix is None and not wish.average:
        return trained, model, checked
    base = read_base(folder, trained, allowed)
    questions = questions_of(wish.rows or own_rows(), trained.encoder)[:LOOKED_AT]
    stops = sorted(trained.encoder.stop_ids)

    text = general_text(trained)
    if text:
        checked.forgotten["base"] = f"loss on the general text {text_loss(base, text):.4f}"

    def gauge(name: str) -> None:
        said = continuations(questions, measure(model, questions, stops))
        kl = divergence(_forward(model), _forward(base), said)
        checked.forgotten[name] = f"KL from the base {kl:.4f}"
        if text:
            checked.forgotten[name] += f", loss on the general text {text_loss(model, text):.4f}"

    gauge("averaged" if wish.average else "trained")
    if wish.mix is not None:
        mix(model, base, wish.mix)
        gauge("mixed")
    return trained, model, checked


def _forward(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def _folder(
    temporary: Path,
    trained: Trained,
    model: PreTrainedModel,
    dtype: str,
    questions: Sequence[Question],
    checked: Checked,
) -> Measured:
    """Write a Hugging Face folder; what it says when read back."""
    stored = DTYPES[dtype] if dtype in DTYPES else stored_dtype(trained.source)
    stops = sorted(trained.encoder.stop_ids)
    _check_range(model, stored)
    save_model(temporary, model, trained.served, stops, "", stored)
    written = Model(path=str(temporary), trust_remote_code=trained.source.trust_remote_code)
    check_ids("the exported folder", reading_of(load_tokenizer(written)), questions)
    checked.readers.append("the exported folder")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored))
    expected = measure(model, questions, stops)
    found = measure(load_model(written, torch.device("cpu")), questions, stops)
    checked.conversion = check_model("the exported folder", expected, found)
    return found


def _check_range(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """UserError where a weight is too large for float16."""
    if dtype != torch.float16:
        return
    for name, parameter in model.named_parameters():
        if float(parameter.detach().abs().max()) > torch.finfo(dtype).max:
            raise UserError(f"sftx export: {name} holds numbers too large for float16; take bf16")


def _gguf(
    temporary: Path,
    trained: Trained,
    model: PreTrainedModel,
    kind: str,
    questions: Sequence[Question],
    checked: Checked,
) -> Measured:
    """Write a GGUF file and its Modelfile; what it says when read back."""
    if kind in ("F16", "Q8_0"):
        _check_range(model, torch.float16)
    scratch = temporary / "scratch"
    scratch.mkdir()
    stops = sorted(trained.encoder.stop_ids)
    file = write(temporary, scratch, trained, model, kind)
    back = read_back(file, scratch, questions, model.config)
    checked.readers += back.readers
    if round_as_gguf(model, kind):
        expected = measure(model, questions, stops)
    else:  # llama.cpp's quantiser rounds as it alone knows: two readers must agree
        expected = measure(back.model(), questions, stops)
    found = measure(back.model(), questions, stops)
    checked.conversion = check_model("the GGUF file", expected, found)
    other = back.by_transformers()
    if other is not None:
        seen = measure(other, questions, stops)
        further = check_model("the GGUF file as transformers reads it", expected, seen)
        checked.conversion = max(checked.conversion, further)
    if back.llama_cpp is not None:
        with boundary("sftx export: llama.cpp cannot run the GGUF file"):
            checked.llama_cpp = check_llama_cpp(
                back.llama_cpp, kind, back.model(), questions, stops
            )
    shutil.rmtree(scratch)
    return found


def _adapter(folder: Path, target: Path, wish: Wish, allowed: Allowed) -> Checked:
    """Write the adapter alone, and check that a server which loads it gets what was trained."""
    if wish.average or wish.mix is not None or wish.dtype:
        raise UserError("sftx export: format=adapter takes no average=, mix= or dtype=")
    trained = read_trained(folder, "", wish.step, allowed)
    if trained.adapted is None:
        raise UserError("sftx export: format=adapter: this run trained all weights, no adapter")
    questions = questions_of(wish.rows or own_rows(), trained.encoder)
    stops = sorted(trained.encoder.stop_ids)
    expected = measure(trained.model, questions, stops)
    checked = Checked(len(questions), ["the exported folder"], 0.0)
    with beside(target) as temporary:
        adapted: Any = trained.adapted
        save_model(temporary, adapted, trained.served, stops, "", torch.float32)
        written = Model(path=str(temporary), trust_remote_code=trained.source.trust_remote_code)
        check_ids("the exported folder", reading_of(load_tokenizer(written)), questions)
        base = read_base(folder, trained, allowed)
        found = check_adapter(temporary, base, questions, stops)
        checked.conversion = checked.rounding = check_model("the adapter", expected, found)
        checked.answers = checked.same_answers = len(found.answers)
        card = card_of(trained.facts, checked.line())
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return checked
