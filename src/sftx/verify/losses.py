"""The loss of packs, as training computes it, against each example alone through the plain model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sftx.boundary import boundary
from sftx.data.pack import balanced, build_pack, probe_pack
from sftx.data.store.corpus import Corpus
from sftx.model.adapter import load_adapter
from sftx.model.checks.sharing import tree_pack
from sftx.model.checks.start import check_paths, check_sizes
from sftx.model.load import load_model
from sftx.model.pack_loss import PackLoss, to_tensors
from sftx.model.runtime import Machine, name_of
from sftx.settings.schema import Model
from sftx.types import Example, Pack
from sftx.verify.finding import Finding, compared, does_not_apply
from sftx.verify.oracle import Measured, losses_alone, plain_model, train_embeddings_only

EXAMPLES = 6
TOKENS = 1024
"""The most examples, and tokens of them together, that run through the model."""
LIMITS = {
    torch.float32: {"loss": 1e-5, "gradient": 1e-3},
    torch.bfloat16: {"loss": 2e-2, "gradient": 1e-1},
}
"""Relative differences that rounding explains. In float32 a loss is off by about 1e-7, a gradient by
1e-6; more where a router chooses its experts by a hair.
"""


@dataclass(frozen=True, slots=True)
class Losses:
    """What was found, and what the start-up checks said of the model."""

    findings: list[Finding]
    notes: list[str]


def chosen(corpus: Corpus) -> list[Example]:
    """The examples that run through the model: the first ones, of at least two tokens."""
    found: list[Example] = []
    tokens = 0
    for number in range(len(corpus)):
        example = corpus.example(number)
        tokens += len(example.ids)
        if found and (len(found) == EXAMPLES or tokens > TOKENS):
            break
        found.append(example)
    return found


def oracle(
    model: Model, adapter: str | None, examples: Sequence[Example], machine: Machine
) -> list[Measured]:
    """Each example alone, through the model as transformers loads it; then those with a common
    beginning, see `_with_a_prefix`.
    """
    plain = plain_model(model.path, adapter, model.trust_remote_code, machine.device)
    return list(losses_alone(plain, [*examples, *_with_a_prefix(examples)]))


def compare_losses(
    model: Model,
    adapter: str | None,
    examples: Sequence[Example],
    alone: Sequence[Measured],
    machine: Machine,
) -> Losses:
    """Five properties of the loss: that of the model's logits, for packs, for any size, any order,
    and for shared prefixes. `alone` = what `oracle` returns.

    Raises:
        UserError: the model cannot be loaded, or its start-up checks refuse it.
    """
    loaded = load_model(model, machine.device)
    if adapter is not None:
        with boundary(f"the adapter in {adapter} cannot be loaded"):
            load_adapter(loaded, adapter)
    loss = PackLoss(loaded).eval()
    longest = max(len(example.ids) for example in examples)
    largest_id = max(int(example.ids.max()) for example in examples)
    check_sizes(loss, longest, largest_id)
    probe = probe_pack(examples)
    notes = check_paths(loss, probe, machine.precision, longest, TOKENS, share=True)
    shared_alone = alone[len(examples) :]
    alone = alone[: len(examples)]
    total = _sum(alone)
    limits = LIMITS[machine.precision]
    kind = f"{name_of(machine.precision)}, {len(examples)} examples"

    single = [_measured(loss, [[example]], machine) for example in examples]
    apart = [_apart(ours, theirs) for ours, theirs in zip(single, alone, strict=True)]
    fused = compared(
        "fused loss = the model's own logits",
        f"each example alone; the model as transformers loads it, cross-entropy in float64; {kind}",
        _worst(apart),
        limits,
    )
    packed = compared(
        "packed = separate",
        f"all examples in one pack; each alone through the plain model; {kind}",
        _apart(_measured(loss, [examples], machine), total),
        limits,
    )
    any_size = _any_size(loss, examples, total, machine)
    any_order = _any_order(loss, examples, total, machine)
    shared = _shared_prefixes(loss, examples, shared_alone, machine)
    return Losses([fused, packed, any_size, any_order, shared], notes)


def _with_a_prefix(examples: Sequence[Example]) -> list[Example]:
    """The examples behind the first half of the first one, with its weights; none is longer than the
    longest was. Nothing where that leaves no room.
    """
    longest = max(len(example.ids) for example in examples)
    first = examples[0]
    half = len(first.ids) // 2
    made: list[Example] = []
    if not 0 < half < longest:
        return made
    for example in examples:
        rest = slice(longest - half)
        if example is first:
            rest = slice(half, None)
        weights = example.weights[rest].copy()
        weights[:1] = 1.0
        ids = np.concatenate([first.ids[:half], example.ids[rest]])
        weights = np.concatenate([first.weights[:half], weights])
        made.append(Example(ids, weights))
    return made


def _shared_prefixes(
    loss: PackLoss, examples: Sequence[Example], alone: Sequence[Measured], machine: Machine
) -> Finding:
    what = "shared prefixes = separate"
    how = (
        "all examples behind half of the first one, which is computed once; each whole, alone "
        "through the plain model"
    )
    if not loss.paths.shares_prefixes:
        return does_not_apply(what, how, "the start-up checks leave this model without them")
    if not alone:
        return does_not_apply(what, how, "the examples are too short to share anything")
    half = len(examples[0].ids) // 2
    whole = _with_a_prefix(examples)
    tokens = [whole[0].ids[:half]]
    weights = [len(whole) * whole[0].weights[:half]]
    parents = [-1]
    for example in whole:
        tokens.append(example.ids[half:])
        weights.append(example.weights[half:])
        parents.append(0)
    pack = tree_pack(tokens, weights, parents)
    apart = _apart(_measured_packs(loss, [pack], machine), _sum(alone))
    return compared(what, how, apart, LIMITS[machine.precision])


def _any_size(
    loss: PackLoss, examples: Sequence[Example], total: Measured, machine: Machine
) -> Finding:
    lengths = [len(example.ids) for example in examples]
    longest = max(lengths)
    sizes = sorted({longest, (longest + sum(lengths)) // 2})
    found: list[dict[str, float]] = []
    for size in sizes:
        ranks = balanced(lengths, size)
        packs = [[examples[i] for i in members] for members in ranks[0]]
        found.append(_apart(_measured(loss, packs, machine), total))
    named = " and ".join(f"{size:,}" for size in sizes)
    how = f"a step cut into packs of {named} tokens; each example alone through the plain model"
    return compared("any pack size", how, _worst(found), LIMITS[machine.precision])


def _any_order(
    loss: PackLoss, examples: Sequence[Example], total: Measured, machine: Machine
) -> Finding:
    shuffled = list(examples)
    random.Random(0).shuffle(shuffled)
    backwards = list(reversed(examples))
    found: list[dict[str, float]] = []
    for order in (backwards, shuffled):
        found.append(_apart(_measured(loss, [order], machine), total))
    how = "the pack reversed, and shuffled; each example alone through the plain model"
    return compared("any order", how, _worst(found), LIMITS[machine.precision])


def _worst(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest of each kind of difference."""
    return {name: max(one[name] for one in found) for name in found[0]}


def _measured(loss: PackLoss, packs: Sequence[Sequence[Example]], machine: Machine) -> Measured:
    """Loss and gradient of a step cut into these packs, by the path that training takes."""
    return _measured_packs(loss, [build_pack(examples) for examples in packs], machine)


def _measured_packs(loss: PackLoss, packs: Sequence[Pack], machine: Machine) -> Measured:
    weight = train_embeddings_only(loss.model)
    weight.grad = None
    total = 0.0
    for pack in packs:
        with machine.autocast():
            value = loss(to_tensors(pack, machine.device))
        value.backward()
        total += float(value.detach())
    assert weight.grad is not None
    return Measured(total, weight.grad.float().cpu())


def _sum(parts: Sequence[Measured]) -> Measured:
    gradients = torch.stack([part.gradient for part in parts])
    return Measured(sum(part.loss for part in parts), gradients.sum(0))


def _apart(ours: Measured, theirs: Measured) -> dict[str, float]:
    """Relative differences: of the loss, and of the gradient (L2)."""
    norm = max(float(theirs.gradient.norm()), 1e-30)
    size = max(abs(theirs.loss), 1e-30)
    difference = ours.gradient - theirs.gradient
    return {
        "loss": abs(ours.loss - theirs.loss) / size,
        "gradient": float(difference.norm()) / norm,
    }
