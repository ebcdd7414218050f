"""The divergence of two models, against torch's own kl_div and against a case known by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch

from sftx.eval import forgetting
from sftx.eval.forgetting import (
    Continuation,
    Gauge,
    gauged,
    log_probabilities,
    read_gauge,
    write_gauge,
)
from sftx.model.pack_loss import PackLoss

SAID = [Continuation([5, 6, 7], [8, 9]), Continuation([10], [11, 12, 13])]


def _thoughts(seed: int) -> list[torch.Tensor]:
    loss = PackLoss(tiny.model(seed=seed)).eval()
    with torch.no_grad():
        return [log_probabilities(loss, said) for said in SAID]


def test_a_model_has_not_moved_from_itself() -> None:
    thoughts = _thoughts(0)
    gauge = Gauge(SAID, thoughts.__getitem__)
    assert gauge.kl(lambda said: thoughts[SAID.index(said)]) == 0.0
    assert Gauge([], thoughts.__getitem__).kl(lambda said: thoughts[0]) == 0.0


def test_two_models_differ_as_torch_says(tmp_path: Path) -> None:
    tuned, base = (tiny.model(seed=seed).eval() for seed in (0, 1))
    sums = []
    with torch.no_grad():
        for said in SAID:
            ids = torch.tensor([said.prompt + said.said])
            log_p, log_q = (
                m(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
                for m in (tuned, base)
            )
            for position in range(len(said.prompt) - 1, len(ids[0]) - 1):
                sums.append(
                    torch.nn.functional.kl_div(
                        log_q[position], log_p[position], log_target=True, reduction="sum"
                    )
                )
    assert len(sums) == 2 + 3
    write_gauge(tmp_path / "new" / "gauge.safetensors", SAID, _thoughts(1))
    gauge = read_gauge(tmp_path / "new" / "gauge.safetensors")
    assert gauge.answers == SAID
    thoughts = _thoughts(0)
    found = gauge.kl(lambda said: thoughts[SAID.index(said)])
    assert found == pytest.approx(float(torch.stack(sums).mean()), rel=1e-5)
    assert found > 0


def test_a_case_by_hand() -> None:
    half = torch.tensor([[0.5, 0.5]]).log()
    skewed = torch.tensor([[0.75, 0.25]]).log()
    gauge = Gauge([Continuation([0], [1])], lambda number: skewed)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert gauge.kl(lambda said: half) == pytest.approx(expected)


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, said = [[1, 2], [3], [4]], [[5, 6, 7], [], [8, 9, 10]]
    whole = [Continuation([1, 2], [5, 6, 7]), Continuation([4], [8, 9, 10])]
    assert gauged(prompts, said, 100) == whole
    monkeypatch.setattr(forgetting, "MOST_BYTES", 4 * 4 * 100 + 3)  # of four tokens
    assert gauged(prompts, said, 100) == [whole[0], Continuation([4], [8])]
    assert gauged(prompts, said, 1_000) == []
