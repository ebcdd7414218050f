"""The plan of a run in words, as `sftx plan` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sftx.settings.schema import Config

MANY = 4096  # GPUs; more are not looked at


def plan_lines(facts: dict[str, Any], config: Config) -> Iterator[str]:
    """The plan in words."""
    yield from _model_lines(facts, config)
    if "steps" in facts:
        yield (
            f"data     {facts['steps']:,} steps, {facts['tokens']:,} tokens, "
            f"{facts['targets']:,} targets"
        )
    if facts.get("memory"):
        yield from _memory_lines(facts)
        if facts["answers"]:
            yield from _answer_lines(facts)
    yield from _lines_of_sharing(facts)
    if facts.get("seconds"):
        yield (
            f"time     about {facts['seconds']:,.0f} s for all steps, while nothing else runs "
            "on this machine"
        )
    if "gpus_needed" in facts:
        yield from _gpu_lines(facts)
    yield from (f"note     {note}" for note in facts.get("notes", []))
    if "refused" in facts:
        yield f"refused  {facts['refused']}"


def _gpu_lines(facts: dict[str, Any]) -> Iterator[str]:
    """How many GPUs are needed, and the longest example for which those of the plan do."""
    needed = facts["gpus_needed"] or f"more than {MANY}"
    yield f"GPUs     {needed} of this size are needed at least"
    longest = facts["longest_that_fits"]
    said = f"of {longest:,} tokens" if longest else "of less than 1,024 tokens"
    size = facts["context_parallel"]
    gpus = "1 GPU" if size == 1 else f"{size} GPUs"
    yield f"longest  an example {said} fits, with {gpus} to each pack"


def _model_lines(facts: dict[str, Any], config: Config) -> Iterator[str]:
    """What trains, and how it is kept."""
    method = config.adapter.method
    kind = "all weights" if method == "none" else f"a {method} adapter"
    trained = facts["trainable"]
    weights = facts["weights"]
    yield (
        f"model    {weights:,} parameters, {trained:,} train ({kind}), {facts['precision']} "
        f"on {facts['device']}"
    )
    if facts.get("adapter"):
        yield f"adapter  {facts['adapter']}"
    kept = "float32" if config.optim.weights == "fp32" else "bfloat16, rounded at random"
    if config.adapter.quantize == "nf4":
        kept += ", those of the base in 4 bits"
    yield (
        f"kept     weights in {kept}; AdamW's two moments in float32; peak learning rate "
        f"{facts['learning_rate']:g}"
    )


def _memory_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The packs, and what a step with them needs."""
    fill = f", {100 * facts['fill']:.0f} % full" if "fill" in facts else ""
    if "padding" in facts:
        fill = (
            f" at most, padded in batches of like lengths, {100 * facts['padding']:.1f} % padding"
        )
    shared = ""
    if facts["context_parallel"] > 1:
        shared = f", each shared by {facts['context_parallel']} GPUs"
    yield (
        f"packs    {facts['tokens_per_pack']:,} tokens{shared}{fill}; "
        f"{facts['recomputed_layers']} of {facts['layers']} layers recomputed"
    )
    owner = "each GPU" if facts.get("gpus_needed") else "the process"
    yield f"memory   {owner} at the peak of a step, in GiB"
    for name, size in facts["memory"].items():
        yield f"         {name:12}{size / 2**30:9.2f}"
    yield f"         {'available':12}{facts['memory_at_hand'] / 2**30:9.2f}"


def _answer_lines(facts: dict[str, Any]) -> Iterator[str]:
    """What answering takes, and whether it fits where a step has done its work."""
    answers = facts["answers"]
    memory = facts["memory"]
    kept = sum(memory[name] for name in ("weights", "optimizer", "allocator", "base"))
    size = answers / 2**30
    room = (facts["memory_at_hand"] - kept) / 2**30
    yield f"answers  up to {size:.2f} GiB of keys, values and logits, while no step is taken"
    if size > room:
        yield (
            f"warning  {max(room, 0):.2f} GiB are left for them: fewer prompts are answered at once; "
            "ask fewer eval.prompts, or take fewer eval.new_tokens, where one has no room"
        )


def _lines_of_sharing(facts: dict[str, Any]) -> Iterator[str]:
    """What shared prefixes save, and the largest tree of the first step."""
    found = facts.get("shared_prefixes")
    if not found:
        return
    seconds = ""
    if facts.get("seconds") and found["seconds_without"]:
        seconds = f"; without, about {found['seconds_without']:,.0f} s for all steps"
    yield (
        f"prefixes are computed once: {found['tokens']:.0%} of the tokens and {found['flops']:.0%} "
        f"of the FLOPs are saved{seconds}"
    )
    yield from (f"         {line}" for line in facts["tree"])
