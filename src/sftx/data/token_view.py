"""Examples as a person reads them: every token with its text, its weight, and its row's place."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from tokenizers.decoders import DecodeStream

from sftx.data.chat.conversation import conversation_of
from sftx.data.chat.limits import watched
from sftx.data.encoder import Encoder
from sftx.data.oversize import check_size
from sftx.data.prefixes import segments_of, summed_weights
from sftx.data.shared_packs import Members
from sftx.data.sources.rows import parse
from sftx.data.sources.tables import Table, named_sources, open_tables
from sftx.data.store.cache import Cache
from sftx.data.tokenizer import Tokenizer
from sftx.settings.schema import Config
from sftx.types import Example, Row, RowError, UserError, joined_notes


@dataclass(frozen=True, slots=True)
class View:
    """One example with the text of each token; joined, the texts are the example's text.

    A token that is only part of a character has no text; the token that completes the character has
    it.
    """

    place: str
    note: str
    part: int
    ids: list[int]
    weights: list[float]
    texts: list[str]
    special: list[bool]
    shortened: bool = False
    """Whether something of the prompt is gone, because the row was too long."""
    prompt: str = ""
    """What a server would send to get the last output of the row; empty where there are no turns.
    """
    spelled: list[bool] = field(default_factory=list[bool])
    """Tokens of ordinary text that spell a special token together (`data.special_tokens: escape`).
    """
    start: int = 0
    """The position of the first token: what stands before it is shared with others, and shown
    before them.
    """
    depth: int = 0
    """How many shared pieces stand before it."""
    examples: int = 1
    """How many examples hold these tokens; their weights are added up."""

    @property
    def targets(self) -> int:
        """Tokens that carry weight."""
        return sum(weight != 0 for weight in self.weights)

    def begins_spelling(self, index: int) -> bool:
        """Whether a text that spells a special token begins with this token."""
        if index > 0 and self.spelled[index - 1]:
            return False
        return self.spelled[index]


def view(
    example: Example, tokenizer: Tokenizer, place: str, lost: int = 0, prompt: str = ""
) -> View:
    """An example with the text of each of its tokens. `lost`: tokens of its row that no example
    holds.
    """
    notes = [example.note] if example.note else []
    if example.shortened:
        notes.append("prompt shortened")
    if lost:
        notes.append(f"{lost:,} tokens of the row cut off")
    stream = DecodeStream(skip_special_tokens=False)
    ids = example.ids.tolist()
    texts = [stream.step(tokenizer.backend, token) or "" for token in ids]
    special = [token in tokenizer.control_ids for token in ids]
    return View(
        place=place,
        note="; ".join(notes),
        part=example.part,
        ids=ids,
        weights=example.weights.tolist(),
        texts=texts,
        special=special,
        shortened=example.shortened,
        prompt=prompt,
        spelled=_spelled(texts, special, tokenizer),
    )


def views_of_pack(
    members: Members,
    read: Callable[[int], Example],
    place_of: Callable[[int], str],
    tokenizer: Tokenizer,
    name: str,
) -> list[View]:
    """The pack called `name`, segment by segment: what examples share once, before its branches."""
    examples = [read(i) for i in members.examples]
    lengths = [len(example.ids) for example in examples]
    views: list[View] = []
    for s in segments_of(lengths, members.shared or [0] * len(lengths)):
        count = s.last - s.first
        place = place_of(members.examples[s.first])
        note = ""
        if count > 1:
            place = f"{count} examples begin alike, the first: {place}"
            ended = lengths[s.first : s.last].count(s.stop)
            if ended:
                note = f"{ended} end here"
        place = f"{name}: {place}"
        depth = 0
        if s.parent >= 0:
            depth = views[s.parent].depth + 1
        whole = view(examples[s.first], tokenizer, place)
        views.append(
            replace(
                whole,
                note=joined_notes(whole.note, note),
                ids=whole.ids[s.start : s.stop],
                weights=summed_weights(examples, s).tolist(),
                texts=whole.texts[s.start : s.stop],
                special=whole.special[s.start : s.stop],
                spelled=whole.spelled[s.start : s.stop],
                start=s.start,
                depth=depth,
                examples=count,
            )
        )
    return views


def _spelled(texts: list[str], special: list[bool], tokenizer: Tokenizer) -> list[bool]:
    """Which tokens, not special themselves, write letters of a special token."""
    text = "".join(texts)
    inside = np.zeros(len(text), np.bool_)
    for match in tokenizer.control.finditer(text):
        inside[match.start() : match.end()] = True
    spelled: list[bool] = []
    stop = 0
    for letters, is_special in zip(texts, special, strict=True):
        start = stop
        stop += len(letters)
        spells = bool(inside[start:stop].any())
        spelled.append(spells and not is_special)
    return spelled


@contextmanager
def raw_tables(config: Config) -> Generator[list[Table]]:
    """All files of the run, training and held out, read but not encoded."""
    data = config.data
    cache = Cache(data.cache)
    train = named_sources(data.train, data.rows)
    held = named_sources(data.eval, data.eval_rows)
    with cache.scratch() as scratch:
        tables = open_tables(train, data.rows, data, cache, scratch)
        held_out = open_tables(held, data.eval_rows, data, cache, scratch)
        tables += [replace(table, held_out=True) for table in held_out]
        for table in tables:
            table.open_lines(scratch)
        yield tables


def read_rows(table: Table, line: int = 1) -> Iterator[tuple[int, Row | RowError]]:
    """(line, parsed row or what is wrong with it) from `line` on, without reading what stands
    before its block.
    """
    assert table.lines is not None
    first = 0
    for i, block in enumerate(table.blocks):
        if block.line <= line:
            first = i
    for number, _, value in table.rows(table.lines.parent, first):
        if number < line:
            continue
        try:
            if isinstance(value, RowError):
                raise value
            yield number, parse(value, table.form)
        except RowError as error:
            yield number, error


def views_of_rows(
    tables: Sequence[Table],
    encoder: Encoder,
    line: int | None = None,
    file: str = "",
    count: int = 1,
) -> list[View]:
    """Views of `count` rows of a file from `line` on (or the first rows), encoded here and now.

    Raises:
        UserError: there is no such file or row, or a row of them is wrong.
    """
    table = _table_of(tables, file)
    start = line or 1
    if file in table.origin.names:  # plain texts, each of them one row of the table
        start += table.origin.names.index(file)
    found = list(islice(read_rows(table, start), count))
    if not found or (line is not None and found[0][0] != start):
        raise UserError(f"{table.origin.place(start)}: there is no row here")
    views: list[View] = []
    for number, row in found:
        views += _views_of_row(row, encoder, table.origin.place(number))
    return views


def _table_of(tables: Sequence[Table], file: str) -> Table:
    """The table of the file of this name, or the first one."""
    if not tables:
        raise UserError("data.train: nothing to train on is given")
    for table in tables:
        if not file or file in (table.origin.name, *table.origin.names):
            return table
    known = ", ".join(table.origin.name for table in tables[:5])
    more = ", ..." if len(tables) > 5 else ""
    raise UserError(f"no file called {file!r} in the data; known: {known}{more}")


def _views_of_row(row: Row | RowError, encoder: Encoder, place: str) -> list[View]:
    try:
        if isinstance(row, RowError):
            raise row
        check_size(row, encoder.tokenizer)
        encoded = encoder.encode([row])[0]
        if isinstance(encoded, RowError):
            raise encoded
    except RowError as error:
        raise UserError(f"{place}: {error}") from None
    if not encoded.examples:
        raise UserError(f"{place}: the row is dropped: {encoded.reason}")
    prompt = _last_prompt(row, encoder)
    lost = encoded.tokens_truncated
    return [view(example, encoder.tokenizer, place, lost, prompt) for example in encoded.examples]


def _last_prompt(row: Row, encoder: Encoder) -> str:
    turns = [i for i, message in enumerate(row.messages) if message.get("role") == "assistant"]
    turns += [i for i, phrase in enumerate(row.phrases) if phrase.weight]
    if not turns:
        return ""
    return served_prompt(row, turns[-1], encoder)


def served_prompt(row: Row, turn: int, encoder: Encoder) -> str:
    """The text that a server would send to get the answer at `turn` (an index into the messages or
    phrases).
    """
    if row.kind not in ("messages", "phrases"):
        return ""
    conversation = conversation_of(row, encoder.data.train_on)
    if encoder.chat_template is None:
        return "".join(message["content"] for message in conversation.messages[:turn])
    with watched():
        template = encoder.template(conversation.tools is not None)
        return template.turn(conversation, turn).prompt
