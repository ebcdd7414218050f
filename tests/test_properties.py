"""Laws that hold for all texts: what is decoded and weighted, and what length handling keeps."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import example as case
from hypothesis import strategies as st
from small_tokenizers import ours, theirs
from test_template import CALLS, CHATML, NO_STOP, REWRITES, TRIMS, encoder, row, turn_by_turn

from sftx.data.encoder import Encoded
from sftx.data.tokenizer import Tokenizer
from sftx.data.truncation import TokenSequence, fit
from sftx.types import Phrase, Row, RowError

# Letters of many scripts, white space, and pieces of the special tokens and tags themselves.
PIECES = [
    "<|im_end|>",
    "</s>",
    "<s>",
    "<|im_start|>",
    "<think>",
    "assistant\n",
    "\n",
    " ",
    "  ",
    "hello",
    "[[",
    "]]",
    "🙂",
]
TEXT = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=8),
    max_size=5,
).map("".join)
WORDS = st.lists(
    st.sampled_from(["the", " dog", " quick", "yes", "\n", " 2+2", "é", "🙂"]), max_size=8
).map("".join)
TALKS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)
KINDS = st.sampled_from(["byte_level", "metaspace"])
ROUNDS = settings(max_examples=60, deadline=None)


transformers_tokenizer = cache(theirs)


def talk(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        m
        for q, a in pairs
        for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
    ]


def encode(made: Any, given_row: Row) -> Encoded:
    result = made.encode([given_row])[0]
    assume(not isinstance(result, RowError))
    return result


def spans(weights: Any) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights != 0, [0]]))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@ROUNDS
@given(TALKS)
def test_decoded_examples_are_the_rendered_text(pairs: list[tuple[str, str]]) -> None:
    made = encoder(CHATML)
    messages = talk(pairs)
    full = "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages
    ).removesuffix("\n")
    result = encode(made, row(messages))
    outputs = [f"{answer}<|im_end|>" for _, answer in pairs]
    found = [
        made.tokenizer.decode(e.ids[a:b]) for e in result.examples for a, b in spans(e.weights)
    ]
    assert found == outputs  # the outputs, each once, and nothing else, carry weight
    assert made.tokenizer.decode(result.examples[-1].ids) == full
    assert all(full.startswith(made.tokenizer.decode(example.ids)) for example in result.examples)


@ROUNDS
@given(TALKS, st.sampled_from([CHATML, REWRITES, NO_STOP]))
def test_prompts_are_tokenised_as_a_server_does(
    pairs: list[tuple[str, str]], template: str
) -> None:
    made, other = encoder(template, special_tokens="allow"), transformers_tokenizer()
    control = made.tokenizer.control
    messages = talk([(control.sub("", user), control.sub("", answer)) for user, answer in pairs])
    assume(not any(control.search(m["content"]) or "think>" in m["content"] for m in messages))
    result = encode(made, row(messages))
    found = [e.ids[:a].tolist() for e in result.examples for a, _ in spans(e.weights)]
    assert found == [
        other.apply_chat_template(
            messages[:t], chat_template=template, add_generation_prompt=True, return_dict=False
        )
        for t in range(1, len(messages), 2)
    ]
    assert all(e.ids[b - 1] == made.stop_id for e in result.examples for _, b in spans(e.weights))


@ROUNDS
@given(TALKS, st.sampled_from([CHATML, REWRITES, TRIMS, NO_STOP]), KINDS)
def test_the_skeleton_changes_nothing(
    pairs: list[tuple[str, str]], template: str, kind: str
) -> None:
    tokenizer = ours(kind)
    short, long = encoder(template, tokenizer=tokenizer), encoder(template, tokenizer=tokenizer)
    turn_by_turn(long)
    rows = [
        row(talk(pairs)),
        row(talk(pairs)),
        row([{"role": "system", "content": "be quick"}, *talk(pairs)]),
    ]
    for a, b in zip(short.encode(rows), long.encode(rows), strict=True):
        assert str(a) == str(b) if isinstance(b, RowError) else _same(a, b)


ARGUMENTS = st.dictionaries(
    st.sampled_from(["city", "n"]), TEXT | st.integers() | st.booleans(), max_size=2
)
STEPS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "call", "tool"]), TEXT, ARGUMENTS),
    min_size=1,
    max_size=7,
)


@ROUNDS
@given(STEPS, KINDS, st.sampled_from(["escape", "allow"]))
def test_the_skeleton_changes_nothing_of_tool_calls(
    steps: list[tuple[str, str, Any]], kind: str, special: str
) -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "description": "", "parameters": {}},
    }
    messages: list[dict[str, Any]] = [{"role": "user", "content": "weather?"}]
    for role, text, arguments in steps:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        calls = {"tool_calls": [call]} if role == "call" else {}
        messages.append({"role": "assistant" if calls else role, "content": text, **calls})
    tokenizer = ours(kind)
    short, long = (encoder(CALLS, tokenizer=tokenizer, special_tokens=special) for _ in range(2))
    turn_by_turn(long)
    short.encode([row(messages[:1], tools=(tool,))])
    given_row = row(messages, tools=(tool,))
    a, b = short.encode([given_row])[0], long.encode([given_row])[0]
    assert str(a) == str(b) if isinstance(b, RowError) else _same(a, b)


def _same(a: Any, b: Any) -> bool:
    pairs = zip(a.examples, b.examples, strict=True)
    return a.notes == b.notes and all(
        x.ids.tolist() == y.ids.tolist()
        and x.weights.tolist() == y.weights.tolist()
        and x.note == y.note
        for x, y in pairs
    )


@ROUNDS
@given(st.lists(TEXT, min_size=1, max_size=5), KINDS)
def test_a_batch_is_its_rows(texts: list[str], kind: str) -> None:
    made = encoder(CHATML, tokenizer=ours(kind))
    rows = [row(talk([(text, text[::-1])])) for text in texts]
    rows += [Row("text", text=text) for text in texts]
    together = made.encode(rows)
    for one, alone in zip(together, (made.encode([r])[0] for r in rows), strict=True):
        assert str(one) == str(alone) if isinstance(alone, RowError) else _same(one, alone)


@ROUNDS
@given(TEXT, KINDS, st.booleans())
def test_text_is_text(text: str, kind: str, adds_bos: bool) -> None:
    tokenizer = ours(kind, adds_bos=adds_bos)
    result = encode(encoder(tokenizer=tokenizer), Row("text", text=text))
    (example,) = result.examples
    begins = adds_bos or text.startswith("<s>")
    body = text.removeprefix("<s>").removesuffix("</s>")
    ids = example.ids.tolist()
    assert ids == [
        *([tokenizer.bos_id] if begins else []),
        *tokenizer.encode(body, plain=True),
        tokenizer.eos_id,
    ]
    assert example.weights.tolist() == [0.0, *[1.0] * (len(ids) - 1)]


SEQUENCES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 12), st.sampled_from([0.0, 0.5, 1.0])), min_size=1
)


def sequence(turns: list[tuple[int, int, float]], bos: bool, context: int | None) -> TokenSequence:
    """Prompts and outputs of these lengths; every token is unique, so each can be found again."""
    weights: list[float] = [0.0] if bos else []
    edges = []
    for prompt, output, weight in turns:
        weights += [0.0] * prompt
        edges.append((len(weights), len(weights) + output))
        weights += [weight] * output
    array = np.array(weights, np.float32)
    array[:1] = 0
    ids = np.arange(100, 100 + len(array), dtype=np.int32)
    ids[:1] = 1 if bos else ids[:1]
    kept = tuple(edge for edge, turn in zip(edges, turns, strict=True) if turn[2] and turn[1])
    bos_id = 1 if bos else None
    return TokenSequence(ids, array, spans=kept, bos=bos_id, begins_with_bos=bos, context=context)


@ROUNDS
@given(SEQUENCES, st.booleans(), st.sampled_from([None, 1]), st.integers(2, 20))
@case([(2, 8, 1.0), (3, 2, 1.0), (1, 5, 1.0)], False, None, 9)
@case([(0, 1, 0.5), (0, 2, 0.5)], False, None, 2)
def test_split_trains_each_target_once_in_its_context(
    turns: list[tuple[int, int, float]], bos: bool, context: int | None, length: int
) -> None:
    whole = sequence(turns, bos, context)
    fitted = fit(whole, length, "split")
    found: dict[int, float] = {}
    for piece in fitted.pieces:
        assert len(piece.ids) <= length
        assert piece.weights[:1].sum() == 0  # something stands before every target
        assert not bos or piece.ids[0] == 1
        body = piece.ids[1:] if bos else piece.ids
        assert (np.diff(body) == 1).all()  # a stretch of the whole, in order
        for token, weight in zip(piece.ids.tolist(), piece.weights.tolist(), strict=True):
            if weight:
                assert token not in found
                found[token] = weight
    assert found == {int(i): float(w) for i, w in zip(whole.ids, whole.weights, strict=True) if w}
    assert fitted.targets_lost == 0
    asked = int(bos)
    for _, end in (
        whole.spans if context is None else ()
    ):  # no answer without its question where both fit
        trained = (
            next(p for p in fitted.pieces if whole.ids[end - 1] in p.ids[p.weights > 0])
            if end > 1
            else None
        )
        if trained is not None and end - asked + bos <= length:
            assert set(whole.ids[asked:end]) <= set(trained.ids)
        asked = end


@ROUNDS
@given(
    SEQUENCES,
    st.booleans(),
    st.integers(2, 20),
    st.sampled_from(["truncate_left", "truncate_right", "drop"]),
)
def test_truncation_loses_only_what_it_says(
    turns: list[tuple[int, int, float]], bos: bool, length: int, how: Any
) -> None:
    whole = sequence(turns, bos, None)
    fitted = fit(whole, length, how)
    kept = sum(piece.targets for piece in fitted.pieces)
    assert kept + fitted.targets_lost == whole.targets
    if not fitted.pieces:
        assert fitted.tokens_lost == len(whole.ids)
    if len(whole.ids) <= length:
        assert fitted.pieces == [whole]
        return
    with pytest.raises(RowError, match="max_length"):
        fit(whole, length, "error")
    for piece in fitted.pieces:
        assert len(piece.ids) + fitted.tokens_lost == len(whole.ids)
        expected = (
            whole.ids[:length]
            if how == "truncate_right"
            else whole.ids[len(whole.ids) - length + bos :]
        )
        assert (
            piece.ids.tolist()
            == ([1] if bos and how == "truncate_left" else []) + expected.tolist()
        )


@ROUNDS
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.integers(4, 40), st.booleans())
def test_a_cut_answer_never_ends_in_a_stop_token_it_did_not_reach(
    pairs: list[tuple[str, str]], length: int, left: bool
) -> None:
    how = "truncate_left" if left else "truncate_right"
    whole = encode(encoder(CHATML), row(talk(pairs)))
    assume(len(whole.examples) == 1)
    cut = encode(encoder(CHATML, length=length, too_long=how), row(talk(pairs)))
    tokens = whole.examples[0].ids.tolist()
    for example in cut.examples:
        ids = example.ids.tolist()
        assert ids == (tokens[-len(ids) :] if left else tokens[: len(ids)])
    assert cut.targets_truncated == whole.examples[0].targets - sum(e.targets for e in cut.examples)


def published_dialogue(
    phrases: list[str], tokenizer: Tokenizer, max_length: int, side: str
) -> list[tuple[int, bool]]:
    """The tokens of a dialogue and whether each is an output, by the rules that trlx documents and
    tests.

    Each phrase is tokenised alone; EOS ends the last; the dialogue is cut to `max_length` from
    `side`; if what is left begins with an output, BOS comes first, at the cost of one more token
    where there is no room.
    """
    last = phrases[-1] if phrases[-1].endswith("</s>") else phrases[-1] + "</s>"
    tokens = [
        (token, bool(i % 2))
        for i, text in enumerate([*phrases[:-1], last])
        for token in tokenizer.encode(text)
    ]
    tokens = tokens[-max_length:] if side == "left" else tokens[:max_length]
    if tokens[0][1]:
        if len(tokens) == max_length:
            tokens = tokens[1:] if side == "left" else tokens[:-1]
        assert tokenizer.bos_id is not None
        tokens = [(tokenizer.bos_id, False), *tokens]
    return tokens


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    st.integers(2, 30),
    st.booleans(),
    KINDS,
    st.booleans(),
)
def test_phrases_are_what_trlx_publishes(
    pairs: list[tuple[str, str]], length: int, left: bool, kind: str, ends: bool
) -> None:
    phrases = [text for pair in pairs for text in pair]
    phrases[-1] += "</s>" if ends else ""
    tokenizer = ours(kind)
    expected = published_dialogue(phrases, tokenizer, length, "left" if left else "right")
    parts = tuple(Phrase(text, float(i % 2)) for i, text in enumerate(phrases))
    made = encoder(
        "none",
        length=length,
        tokenizer=tokenizer,
        too_long="truncate_left" if left else "truncate_right",
    )
    result = made.encode([Row("phrases", phrases=parts)])[0]
    if not any(
        output for _, output in expected[1:]
    ):  # nothing left to learn: dropped, where trlx trains on nothing
        assert isinstance(result, RowError) or result.action == "dropped"
        return
    assert isinstance(result, Encoded)
    (example,) = result.examples
    assert example.ids.tolist() == [token for token, _ in expected]
    assert example.weights.tolist() == [float(output) for _, output in expected]
