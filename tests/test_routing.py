"""What the record says of routers: that of transformers over all tokens of the step, however the
step is computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny
import torch
from test_mixture import MIXTURES
from test_step import OPTIM
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import sftx
from sftx.data.pack import build_pack
from sftx.data.prefixes import build_shared_pack, shared_order
from sftx.model import routing
from sftx.model.checkpointing import recompute
from sftx.model.pack_loss import PackLoss, Paths, to_tensors
from sftx.model.routing import NUMBERS
from sftx.settings.keywords import LossSettings
from sftx.settings.schema import Loss
from sftx.training.optim import build_optimizer
from sftx.training.step import train_step
from sftx.types import Example, Pack

CPU = torch.device("cpu")
PACKINGS: list[list[tuple[int, ...]]] = [
    [(0, 1, 2, 3)],
    [(3, 1), (), (0, 2)],
    [(0,), (1,), (2,), (3,)],
]
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GEMMA4: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
FAMILIES = {**MIXTURES, "DeepseekV3": DEEPSEEK, "Gemma4Text": GEMMA4}
NEITHER = "Phimoe"
"""Its routers call a function of their own."""


def plain(data: Sequence[Example], packing: list[tuple[int, ...]]) -> list[Pack]:
    return [build_pack([data[i] for i in members], members) for members in packing]


def one_step(loss: PackLoss, packs: list[Pack]) -> dict[str, float]:
    """The numbers of a step that leaves the weights as they are."""
    optimizer = build_optimizer(loss.model, OPTIM)
    tensors = [to_tensors(pack, CPU) for pack in packs]
    result = train_step(loss.train(), optimizer, tensors, 9.0, 0.0, 0.0, nullcontext)
    value, _, norm, bad = result.read()
    assert not bad
    found = result.routers()
    assert found is not None
    assert tuple(found) == NUMBERS[len(NUMBERS) - len(found) :]
    return {**found, "loss": value, "grad_norm": norm}


def oracle(model: Any, data: Sequence[Example]) -> dict[str, float]:
    """From what transformers records of each example alone, and what its experts are given."""
    given: list[list[torch.Tensor]] = []
    experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
    hooks = []
    for module in experts:
        own: list[torch.Tensor] = []
        given.append(own)
        hooks.append(
            module.register_forward_pre_hook(lambda _m, args, own=own: own.append(args[1]))
        )
    layers: list[list[torch.Tensor]] = [[] for _ in experts]
    with torch.no_grad():
        for example in data:
            ids = torch.tensor(example.ids, dtype=torch.int64)[None]
            out = model.base_model(input_ids=ids, use_cache=False, output_router_logits=True)
            for layer, logits in zip(layers, out.router_logits, strict=True):
                layer.append(logits)
    for hook in hooks:
        hook.remove()
    whole: Any = tuple(torch.cat(layer) for layer in layers)
    count = whole[0].shape[-1]
    chosen = [torch.cat(own) for own in given]
    loads = torch.stack(
        [torch.nn.functional.one_hot(c, count).sum((0, 1)) / len(c) for c in chosen]
    )
    balance = load_balancing_loss_func(whole, count, chosen[0].shape[-1])
    if type(model).__name__.startswith("DeepseekV3"):
        balance = sigmoid_balance(whole, chosen)
    if type(model).__name__.startswith("Gemma4"):  # that function takes logits
        probabilities: Any = tuple(layer.log() for layer in whole)
        balance = load_balancing_loss_func(probabilities, count, chosen[0].shape[-1])
    return {
        "balance": float(balance),
        "largest_load": float(loads.max()),
        "smallest_load": float(loads.min()),
        "unused": float((loads == 0).sum()),
    }


def sigmoid_balance(logits: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor]) -> float:
    """DeepSeek-V3, equations 17 to 20, over all layers, times the experts per token; by loops."""
    experts = logits[0].shape[-1]
    choices, shares, tokens = [0.0] * experts, [0.0] * experts, 0
    for layer, choice in zip(logits, chosen, strict=True):
        for row, best in zip(layer.tolist(), choice.tolist(), strict=True):
            scores = [1 / (1 + math.exp(-x)) for x in row]
            tokens += 1
            for expert, score in enumerate(scores):
                shares[expert] += score / sum(scores)
                choices[expert] += expert in best
    return experts * sum(f / tokens * p / tokens for f, p in zip(choices, shares, strict=True))


def watched(family: str) -> PreTrainedModel:
    """A small model of the family, where transformers says which modules are its routers."""
    model = tiny.model(family, **FAMILIES[family])
    if not [*routing._routers(model)]:
        pytest.skip("transformers 5.17 does not record the routers of DeepSeek-V3")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reports_what_its_routers_did_however_it_is_computed(family: str) -> None:
    model = watched(family)
    data = tiny.examples([9, 30, 17, 22])
    expected = oracle(model.eval(), data)
    loss = PackLoss(model)
    first = one_step(loss, plain(data, PACKINGS[0]))
    assert ("balance" in first) == (family != NEITHER)
    if family == NEITHER:
        del expected["balance"]
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    for packing in PACKINGS[1:]:
        assert one_step(loss, plain(data, packing)) == pytest.approx(first, rel=1e-5), packing
    for paths in (Paths(transform=None), Paths(isolate=False), Paths(isolate=False, padded=True)):
        loss.take(paths)
        assert one_step(loss, plain(data, PACKINGS[1])) == pytest.approx(first, rel=1e-5), paths
    loss.take(Paths())
    recompute(model, 2)
    assert one_step(loss, plain(data, PACKINGS[1])) == pytest.approx(first, rel=1e-5)
    tokens = loss.routers.sums(CPU)[:, 1].sum(-1)
    assert tokens.tolist() == pytest.approx([9 + 30 + 17 + 22] * len(tokens), rel=1e-6)


def test_a_router_that_draws_experts_in_training_chooses_as_when_it_is_served() -> None:
    model = tiny.model("Phimoe", **MIXTURES["Phimoe"], router_jitter_noise=0.5)
    pack = to_tensors(plain(tiny.examples([9, 30, 17, 22]), [(0, 1, 2, 3)])[0], CPU)
    by_transformers = tiny.model("Phimoe", **MIXTURES["Phimoe"], router_jitter_noise=0.5).train()
    ids = pack.ids[None]
    assert not torch.equal(by_transformers(ids).logits, by_transformers(ids).logits)
    loss = PackLoss(model)
    losses = [loss.train(mode)(pack).item() for mode in (True, True, False)]
    assert losses[0] == losses[1] == losses[2]
    assert loss.routers.choose_otherwise()
    other = tiny.model("Mixtral", **MIXTURES["Mixtral"])
    assert not PackLoss(other).routers.choose_otherwise()


@pytest.mark.parametrize("family", ["DeepseekV3", "Gemma4Text", "Phimoe"])
def test_only_a_softmax_of_logits_is_balanced(family: str) -> None:
    model = watched(family)
    with pytest.raises(sftx.UserError, match=f"by a softmax .* {type(model).__name__} do not"):
        PackLoss(model, Loss(router_aux=0.1))


def test_a_shared_prefix_counts_as_often_as_examples_hold_it() -> None:
    model = tiny.model("Mixtral", **MIXTURES["Mixtral"])
    begin, *ends = tiny.examples([40, 9, 30, 17])
    data = [
        Example(np.concatenate([begin.ids, end.ids]), np.concatenate([begin.weights, end.weights]))
        for end in [*ends, ends[0]]
    ]
    found = shared_order([example.ids for example in data])
    assert found is not None
    order, shared = found
    assert shared.max() > 40  # two are one and the same
    tree = build_shared_pack([data[i] for i in order], tuple(order.tolist()), shared.tolist())
    assert len(tree.ids) < sum(len(example.ids) for example in data)
    loss = PackLoss(model)
    first = one_step(loss, plain(data, [(0, 1, 2, 3)]))
    loss.take(Paths(shares_prefixes=True))
    assert one_step(loss, [tree]) == pytest.approx(first, rel=1e-5)


def test_the_trained_balance_is_the_same_however_the_step_is_computed() -> None:
    found = []
    for packing, layers in [*((packing, 0) for packing in PACKINGS), (PACKINGS[1], 2)]:
        model = tiny.model("Mixtral", **MIXTURES["Mixtral"])
        recompute(model, layers)
        loss = PackLoss(model, Loss(router_aux=3.0)).train()
        for pack in plain(tiny.examples([9, 30, 17, 22]), packing):
            loss(to_tensors(pack, CPU)).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(gradients).double())
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 2e-6


def test_experts_without_a_token_are_counted() -> None:
    """Without a target a token counts too: routers choose for all of them."""
    model = tiny.model("Mixtral", **MIXTURES["Mixtral"])
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.zeros_(parameter)  # all alike: the same two are chosen for every token
    found = one_step(PackLoss(model), plain(tiny.examples([9, 30]), [(0, 1)]))
    assert [found[name] for name in NUMBERS] == pytest.approx([2.0, 1.0, 0.0, 4.0])


def test_the_record_has_it_for_mixtures_alone(tmp_path: Path) -> None:
    for family, more in (("Llama", {}), ("Mixtral", MIXTURES["Mixtral"])):
        result = sftx.train(
            model=tiny.folder(tmp_path / f"{family} model", family=family, **more),
            data={"rows": tiny.pairs(4), "cache": str(tmp_path / "cache")},
            output=str(tmp_path / family),
            batch={"examples_per_step": 4, "steps": 1},
            runtime={"progress": False, "device": "cpu", "threads": 1},
        )
        (line,) = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
        assert (line["routers"] is None) == (family == "Llama")
        page = (result.folder / "report.html").read_text(encoding="utf-8")
        assert ('"router_balance"' in page) == (family == "Mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("router_aux", [0.0, 1.0])
def test_two_ranks_report_and_train_what_one_process_does(
    tmp_path: Path, router_aux: float
) -> None:
    model = tiny.folder(tmp_path / "model", family="Mixtral", **MIXTURES["Mixtral"])
    objective: LossSettings = {"router_aux": router_aux}
    for name, count in (("one", 0), ("two", 2)):
        runtime = {"tokens_per_pack": 1, "parallel": "fsdp" if count else "auto"}
        batch = {"examples_per_step": 3, "epochs": 9 / 35}  # a rank has a pack of nothing
        path = ranks.write_run(tmp_path, model, name, runtime=runtime, batch=batch, loss=objective)
        ranks.run(path, count)
    for ours, theirs in zip(
        ranks.records(tmp_path / "two"), ranks.records(tmp_path / "one"), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["routers"] == pytest.approx(theirs["routers"], rel=1e-5)
