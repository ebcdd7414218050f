"""Dropout and noise are new in every step, and others with every seed; dropout is another on every
rank too.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch

import sftx
from sftx.training import loop
from sftx.training.optim import StochasticAdamW

DROPOUT = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "n_inner": 64}


@pytest.mark.parametrize("what", ["dropout", "noise"])
def test_what_is_random_is_new_in_every_step(tmp_path: Path, what: str) -> None:
    """Three steps over the same examples, of weights that do not move: nothing else can make losses
    differ.
    """
    rates = DROPOUT if what == "dropout" else {**dict.fromkeys(DROPOUT, 0.0), "n_inner": 64}
    records = sftx.steps(
        model=tiny.folder(tmp_path / "model", family="GPT2", **rates),
        data={
            "rows": [["What is 1?", "It is 1."], ["And 2?", "It is 2."]],
            "cache": str(tmp_path / "cache"),
        },
        output=str(tmp_path / "run"),
        batch={"examples_per_step": 2, "epochs": 3, "shuffle": False},
        optim={"learning_rate": 1e-30},
        loss={"neftune_alpha": 20.0 if what == "noise" else 0.0},
        runtime={"progress": False, "device": "cpu", "threads": 1, "tokens_per_pack": 100},
    )
    assert len({record.loss for record in records}) == 3


def test_dropout_goes_by_seed_step_and_rank_and_noise_by_seed_and_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Noise on embeddings belongs to an example, whichever rank has it; dropout does not."""
    job = Mock(optimizer=Mock(spec=StochasticAdamW))
    dropout: dict[tuple[int, int, int], int] = {}
    noise: dict[tuple[int, int], set[int]] = {}
    monkeypatch.setattr(loop, "train_step", lambda *_: None)
    for rank, step, job.config.seed in itertools.product(range(3), (0, 1, 7), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        loop._step(job, step, [])
        dropout[rank, step, job.config.seed] = torch.initial_seed()
        noise.setdefault((step, job.config.seed), set()).add(job.loss.noise_seed)
        assert (
            job.optimizer.seed == job.loss.noise_seed
        )  # a weight is rounded alike on whichever rank it is
    assert len(set(dropout.values())) == len(dropout) == 18
    assert [len(seeds) for seeds in noise.values()] == [1] * 6
    assert len(set.union(*noise.values())) == 6
