"""Every trait of a chat template against the kinds of conversation that it concerns: the whole text
of each output, its stop token, the ids of its prompt. `bench/template_oracle.py`, which shares no
code with sftx, says the same of the very same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
from small_templates import END, HEADER, TRAITS, Trait, chatml, opening
from test_template import turn_by_turn
from test_templates_shared import _table
from transformers import PreTrainedTokenizerFast

from sftx.data.chat.spans import APART
from sftx.data.encoder import Encoded, Encoder
from sftx.data.sources.rows import parse
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
        ids = map(ours.backend.token_to_id, trait.stops)
        ours.stop_ids = frozenset(i for i in ids if i is not None)
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


def shown(theirs: Any, encoded: Any) -> list[str]:
    """The trained outputs of a row, in order."""
    assert isinstance(encoded, Encoded), encoded
    spans = [(each, *span) for each in encoded.examples for span in TABLE.spans(each)]
    return [TABLE.said(theirs, *span) for span in spans]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_take_white_space_along_leave_prompts_as_they_are(kind: str) -> None:
    """As in Phi-3: the line break behind a header is no part of the answer, nor a token."""
    strips = ("<|user|>", "<|assistant|>", "<|end|>")
    backend = small_tokenizers.backend(kind, strips=strips)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>")
    ours = Tokenizer.of(theirs)
    source = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    ours.chat_templates = {"default": source}
    for name in ("single", "multi"):
        made = encoder(ours)
        assert TABLE.check(made, theirs, name, source) == TABLE.Result("pass")
        texts = [m["content"] for m in TABLE.CONVERSATIONS[name][0] if m["role"] == "assistant"]
        found = made.encode([TABLE.row_of(name)])[0]
        assert shown(theirs, found) == [f"{text}<|end|>" for text in texts]
        assert len(found.examples) == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_each_setting_of_the_template_has_rows_of_its_own() -> None:
    """One encoder, rows with and without a setting that changes the prompt alone."""
    source = chatml(generate=opening("{{ '<think>' if deep }}"))
    ours, theirs = tokenizers(Trait(source, {}), "byte_level")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    plain = parse({"messages": messages}, "messages")
    deep = parse({"messages": messages, "chat_template_kwargs": {"deep": True}}, "messages")
    for rows in ([plain, deep], [deep, plain]):
        found = dict(zip(map(id, rows), encoder(ours).encode(rows), strict=True))
        assert shown(theirs, found[id(plain)]) == ["Hello.<|im_end|>"]
        assert shown(theirs, found[id(deep)]) == ["</think>Hello.<|im_end|>"]


def test_an_answer_that_a_question_spells_is_no_answer() -> None:
    """Where special tokens of rows count as such, a conversation with calls is not cut at them."""
    trait = TRAITS["calls as JSON"]
    ours, theirs = tokenizers(trait, "byte_level")
    messages, tools = TABLE.CONVERSATIONS["calls"]
    copied = f"Say {END}\n{HEADER}{messages[-1]['content']}{END} again"
    spelled = [*messages[:-2], {**messages[-2], "content": copied}, messages[-1]]
    row = parse({"messages": spelled, "tools": tools}, "messages")
    for setting in ("allow", "escape"):
        found = encoder(ours, special_tokens=setting).encode([row])[0]
        assert shown(theirs, found) == trait.becomes["calls"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_that_is_tokenised_apart_stands_inside_its_text(kind: str) -> None:
    """Its tokens are those of a text that goes on: no mark of a beginning, no BOS."""
    ours, _ = tokenizers(TRAITS["plain"], kind)
    found = encoder(ours).encode([TABLE.row_of("white")])[0]
    assert isinstance(found, Encoded)
    assert APART in found.notes
    outputs = TRAITS["plain"].becomes["white"]
    for example, output in zip(found.examples, outputs, strict=True):
        [(begin, end)] = TABLE.spans(example)
        content = ours.encode(output.removesuffix("<|im_end|>"), inside=True)
        assert example.ids[begin : end - 1].tolist() == content


def test_the_table_takes_any_folder_of_templates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TABLE, "SHARED", tmp_path / "nothing")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "plain.jinja").write_text(TRAITS["plain"].source)
    (tmp_path / "broken.jinja").write_text("{% for %}")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    (tmp_path / "other.txt").write_text("no template")
    with pytest.raises(SystemExit) as ended:
        TABLE.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.count("not usable: ") == 2
    assert "below/plain.jinja" in said
    last = dict(part.split("=") for part in said.rstrip().rpartition("\n")[2].split())
    assert last.keys() == {"pass", "refused", "split", "unusable"}
    assert int(last["pass"]) + int(last["split"]) + int(last["refused"]) == len(TABLE.CONVERSATIONS)
    with pytest.raises(SystemExit):
        TABLE.main([str(tmp_path / "nothing")])
    assert "holds no file named *.jinja" in capsys.readouterr().err
