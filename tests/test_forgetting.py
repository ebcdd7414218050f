"""The divergence of two models, against torch's own kl_div and against cases known by hand."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from sftx.eval.forgetting import Continuation, divergence

SAID = [Continuation([5, 6, 7], [8, 9]), Continuation([10], [11, 12, 13]), Continuation([], [9, 8])]


def test_a_model_has_not_moved_from_itself() -> None:
    model = tiny.model().eval()

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    assert divergence(forward, forward, SAID) == 0.0
    assert divergence(forward, forward, []) == 0.0


def test_two_models_differ_as_torch_says() -> None:
    tuned, base = (tiny.model(seed=seed).eval() for seed in (0, 1))
    sums = []
    with torch.no_grad():
        for said in SAID:
            ids = torch.tensor([said.prompt + said.said])
            log_p, log_q = (
                m(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
                for m in (tuned, base)
            )
            for position in range(len(ids[0]) - 1):
                if position + 1 >= len(said.prompt):
                    sums.append(
                        torch.nn.functional.kl_div(
                            log_q[position], log_p[position], log_target=True, reduction="sum"
                        )
                    )
    assert len(sums) == 2 + 3 + 1
    found = divergence(
        lambda ids: tuned(input_ids=ids, use_cache=False).logits,
        lambda ids: base(input_ids=ids, use_cache=False).logits,
        SAID,
    )
    assert found == pytest.approx(float(torch.stack(sums).mean()), rel=1e-9)
    assert found > 0


def test_a_case_by_hand() -> None:
    half = torch.zeros(1, 2, 2)  # both tokens of the vocabulary are equally likely
    skewed = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]])  # 3 to 1 after the first token
    found = divergence(lambda ids: half, lambda ids: skewed, [Continuation([0], [1])])
    assert found == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
