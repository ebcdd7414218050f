"""What is checked of the data and the ranks before a run: it must train what will be served."""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sftx import distributed
from sftx.data.encoder import Encoder
from sftx.data.store.corpus import Corpus
from sftx.data.tokenizer import Tokenizer
from sftx.eval.judge import Questions
from sftx.model.save import load_tokenizer
from sftx.settings.schema import Data, Model
from sftx.types import UserError


def check_stop_token(corpus: Corpus, encoder: Encoder, data: Data) -> None:
    """UserError where no target is a stop token: the model would never learn to stop.

    Rows of tokens or segments say themselves what is learned; naming that format takes the
    responsibility.
    """
    if data.format in ("tokens", "segments"):
        return
    stops: set[int] = {*encoder.tokenizer.stop_ids}
    if encoder.stop_id is not None:
        stops.add(encoder.stop_id)
    # From the end: the stop token of a document that was cut is in its last piece.
    for i in reversed(range(len(corpus))):
        example = corpus.example(i)
        if np.isin(example.ids[example.weights > 0], list(stops)).any():
            return
    found = f"no target is a stop token ({' or '.join(map(str, sorted(stops)))})"
    why = "the tokenizer has no EOS token" if encoder.tokenizer.eos_id is None else found
    raise UserError(
        f"{why}: the model would never learn to stop. If the rows are meant so, say data.format: "
        "tokens (or segments)"
    )


def load_same_tokenizer(model: Model, fast: Tokenizer, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The tokenizer that is saved with the model; UserError where training and serving would cut a
    text into different tokens.
    """
    served = load_tokenizer(model)
    for i in range(min(len(corpus), 5)):
        text = fast.decode(corpus.example(i).ids[:200].tolist())
        ours = list(fast.encode_batch([text])[0])
        theirs = list(served(text, add_special_tokens=False)["input_ids"])
        if ours != theirs:
            raise UserError(
                "model.tokenizer: tokenizer.json and the class transformers loads for it cut a "
                "text differently, so a server would not see what was trained: "
                f"{text[:60]!r} -> {ours[:12]} and {theirs[:12]}"
            )
    return served


def check_best(wanted: str | None, held_out: Corpus | None, questions: Questions | None) -> None:
    """UserError where no evaluation will have the number `wanted`, by which the best is chosen."""
    known: list[str] = []
    if held_out is not None:
        known += ["loss", "perplexity", "accuracy"]
        known += [f"{kind} of {name}" for name in held_out.sources for kind in ("loss", "accuracy")]
    if questions is not None:
        known += [*questions.scored, "ended", "kl", "general loss"]
    if wanted is not None and wanted not in known:
        raise UserError(
            f"eval.keep_best: no evaluation has the number {wanted!r}; they have {', '.join(known)}"
        )


def check_ranks(settings: dict[str, Any]) -> None:
    """UserError where another rank has other data or settings, or packs of another size."""
    gathered = distributed.all_gather(settings)
    for rank, theirs in enumerate(gathered):
        odd = [
            f"{key}: {theirs[key]!r}, not {value!r}"
            for key, value in gathered[0].items()
            if theirs[key] != value
        ]
        if odd:
            raise UserError(f"rank {rank} has other settings or data than rank 0: {'; '.join(odd)}")
