"""Every trait of a chat template against the kinds of conversation that it concerns: the whole text
of each output, its stop token, the ids of its prompt. `bench/template_oracle.py`, which shares no
code with sftx, says the same of the very same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import small_tokenizers
from small_templates import TRAITS, Trait
from test_template import turn_by_turn
from test_templates_shared import _table
from transformers import PreTrainedTokenizerFast

from sftx.data.chat.spans import APART
from sftx.data.encoder import Encoded, Encoder
from sftx.data.tokenizer import Tokenizer
from sftx.settings.schema import Data
from sftx.types import ONE_EACH, RowError

TABLE = _table()
UNANSWERED = "turns after the last output left out"
KINDS = ("byte_level", "metaspace")


def tokenizers(trait: Trait, kind: str) -> tuple[Tokenizer, Any]:
    """A small tokenizer with this trait's template: ours, and as transformers has it."""
    special = {"bos_token": "<s>", "eos_token": "</s>", **trait.special}
    named = {name: token for name, token in special.items() if token}
    theirs = PreTrainedTokenizerFast(tokenizer_object=small_tokenizers.backend(kind), **named)
    ours = Tokenizer.of(theirs)
    ours.chat_templates = {"default": trait.source}
    if trait.tool_use:
        ours.chat_templates["tool_use"] = trait.tool_use
    if trait.stops:
        ours.stop_ids = frozenset(theirs.convert_tokens_to_ids(list(trait.stops)))
    return ours, theirs


def encoder(ours: Tokenizer, **data: Any) -> Encoder:
    return Encoder(ours, Data(template="auto", **data), 4096)


def source_for(trait: Trait, name: str) -> str:
    """The template that a conversation is written with."""
    has_tools = bool(TABLE.CONVERSATIONS[name][1])
    return trait.tool_use if has_tools and trait.tool_use else trait.source


def cases() -> Iterator[Any]:
    for trait, told in TRAITS.items():
        for name in told.becomes:
            yield pytest.param(told, name, id=f"{trait}-{name}")


@pytest.mark.parametrize(("trait", "name"), list(cases()))
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_whole_and_end_in_the_stop_token(kind: str, trait: Trait, name: str) -> None:
    ours, theirs = tokenizers(trait, kind)
    made = encoder(ours)
    expected = trait.becomes[name]
    found = made.encode([TABLE.row_of(name)])[0]
    if isinstance(expected, str):
        assert isinstance(found, RowError)
        assert expected in str(found)
        return
    assert isinstance(found, Encoded), found
    spans = [(each, begin, end) for each in found.examples for begin, end in TABLE.spans(each)]
    assert [TABLE.said(theirs, *span) for span in spans] == expected
    assert {int(each.ids[end - 1]) for each, _, end in spans} <= made.stop_ids
    if APART in found.notes:  # a token of this tokenizer would lie across a border
        assert len(found.examples) > 1 or len(spans) == 1
    else:
        assert len(found.examples) == trait.sequences.get(name, 1)
    kept = [note for note in found.notes if note not in (APART, ONE_EACH, UNANSWERED)]
    assert "; ".join(kept) == trait.notes.get(name, "")


@pytest.mark.parametrize("name", TRAITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_says_the_same(kind: str, name: str) -> None:
    trait = TRAITS[name]
    ours, theirs = tokenizers(trait, kind)
    made = encoder(ours)
    wrong = {
        talk: TABLE.check(made, theirs, talk, source_for(trait, talk)).wrong
        for talk in TABLE.CONVERSATIONS
    }
    assert {talk: found for talk, found in wrong.items() if found} == {}


@pytest.mark.parametrize("name", TRAITS)
def test_no_row_depends_on_another_or_on_the_way_it_is_encoded(name: str) -> None:
    """In any order, and turn by turn instead of from one rendering: the same result."""
    ours, _ = tokenizers(TRAITS[name], "byte_level")
    rows = [TABLE.row_of(talk) for talk in TABLE.CONVERSATIONS]
    forward = [TABLE._state(each) for each in encoder(ours).encode(rows)]
    backward = [TABLE._state(each) for each in encoder(ours).encode(rows[::-1])]
    assert backward[::-1] == forward
    slowly = [TABLE._state(each) for each in turn_by_turn(encoder(ours)).encode(rows)]
    assert slowly == forward
