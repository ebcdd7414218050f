"""What `gpu.py` prints of its figures.

MFU = F / (seconds x peak), F per step, dense bf16 peak, nothing counted for padding or
recomputation:

    full: F = 6 N_body T + 6 N_head M + 6 L h_q sum(s^2)
    LoRA: F = 4 N_body T + 4 N_head M + 6 L h_q sum(s^2) + 6 N_lora T

(T tokens, M targets, s lengths of segments, L layers, h_q = heads x head size; causal attention
counts half of s^2).
"""

from __future__ import annotations

from typing import Any

from peers import SHAPES

# The first that the name of the device holds; of "H100" and "H200" the boards with SXM sockets
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def line(figures: dict[str, Any], device: dict[str, Any], known_peak: float | None) -> str:
    """One row of the table; adds what is derived to `figures`."""
    if "wall" not in figures:
        errors = [entry["error"].strip()[-160:] for entry in figures["failed"]]
        return f"{figures['name']:44} {'; then '.join(errors) or 'no time left'}"
    per_second = 1 / figures["wall"]
    name = device.get("name", "")
    peak = known_peak or next((value for key, value in PEAKS.items() if key in name), 0.0)
    figures["tokens_per_second"] = figures["tokens"] * per_second
    figures["targets_per_second"] = figures["targets"] * per_second
    mfu = flops(figures) * per_second / peak if peak else None
    figures["mfu"] = mfu
    share = "    - " if mfu is None else f"{100 * mfu:5.1f} %"
    predicted = ""
    if figures.get("predicted"):
        predicted = f" ({figures['predicted'] / 2**30:.1f} predicted)"
    speed = (
        f"{figures['tokens_per_second']:9.0f} tok/s {figures['targets_per_second']:9.0f} "
        f"targets/s MFU {share}"
    )
    return (
        f"{figures['name']:44} {speed} {figures['peak'] / 2**30:6.1f} GiB{predicted}  "
        f"loss {figures['loss']:.5f}  {figures['setup']}\n    {time_shares(figures)}"
    )


def time_shares(figures: dict[str, Any]) -> str:
    """Where the time of one step went, in words."""
    profile = figures.get("profile") or {}
    if "shares" not in profile:
        return "no profile"
    return ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in profile["shares"].items())


def flops(figures: dict[str, Any]) -> float:
    """F of the module's formula for one step."""
    s = SHAPES[figures["shape"]]
    head = s.get("head_dim", s["hidden_size"] // s["num_attention_heads"])
    q, kv, h, i = (
        s["num_attention_heads"] * head,
        s["num_key_value_heads"] * head,
        s["hidden_size"],
        s["intermediate_size"],
    )
    layers = s["num_hidden_layers"]
    body = layers * (2 * h * q + 2 * h * kv + 3 * h * i)
    low_rank = (
        layers * 16 * (2 * (h + q) + 2 * (h + kv) + 3 * (h + i))
    )  # rank 16 on all linear layers
    whole = figures["method"] in ("full", "bf16_stochastic")
    factor, added = (6, 0) if whole else (4, 6 * low_rank)
    dense = (factor * body + added) * figures["tokens"] + factor * h * s["vocab_size"] * figures[
        "targets"
    ]
    return dense + 6 * layers * q * figures["squares"]


def summary(done: list[dict[str, Any]], smoke: bool) -> None:
    """The last line: tokens per second of the wanted shapes, and the least ratios to the best cells
    of TRL and of Unsloth.
    """
    best: dict[str, float] = {}
    ratios: dict[str, list[float]] = {"trl": [], "unsloth": []}
    for cell in {(c["shape"], c["method"], c["pack"]) for c in done}:
        speed = {
            c["system"]: c["tokens_per_second"]
            for c in done
            if (c["shape"], c["method"], c["pack"]) == cell and "tokens_per_second" in c
        }
        if "sftx" not in speed:
            continue
        name = cell[0] + ("" if cell[1] == "full" else f"-{cell[1]}")
        best[name] = max(best.get(name, 0.0), speed["sftx"])
        for peer, found in ratios.items():
            theirs = [value for system, value in speed.items() if system.startswith(peer)]
            found += [speed["sftx"] / max(theirs)] if theirs else []
    wanted = sorted(best) if smoke else ["qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b-lora"]
    shown = [f"{name}={best[name]:.0f}" if name in best else f"{name}=none" for name in wanted]
    shown += [f"vs_{peer}={min(r):.2f}" if r else f"vs_{peer}=none" for peer, r in ratios.items()]
    print("gpu " + " ".join(shown))
