"""What the `loss` section adds: each against a naive float64 autograd reference, whatever the
packing and the path.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import sftx
from sftx.data.pack import build_pack
from sftx.model.loss import LogitTransform, cross_entropy_sum, fused_cross_entropy_sum
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.model.regularization import embedding_noise, router_balance
from sftx.settings.keywords import LossSettings
from sftx.settings.schema import Loss
from sftx.types import Example

CPU = torch.device("cpu")
OBJECTIVES = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"dft": True},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "dft": True},
]
PACKINGS = [[(0, 1, 2, 3)], [(3, 1), (0, 2)], [(0,), (1,), (2,), (3,)]]
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def naive(
    z: torch.Tensor, label: torch.Tensor, weight: torch.Tensor, objective: Loss
) -> torch.Tensor:
    """The sum over rows of full logits, from the definitions: torch's own smoothing, softmax and
    logsumexp.
    """
    loss = torch.nn.functional.cross_entropy(
        z, label, reduction="none", label_smoothing=objective.label_smoothing
    )
    if objective.dft:
        loss = loss * torch.softmax(z, -1).gather(-1, label[:, None])[:, 0].detach()
    return ((loss + objective.z_loss * torch.logsumexp(z, -1) ** 2) * weight).sum()


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.5, 4.0)], ids=["plain", "softcap"]
)
def test_gradients_are_those_of_the_definition(
    settings: dict[str, Any], transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftx.model.loss.CHUNK_BYTES", 3 * 4 * 50)
    objective = Loss(**settings)
    torch.manual_seed(0)
    hidden, head, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((11, 8), (50, 8), (50,))
    )
    label, weight = torch.randint(0, 50, (11,)), torch.rand(11)
    fused, _ = fused_cross_entropy_sum(hidden, head, bias, label, weight, transform, objective)
    fused_gradients = torch.autograd.grad(fused * 0.3, (hidden, head, bias))
    twins = [x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    logits = transform(twins[0] @ twins[1].t() + twins[2])
    reference = naive(logits, label, weight.double(), objective)
    assert float(fused.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    for ours, theirs in zip(
        fused_gradients, torch.autograd.grad(reference * 0.3, twins), strict=True
    ):
        assert float((ours.double() - theirs).norm() / theirs.norm()) <= 1e-6
    z = logits.detach().float().requires_grad_()
    (ours,) = torch.autograd.grad(cross_entropy_sum(z, label, weight, objective), z)
    z64 = z.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(naive(z64, label, weight.double(), objective), z64)
    assert float((ours.double() - theirs).norm() / theirs.norm()) <= 1e-6


def gradients(
    loss: PackLoss, data: list[Example], packs: list[tuple[int, ...]]
) -> tuple[float, torch.Tensor]:
    """Value and gradient of the sum over all packs."""
    loss.zero_grad()
    total = 0.0
    for members in packs:
        value = loss(to_tensors(build_pack([data[i] for i in members], members), CPU))
        value.backward()
        total += float(value.detach())
    return total, torch.cat(
        [p.grad.flatten().double() for p in loss.parameters() if p.grad is not None]
    )


def close(ours: tuple[float, torch.Tensor], theirs: tuple[float, torch.Tensor]) -> bool:
    return (
        ours[0] == pytest.approx(theirs[0], rel=1e-6)
        and float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < 2e-6
    )


def test_all_together_whatever_the_packing_and_the_path() -> None:
    model = tiny.model("Mixtral", **MIXTRAL)
    data = tiny.examples([9, 30, 17, 22])
    objective = Loss(label_smoothing=0.1, z_loss=1e-3, dft=True, neftune_alpha=5.0, router_aux=0.5)
    loss = PackLoss(model, objective)
    loss.noise_seed = 7
    first = gradients(loss, data, PACKINGS[0])
    for packs in PACKINGS[1:]:
        assert close(gradients(loss, data, packs), first)
    loss.take(Paths(transform=None))
    assert close(gradients(loss, data, PACKINGS[1]), first)
    loss.take(Paths(isolate=False))
    assert close(gradients(loss, data, PACKINGS[1]), first)
    loss.take(Paths(isolate=False, padded=True))
    assert close(gradients(loss, data, PACKINGS[1]), first)
    loss.noise_seed = 8
    assert gradients(loss, data, PACKINGS[0])[0] != pytest.approx(first[0], rel=1e-5)
    plain = PackLoss(copy.deepcopy(model)).eval()
    assert gradients(loss.eval(), data, PACKINGS[0])[0] == pytest.approx(
        gradients(plain, data, PACKINGS[0])[0], 1e-6
    )


def test_noise_is_added_to_the_embeddings_of_training_alone() -> None:
    model = tiny.model()
    data = tiny.examples([9, 30])
    twin = copy.deepcopy(model).double()
    loss = PackLoss(model, Loss(neftune_alpha=5.0))
    loss.noise_seed = 3
    noise = embedding_noise([9, 30], 32, 5.0, [3 * 1_000_003, 3 * 1_000_003 + 1])
    for part, length in zip(noise.split([9, 30]), (9, 30), strict=True):
        bound = 5.0 / math.sqrt(length * 32)
        assert float(part.abs().max()) <= bound
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    expected = 0.0
    for example, part in zip(data, noise.split([9, 30]), strict=True):
        ids = torch.tensor(example.ids, dtype=torch.int64)[None]
        embeddings = twin.get_input_embeddings()(ids) + part.double()
        logits = twin(inputs_embeds=embeddings, use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        expected += float((nll * torch.tensor(example.weights[1:])).sum().detach())
    tensors = to_tensors(build_pack(data, (0, 1)), CPU)
    assert float(loss(tensors)) == pytest.approx(expected, rel=1e-6)
    ids = torch.tensor(data[0].ids, dtype=torch.int64)[None]
    loss.use_segments(False)
    assert torch.equal(model(ids).logits, model(ids).logits)  # no noise is left behind


def test_router_balance_is_that_of_transformers_for_each_segment() -> None:
    torch.manual_seed(0)
    layers = [torch.randn(20, 6, requires_grad=True) for _ in range(3)]
    cu_seqlens, share = torch.tensor([0, 7, 20], dtype=torch.int32), torch.tensor([0.5, 2.0])
    ours = router_balance(layers, 2, cu_seqlens, share)
    theirs = torch.zeros(())
    for i, (a, b) in enumerate([(0, 7), (7, 20)]):
        part: Any = tuple(x[a:b] for x in layers)
        theirs = theirs + share[i] * load_balancing_loss_func(part, 6, 2)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for mine, other in zip(
        torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(sftx.UserError, match=r"loss\.router_aux: LlamaForCausalLM has no experts"):
        PackLoss(tiny.model(), Loss(router_aux=0.1))


def test_a_run_reports_its_objective_and_evaluates_plainly(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "model")
    rows = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(12)]
    results = []
    losses: dict[str, LossSettings] = {
        "plain": {},
        "smooth": {"label_smoothing": 0.3, "neftune_alpha": 1.0},
    }
    for name, loss in losses.items():
        results.append(
            sftx.train(
                model=path,
                data={"rows": rows, "eval_rows": rows, "cache": str(tmp_path / "cache")},
                output=str(tmp_path / name),
                batch={"examples_per_step": 12, "steps": 2},
                loss=loss,
                runtime={"progress": False, "device": "cpu", "threads": 1},
            )
        )
    plain, smooth = results
    assert smooth.eval_before == plain.eval_before
    assert smooth.loss != plain.loss
    facts = json.loads((tmp_path / "smooth" / "run.json").read_text(encoding="utf-8"))
    assert facts["config"]["loss"]["label_smoothing"] == 0.3
