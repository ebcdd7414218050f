"""Check 35: models that compute otherwise beyond a window, a chunk or a position, which a short
probe cannot see.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny
import torch

from scorecard.frame import check, expect
from scorecard.numbers import Gradients, difference, gradients, unequal
from scorecard.runs import facts, records, write_rows

REACH = 40
"""Tokens at which each of the models changes what it does; most rows are longer."""
LENGTHS = (120, 9, 97, 43, 150, 5)
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
CHUNKED = {
    "head_dim": 8,
    "num_local_experts": 4,
    "intermediate_size_mlp": 64,
    "attention_chunk_size": REACH,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "rope_theta": 1e4,
}
MODELS: dict[str, dict[str, Any]] = {
    "attention in chunks": {"family": "Llama4Text", **CHUNKED},
    "temperature by position": {
        "family": "Llama4Text",
        **CHUNKED,
        "attention_chunk_size": 256,
        "floor_scale": REACH,
        "num_hidden_layers": 4,
    },
    "a window of its own": {
        "family": "Qwen2Moe",
        "use_sliding_window": True,
        "sliding_window": REACH,
        "max_window_layers": 2,
        **EXPERTS,
    },
    "rotary embeddings of two lengths": {
        "family": "Phi3",
        "rope_parameters": {**LONG, "original_max_position_embeddings": REACH},
        "original_max_position_embeddings": REACH,
        "pad_token_id": 0,
    },
    "a window that packs keep": {"family": "Mistral", "sliding_window": REACH},
}
PACKED = ("a window that packs keep",)
"""Those that may, and must, stay on the fast way."""


@check(35, "Models that go by length", limit=400)
def by_length(folder: Path) -> str:
    """Rows beyond the reach of windows, chunks, temperatures and positions: loss and gradient of
    float64, alone.

    Packed where that is exact, else one by one with a line that says so.
    """
    rows = [
        {"prompt": f"{i}: ", "completion": "abcdefghijklmnopqrstuvwxyz" * 6}
        for i in range(len(LENGTHS))
    ]
    rows = [
        {**row, "completion": row["completion"][:length]}
        for row, length in zip(rows, LENGTHS, strict=True)
    ]
    path = write_rows(folder / "long.jsonl", rows)
    worst = 0.0
    for number, (name, changes) in enumerate(MODELS.items()):
        model = sharpened(changes)
        model.save_pretrained(folder / f"model {number}")
        tiny.tokenizer(chat=False).save_pretrained(folder / f"model {number}")
        config = unequal(
            folder,
            f"run-{number}",
            model={"path": str(folder / f"model {number}")},
            data={"train": path, "max_length": 200},
            runtime={"tokens_per_pack": 100_000},
        )
        ours = gradients(config)[0]
        loss, theirs = alone(model, rows)
        first = records(config)[0]
        off = abs(first["loss"] / loss - 1)
        apart = difference({key: ours[key] for key in theirs}, theirs)
        worst = max(worst, off, apart)
        expect(
            off <= 5e-6 and apart <= 2e-5,
            f"{name}: loss off by {off:.2g}, gradients by {apart:.2g}",
        )
        slow = any("cannot keep packed segments apart" in note for note in facts(config)["notes"])
        expect(slow == (name not in PACKED), f"{name}: notes {facts(config)['notes']}")
    return f"{len(MODELS)} of {len(MODELS)} models exact beyond {REACH} tokens, worst {worst:.1e}"


def sharpened(changes: dict[str, Any]) -> Any:
    """A tiny model whose attention is far from uniform, so that it matters which keys are seen."""
    model = tiny.model(**changes)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def alone(model: Any, rows: list[dict[str, str]]) -> tuple[float, Gradients]:
    """Mean loss of all targets and its gradient, each row by a model of its own in float64, which
    remembers nothing.
    """
    tokenizer = tiny.tokenizer()
    total, targets = 0.0, 0
    sums: Gradients = {}
    for row in rows:
        twin = copy.deepcopy(model).double()
        if hasattr(twin, "set_experts_implementation"):
            twin.set_experts_implementation("eager")
        prompt, answer = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"]
            for key in ("prompt", "completion")
        )
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        logits = twin(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
        loss.backward()
        total, targets = total + float(loss.detach()), targets + len(answer) + 1
        for name, parameter in twin.named_parameters():
            if parameter.grad is not None:
                sums[f"model.{name}"] = sums.get(f"model.{name}", 0) + parameter.grad
    return total / targets, {name: gradient / targets for name, gradient in sums.items()}
