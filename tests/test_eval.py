"""Held-out loss: the naive weighted mean, whatever the packs."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import tiny

from sftx.data.store.cache import Entry, make_block
from sftx.data.store.corpus import Corpus, Origin, Part
from sftx.eval.loss import held_out_loss
from sftx.model.pack_loss import PackLoss


def test_held_out_loss_is_the_naive_one_for_any_pack_size() -> None:
    model = tiny.model()
    data = tiny.examples([5, 40, 2, 23, 64, 9, 31])
    twin = copy.deepcopy(model).double()
    naive = float(tiny.naive_loss(twin, data).detach())
    for tokens_per_pack in (1, 64, 10_000):
        numbers = held_out_loss(PackLoss(model), tiny.corpus(data), tokens_per_pack, nullcontext)
        assert numbers["loss"] == pytest.approx(naive, rel=1e-6)
        assert numbers["perplexity"] == pytest.approx(np.exp(naive), rel=1e-5)


def test_sources_count_by_their_weight_and_are_told_apart() -> None:
    """The loss is one sum over one sum of weights; a mean of the sources' means would be another
    number.
    """
    model = tiny.model()
    twin = copy.deepcopy(model).double()
    sources = {"short": tiny.examples([5, 7]), "long": tiny.examples([60, 50, 40], seed=1)}
    parts = [
        Part(
            make_block([Entry(example, i, row=i) for i, example in enumerate(data)], {}),
            number,
            0,
            1,
        )
        for number, data in enumerate(sources.values())
    ]
    corpus = Corpus(parts, list(sources), [Origin("memory", "row")])
    numbers = held_out_loss(PackLoss(model), corpus, 64, nullcontext)
    together = [example for data in sources.values() for example in data]
    assert numbers["loss"] == pytest.approx(
        float(tiny.naive_loss(twin, together).detach()), rel=1e-6
    )
    for name, data in sources.items():
        assert numbers[f"loss of {name}"] == pytest.approx(
            float(tiny.naive_loss(twin, data).detach()), rel=1e-6
        )


def test_dropout_is_off_while_evaluating_and_on_again_after() -> None:
    model = tiny.model("GPT2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5, n_inner=64)
    loss, data = PackLoss(model), tiny.examples([5, 40])
    twin = copy.deepcopy(model).double().eval()
    twin.set_attn_implementation("eager")
    numbers = held_out_loss(loss, tiny.corpus(data), 64, nullcontext)
    assert numbers["loss"] == pytest.approx(float(tiny.naive_loss(twin, data).detach()), rel=1e-6)
    assert model.training
