"""Held-out loss: the naive weighted mean, whatever the packs."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import tiny

from sftx.eval.loss import held_out_loss
from sftx.model.load import PackLoss


def test_held_out_loss_is_the_naive_one_for_any_pack_size() -> None:
    model = tiny.model()
    data = tiny.examples([5, 40, 2, 23, 64, 9, 31])
    twin = copy.deepcopy(model).double()
    naive = float(tiny.naive_loss(twin, data).detach())
    for tokens_per_pack in (1, 64, 10_000):
        numbers = held_out_loss(PackLoss(model), tiny.corpus(data), tokens_per_pack, nullcontext)
        assert numbers["loss"] == pytest.approx(naive, rel=1e-6)
        assert numbers["perplexity"] == pytest.approx(np.exp(naive), rel=1e-5)
