"""Answers to held-out prompts: batched, padded and cached as one at a time without any of it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from sftx import encode
from sftx.data.tokenizer import Tokenizer
from sftx.eval import generation_memory
from sftx.eval.generate import Prompt, answer, prompt_of

PROMPTS = ["a", "What is the tower made of?", "copper", "seven salt lamps in the morning wind"]


def _one_by_one(model: torch.nn.Module, ids: list[int], stops: set[int], count: int) -> list[int]:
    """The likeliest token again and again, from the whole text each time: no cache, no padding."""
    new: list[int] = []
    while len(new) < count and not (new and new[-1] in stops):
        logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_batches_answer_as_one_prompt_at_a_time_does(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(kind).eval()
    tokenizer = Tokenizer.of(tiny.tokenizer())
    ids = [tokenizer.encode(text) for text in PROMPTS]
    prompts = [Prompt(i, text, "") for i, text in zip(ids, PROMPTS, strict=True)]
    with torch.no_grad():
        free = [_one_by_one(model, i, set(), 12) for i in ids]
        said = sorted({i for new in free for i in new})
        # A token that some answers have and others have not: these end there, those at the limit.
        stop = next(i for i in said if not all(i in new for new in free))
        expected = [_one_by_one(model, i, {stop}, 12) for i in ids]
    monkeypatch.setattr(generation_memory, "TOKENS_PER_BATCH", 96)
    random_numbers = torch.get_rng_state()
    model.train()
    samples = answer(model, tokenizer, prompts, [stop], 12)
    assert model.training
    assert torch.equal(random_numbers, torch.get_rng_state())
    assert [sample.prompt for sample in samples] == PROMPTS
    assert [sample.ids for sample in samples] == expected
    for sample, new in zip(samples, expected, strict=True):
        assert sample.ended == (new[-1] == stop)
        assert sample.output == tokenizer.decode([i for i in new if i != stop])
    assert any(sample.ended for sample in samples)
    assert not all(sample.ended for sample in samples)


def test_little_memory_makes_small_batches_and_the_same_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model().eval()
    tokenizer = Tokenizer.of(tiny.tokenizer())
    prompts = [Prompt(tokenizer.encode(text), text, "") for text in PROMPTS]
    sizes: list[int] = []
    kind: Any = type(model)
    generate = kind.generate

    def watched(self: object, **given: torch.Tensor) -> object:
        sizes.append(len(given["input_ids"]))
        return generate(self, **given)

    monkeypatch.setattr(kind, "generate", watched)
    longest = max(len(prompt.ids) for prompt in prompts)
    of_two = 2 * generation_memory.bytes_of_row(model.config, longest, 8, 4)
    found = [
        answer(model, tokenizer, prompts, [], 8, free=free)
        for free in (None, 1 << 40, int(of_two / generation_memory.SHARE) + 2, 1)
    ]
    assert sizes[:2] == [4, 4]  # all at once
    assert sizes[2] == 2
    assert sizes[-4:] == [1, 1, 1, 1]
    assert all(samples == found[0] for samples in found)


def test_settings_of_the_generation_config_are_those_of_the_answers() -> None:
    model = tiny.model()
    tokenizer = Tokenizer.of(tiny.tokenizer())
    prompts = [Prompt(tokenizer.encode(text), text, "") for text in PROMPTS]
    assert model.generation_config is not None
    greedy = answer(model, tokenizer, prompts, [], 8)
    model.generation_config.do_sample = True
    drawn = [answer(model, tokenizer, prompts, [], 8, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] != greedy


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "yo"},
                ]
            },
            "<|user|>hi<|end|>\n<|assistant|>",
            "yo",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>",
            "d",
        ),
    ],
)
def test_the_prompt_is_what_a_server_sends(
    row: dict[str, object], prompt: str, reference: str
) -> None:
    fast = tiny.tokenizer()
    example = encode(row, fast)[-1]
    found = prompt_of(example, Tokenizer.of(fast), {tiny.SPECIAL.index("<|end|>")})
    assert found is not None
    assert (found.text, found.reference) == (prompt, reference)
    assert found.ids == fast(prompt, add_special_tokens=False)["input_ids"]
