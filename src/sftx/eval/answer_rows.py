"""Answers as rows that `sftx train` reads: the conversation before an answer, the answer, its weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from sftx.data.chat.conversation import ChatMessage, as_read, conversation_of
from sftx.data.chat.tag_stream import tag_at_start
from sftx.data.chat.thoughts import close_tag, open_tag
from sftx.data.dataset import TURNS
from sftx.data.encoder import Encoded, Encoder
from sftx.data.sources.rows import parse
from sftx.data.sources.tables import Table
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import raw_tables, read_rows
from sftx.eval.call_forms import form_of, read_calls, template_of
from sftx.eval.generate import Prompt, Sample, prompt_of
from sftx.settings.schema import Config
from sftx.types import Json, Row, RowError, UserError


@dataclass
class AnswerRows:
    """The rows that were made, and why answers are in none of them."""

    rows: list[dict[str, Json]] = field(default_factory=list[dict[str, Json]])
    answers: int = 0  # in these rows; equal answers to a prompt share one
    left_out: Counter[str] = field(default_factory=Counter[str])

    def summary(self) -> str:
        """One line: what became of every answer."""
        parts = [f"{self.answers:,} answers in {len(self.rows):,} rows"]
        parts += [f"{count:,} left out: {why}" for why, count in self.left_out.items()]
        return "; ".join(parts)


def check_turns(corpus: Corpus) -> None:
    """UserError where rows of the data are no turns: an answer to them is no row."""
    for origin in corpus.origins:
        if origin.form not in TURNS:
            raise UserError(
                f"sftx eval rows=: {origin.name} ({origin.form}) holds no turns, so answers to it "
                "cannot be written as rows of messages"
            )


def answer_rows(
    config: Config,
    encoder: Encoder,
    corpus: Corpus,
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    weights: Sequence[float],
) -> AnswerRows:
    """Rows of messages of the answers `samples` to `prompts` (of `corpus`), each trained with its
    weight. Equal answers to a prompt become one row, with the sum of their weights.

    Left out are answers of weight 0, those that were cut at the length limit, and those that the
    chat template would write otherwise than the model did: every row that is made was encoded, and
    gives the prompt that was asked and the text that was answered.
    """
    made = AnswerRows()
    writer = _Writer(encoder)
    by_row: dict[tuple[int, str], dict[str, Json]] = {}
    with raw_tables(config) as tables:
        for prompt, sample, weight in zip(prompts, samples, weights, strict=True):
            if not sample.ended:
                made.left_out["cut at new_tokens"] += 1
                continue
            if not weight:
                made.left_out["weight 0"] += 1
                continue
            key = (prompt.number, sample.output)
            row = by_row.get(key)
            if row is None:
                row = writer.row(_row_at(tables, corpus, prompt.number), prompt, sample)
            if row is None:
                made.left_out["the chat template writes them otherwise"] += 1
                continue
            made.answers += 1
            if key not in by_row:
                by_row[key] = row
                made.rows.append(row)
                row["weight"] = 0.0
            total = row["weight"]
            assert isinstance(total, float)
            row["weight"] = total + weight
    return made


def _row_at(tables: Sequence[Table], corpus: Corpus, number: int) -> Row:
    """The row that an example of the corpus came from."""
    entry = corpus.table[number]
    table = tables[int(entry["origin"])]
    _, row = next(read_rows(table, int(entry["line"])))
    assert isinstance(row, Row), "it was encoded before"
    return row


class _Writer:
    """Writes an answer to a row as a row."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def row(self, row: Row, prompt: Prompt, sample: Sample) -> dict[str, Json] | None:
        """The row in which the answer follows what was asked; None where there is none that is
        encoded so.
        """
        conversation = conversation_of(row, self._encoder.data.train_on)
        for turn in reversed(conversation.trained):
            before = [_context(message) for message in conversation.messages[:turn]]
            for answer in self._answers(row, prompt, sample):
                made: dict[str, Json] = {"messages": [*before, answer]}
                if row.tools:
                    made["tools"] = list(row.tools)
                if row.template_kwargs:
                    made["chat_template_kwargs"] = row.template_kwargs
                if self._gives(made, prompt, sample):
                    return made
        return None

    def _answers(self, row: Row, prompt: Prompt, sample: Sample) -> Iterator[dict[str, Json]]:
        """The messages that an answer may be: with its thought and its calls apart, and as it is."""
        thought, content = _apart(prompt.text, sample.output)
        message: dict[str, Json] = {"role": "assistant", "content": content}
        if thought:
            message["reasoning_content"] = thought
        if row.tools and self._call_template:
            said, calls = read_calls(content, self._call_template, list(row.tools))
            functions: list[Json] = []
            for name, arguments in calls:
                function: Json = {"name": name, "arguments": arguments}
                functions.append({"type": "function", "function": function})
            if functions:
                yield {**message, "content": said, "tool_calls": functions}
        yield message
        if thought:
            yield {"role": "assistant", "content": sample.output}

    @cached_property
    def _call_template(self) -> dict[str, Any] | None:
        """How the chat template writes calls; None where that is not known."""
        if self._encoder.chat_template is None:
            return None
        form = form_of(self._encoder.template(with_tools=True))
        return template_of(form) if form else None

    def _gives(self, made: dict[str, Json], prompt: Prompt, sample: Sample) -> bool:
        """Whether a row is encoded as the prompt that was asked and the answer: the same tokens, or
        others that are the same text.
        """
        try:
            (encoded,) = self._encoder.encode([parse(made, "messages")])
        except RowError:
            return False
        if not isinstance(encoded, Encoded) or not encoded.examples:
            return False
        tokenizer = self._encoder.tokenizer
        example = encoded.examples[-1]
        wanted = prompt.ids + sample.ids
        if example.ids[: len(wanted)].tolist() == wanted:
            return True
        if tokenizer.control_ids & {*sample.ids[:-1]}:
            return False  # a special token that the model said would be trained as text
        found = prompt_of(example, tokenizer, self._encoder.stop_ids)
        if found is None:
            return False
        return found.ids == prompt.ids and found.reference == sample.output


def _context(message: ChatMessage) -> dict[str, Json]:
    """A message before the answer, of which nothing is trained."""
    read = cast("dict[str, Json]", dict(as_read(message)))
    for name in ("thinking", "reasoning"):
        read.pop(name, None)
    if read["role"] == "assistant":
        read["train"] = False
    return read


def _apart(prompt: str, output: str) -> tuple[str, str]:
    """(thought, content) of an answer; the thought is one that the prompt opens, or that stands at
    its beginning.
    """
    tag = open_tag(prompt)
    inside = output
    if not tag:
        inside = output.lstrip()
        tag = tag_at_start(inside)
        inside = inside[len(tag) :]
    if not tag:
        return "", output
    thought, closing, content = inside.partition(close_tag(tag))
    if not closing:
        return "", output
    return thought.strip(), content.lstrip()


def as_lines(made: AnswerRows) -> str:
    """The rows as JSON lines."""
    text = ""
    for row in made.rows:
        text += json.dumps(row, ensure_ascii=False) + "\n"
    return text
