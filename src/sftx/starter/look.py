"""What is to be seen of a model and of rows before anything is chosen. No weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import yaml

from sftx.data.chat.conversation import ChatMessage, conversation_of
from sftx.data.dataset import TURNS, load_corpora
from sftx.data.encoder import DEFAULT_LENGTH, Encoder
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import raw_tables, read_rows
from sftx.data.tokenizer import Tokenizer
from sftx.model_config import positions
from sftx.settings.make import make_config
from sftx.settings.schema import Config
from sftx.types import Row, RowError, UserError

FEW = 0.05
"""Share of bad rows that may be left out without being asked for."""
_COLUMNS = re.compile(r"data\.columns: (\{[^}]*\})")


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a row: who speaks, what, and its weight as a target."""

    role: str
    text: str
    weight: float


@dataclass(slots=True)
class Seen:
    """The rows, encoded, and what had to be set so that they could be read, with the reason."""

    config: Config
    tokenizer: Tokenizer
    corpus: Corpus
    form: str
    first: list[Turn]
    positions: int
    has_template: bool
    needed: dict[str, tuple[object, str]] = field(default_factory=dict[str, tuple[object, str]])

    @property
    def has_thoughts(self) -> bool:
        """Whether the first row holds a thought apart from the answer."""
        return any(turn.role == "thought" for turn in self.first)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.corpus.lengths.max())


def look(model: str, data: str, progress: Callable[[int, int], None]) -> Seen:
    """Read and encode all rows.

    What the data needs and an error would ask for is set: names of columns, a template for a model
    that has none, leaving out bad rows. `needed` tells each with its reason.

    Raises:
        UserError: there is no such model or file, or its rows cannot be used.
    """
    tokenizer = Tokenizer.load(model)
    most = positions(model, DEFAULT_LENGTH)
    needed: dict[str, tuple[object, str]] = {}
    for _ in range(4):  # each time one more setting is found out
        given = {name: value for name, (value, _) in needed.items()}
        config = make_config(model=model, data={"train": data, **given}, output="unused")  # pyright: ignore[reportArgumentType]
        encoder = Encoder(tokenizer, config.data, min(most, DEFAULT_LENGTH))
        try:
            form, first = _first_row(config, encoder)
            corpus, _ = load_corpora(config, tokenizer, encoder.max_length, progress, encoder)
        except UserError as error:
            _heed(str(error), config, encoder, needed, error)
            continue
        if corpus.ledger.dropped and "on_bad_row" in needed:
            if corpus.ledger.dropped > FEW * corpus.ledger.read:
                raise UserError(
                    f"{data}: {corpus.ledger.dropped:,} of {corpus.ledger.read:,} rows are bad; "
                    f"{needed['on_bad_row'][1]}"
                )
            reason = f"{corpus.ledger.dropped:,} bad rows are left out; {needed['on_bad_row'][1]}"
            needed["on_bad_row"] = ("skip", reason)
        has_template = bool(tokenizer.chat_templates)
        return Seen(config, tokenizer, corpus, form, first, most, has_template, needed)
    raise UserError(f"{data}: no settings were found with which these rows can be read")


def _heed(
    message: str,
    config: Config,
    encoder: Encoder,
    needed: dict[str, tuple[object, str]],
    error: UserError,
) -> None:
    """Set what the error asks for; raise it again where that has been tried or is nothing."""
    columns = _COLUMNS.search(message)
    if columns and "columns" not in needed:
        names = yaml.safe_load(columns[1])
        needed["columns"] = (names, "what these columns are called here")
    elif encoder.missing_template() and "template" not in needed and "chat template" in message:
        plain = ("plain", "the model has no chat template: turns as plain lines")
        with_calls = ("chatml", "the model has no chat template, and the rows call tools")
        needed["template"] = with_calls if _call_tools(config) else plain
    elif "data.on_bad_row" in message and "on_bad_row" not in needed:
        needed["on_bad_row"] = ("skip", "the first: " + message.partition("\n")[0])
    else:
        raise error


def _call_tools(config: Config) -> bool:
    """Whether a row among the first has tools, or calls or answers of them."""
    with raw_tables(config) as tables:
        for table in tables:
            for _, row in islice(read_rows(table), 1000):
                if isinstance(row, Row) and (row.tools or _has_calls(row)):
                    return True
    return False


def _has_calls(row: Row) -> bool:
    return any(
        message.get("tool_calls") or message.get("role") == "tool" for message in row.messages
    )


def _first_row(config: Config, encoder: Encoder) -> tuple[str, list[Turn]]:
    """The format of the first file, and the turns of its first good row."""
    with raw_tables(config) as tables:
        table = tables[0]
        for _, row in islice(read_rows(table), 1000):
            if isinstance(row, Row):
                return table.form, _turns(row, config)
        if table.form in TURNS and (problem := encoder.missing_template()):
            raise UserError(problem)
    raise UserError(f"{table.origin.name}: no row of it can be read")


def _turns(row: Row, config: Config) -> list[Turn]:
    if row.kind == "text":
        return [Turn("text", row.text, 1.0)]
    if row.kind == "segments":
        return [Turn("segment", phrase.text, phrase.weight) for phrase in row.phrases]
    if row.kind == "tokens":
        targets = sum(weight != 0 for weight in row.weights)
        return [Turn("tokens", f"{len(row.ids):,} token ids, {targets:,} targets", 1.0)]
    try:
        conversation = conversation_of(row, config.data.train_on)
    except RowError:
        return []
    turns: list[Turn] = []
    for message, weight in zip(conversation.messages, conversation.weights, strict=True):
        if thought := message.get("reasoning_content"):
            turns.append(Turn("thought", str(thought), weight))
        turns.append(Turn(message["role"], _said(message), weight))
    return turns


def _said(message: ChatMessage) -> str:
    """What a message says, its calls of tools included."""
    text = str(message.get("content") or "")
    calls = message.get("tool_calls")
    return f"{text} {calls}".strip() if calls else text
