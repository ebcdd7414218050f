"""What is likely wrong with data: findings with the places of the rows, most serious first."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftx.data.chat.turns import LOST_REASONING
from sftx.data.dataset import load_corpora
from sftx.data.encoder import Encoder
from sftx.data.lint.minhash import NearDuplicates
from sftx.data.lint.texts import problems, texts
from sftx.data.sources.arguments import INVENTED, parameters
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import raw_tables, read_rows
from sftx.data.truncation import runs
from sftx.settings.schema import Config, Data
from sftx.types import Int32, Json, Message, Row, RowError

FEW = 5  # calls; fewer are no pattern
Place = Callable[[int], str]
_TEXTS = (  # the name in `problems`, the check, and what it says
    ("secrets", "secrets", "rows with what looks like a key, password or card number"),
    ("markers", "template mismatch", "rows with markers of another chat template"),
    ("own markers", "special tokens", "rows that spell the tokenizer's special tokens"),
    ("roles", "role order", "conversations whose roles are in an unusual order"),
    ("mojibake", "mojibake", "rows with text that was decoded wrongly"),
    ("refusals", "refusals", "rows with an answer that refuses, or speaks of itself as an AI"),
    ("cut off", "cut answers", "rows with an answer that stops in the middle"),
    ("html", "html", "rows with an answer that holds HTML outside code"),
    ("echo", "echo", "rows with an answer that begins by repeating its prompt"),
)


@dataclass(slots=True)
class Finding:
    """One kind of problem: how many rows have it, where they stand, and which row each of them is
    like.
    """

    check: str
    serious: bool
    message: str
    count: int
    places: list[str]
    partners: list[str]  # as many as places; none where a row has the problem by itself


def lint(
    config: Config,
    encoder: Encoder,
    tell: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Finding]:
    """All findings in the training and held-out data of a run, serious ones first.

    `tell` is told what is being done, and how much of it is done.

    Raises:
        UserError: a file cannot be read at all, or a package is not installed.
    """
    seen = NearDuplicates()
    once = config.model_copy(update={"data": _once(config.data)})
    encoding = partial(tell, "encoding|rows")
    corpus, held_out = load_corpora(once, encoder.tokenizer, encoder.max_length, encoding)
    tell("looking at the rows", 0, 0)
    found = _of_drops(corpus) + _of_tokens(corpus, encoder) + _of_copies(corpus, held_out)
    if held_out is not None:
        found += _of_drops(held_out) + _of_tokens(held_out, encoder)
    found += _of_texts(once, encoder, seen)
    if kinds := corpus.ledger.by_kind():
        found.append(Finding("weights", False, f"examples; {kinds}", len(corpus), [], []))
    return sorted((f for f in found if f.count), key=lambda f: (not f.serious, -f.count))


def _once(data: Data) -> Data:
    """The same data with every row once, bad rows left out."""

    changes: dict[str, Any] = {"on_bad_row": "skip", "mix_by": "rows"}
    for name, given in (("train", data.train), ("eval", data.eval)):
        if isinstance(given, list):
            changes[name] = [
                source if isinstance(source, str) else source.model_copy(update={"weight": 1.0})
                for source in given
            ]
    return data.model_copy(update=changes)


def _finding(
    check: str, serious: bool, message: str, where: Any, place: Place, partner: Place | None = None
) -> Finding:
    """A finding at the given indices or lines, each row named once."""
    indices = [int(i) for i in where]
    rows = {place(i): partner(i) if partner else "" for i in indices}
    return Finding(
        check, serious, message, len(indices), list(rows), list(rows.values()) if partner else []
    )


def _of_drops(corpus: Corpus) -> list[Finding]:
    def place(index: int) -> str:
        drop = corpus.drops[index]
        return f"{corpus.origins[drop.origin].place(drop.line)}: {drop.reason}"

    kinds = {
        bad: [i for i, drop in enumerate(corpus.drops) if drop.bad == bad] for bad in (True, False)
    }
    return [
        _finding("bad rows", True, "rows that cannot be encoded", kinds[True], place),
        _finding("dropped rows", True, "rows that the settings drop", kinds[False], place),
    ]


def _of_tokens(corpus: Corpus, encoder: Encoder) -> list[Finding]:
    """Findings in the encoded examples: outputs without content or end, lost targets, extreme
    lengths.
    """
    table = corpus.table
    outputs = _Outputs(corpus, encoder)
    typical = float(np.median(corpus.lengths)) if len(corpus) else 0.0
    extreme = np.flatnonzero((corpus.lengths > 30 * typical) | (corpus.lengths < 4))
    lost = np.flatnonzero(table["cut_targets"] > 0)
    cut = np.flatnonzero((table["cut_tokens"] > 0) & (table["cut_targets"] == 0))
    behind = np.flatnonzero(table["shortened"])
    many = corpus.ledger.targets_shortened > 0.1 * corpus.ledger.targets
    split = np.flatnonzero(table["split"] & (table["part"] == 0))
    limit = f"max_length {encoder.max_length:,}"
    place = corpus.place
    reasoning = "rows whose reasoning the template leaves out"
    if outputs.thoughtless:
        reasoning += f"; {encoder.how_to_keep_reasoning()}"
    return [
        _finding("lost reasoning", True, reasoning, outputs.thoughtless, place),
        _finding("lost targets", True, f"rows that lose targets at {limit}", lost, place),
        _finding(
            "endless outputs",
            True,
            "outputs that do not end in a stop token",
            outputs.endless,
            place,
        ),
        _finding(
            "empty outputs", True, "outputs of nothing but a stop token", outputs.empty, place
        ),
        _finding("short outputs", False, "outputs of one token", outputs.single, place),
        _finding("lost context", False, f"rows that lose context at {limit}", cut, place),
        _finding(
            "shortened prompts",
            many,
            f"examples without the oldest turns of their prompt at {limit}",
            behind,
            place,
        ),
        _finding("split rows", False, f"rows cut in pieces at {limit}", split, place),
        _finding(
            "extreme lengths",
            False,
            f"examples far from the median of {typical:.0f} tokens",
            extreme,
            place,
        ),
    ]


class _Outputs:
    """The examples whose outputs hold nothing, hold one token, never end, or lost their thought."""

    def __init__(self, corpus: Corpus, encoder: Encoder) -> None:
        self.empty: list[int] = []
        self.single: list[int] = []
        self.endless: list[int] = []
        self.thoughtless: dict[int, None] = {}  # the first example of each row
        self._stops = {*encoder.tokenizer.stop_ids, encoder.stop_id}
        every_id = np.arange(encoder.tokenizer.vocab_size)
        self._is_content = ~np.isin(every_id, list(encoder.tokenizer.control_ids))
        split = corpus.table["split"]
        last_of_row = np.append(corpus.part[1:] == 0, True)
        first = 0
        for index in range(len(corpus)):
            example = corpus.example(index)
            first = index if example.part == 0 else first
            if LOST_REASONING in example.note:
                self.thoughtless[first] = None
            whole = bool(last_of_row[index]) or not split[index]
            for start, stop in runs(example.said):
                self._look(index, example.ids[start:stop], whole)

    def _look(self, index: int, output: Int32, whole: bool) -> None:
        """Look at one output; `whole`: its end is not in another example."""
        if int(output[-1]) not in self._stops:
            if whole:
                self.endless.append(index)
            return
        content = int(self._is_content[output].sum())
        if content == 0:
            self.empty.append(index)
        elif content == 1:
            self.single.append(index)


def _of_copies(corpus: Corpus, held_out: Corpus | None) -> list[Finding]:
    """Rows whose tokens and weights are those of another row, whatever else their lines say."""
    rows = _row_digests(corpus)
    known, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    starts = np.flatnonzero(corpus.part == 0)
    original = dict(zip(starts.tolist(), starts[first[inverse]].tolist(), strict=True))
    again = [i for i, earlier in original.items() if i != earlier]
    many = len(again) > 0.01 * len(rows)
    message = "rows that repeat another"
    found = [
        _finding(
            "exact duplicates",
            many,
            message,
            again,
            corpus.place,
            lambda i: corpus.place(original[i]),
        )
    ]
    if held_out is not None:
        digests = _row_digests(held_out)
        inside = np.isin(digests, rows)
        overlap = np.flatnonzero(held_out.part == 0)[inside]
        trained = starts[first[np.searchsorted(known, digests[inside])]]
        twins = dict(zip(overlap.tolist(), trained.tolist(), strict=True))
        message = "held-out rows that are also trained on"
        found.append(
            _finding(
                "overlap", True, message, overlap, held_out.place, lambda i: corpus.place(twins[i])
            )
        )
    return found


def _row_digests(corpus: Corpus) -> NDArray[np.uint64]:
    """uint64[rows]: a hash of all examples of each row."""
    starts = np.flatnonzero(corpus.part == 0)
    odd = corpus.part.astype(np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = corpus.table["digest"] * odd
    return np.add.reduceat(mixed, starts) if len(starts) else mixed


def _of_texts(config: Config, encoder: Encoder, seen: NearDuplicates) -> list[Finding]:
    """Findings in the rows' own text: near duplicates, roles, foreign markers, refusals, secrets,
    odd arguments.
    """
    said = _Texts(encoder, seen)
    trained = 0
    with raw_tables(config) as tables:
        for table in tables:
            for line, row in read_rows(table):
                if not isinstance(row, RowError):
                    said.add(row, table.origin.place(line))
            trained = trained if table.held_out else len(said.places)
    places = said.places
    like = said.like
    hits = said.hits
    across = [i for i, j in like.items() if j < trained <= i]
    inside = sorted(set(like) - set(across))
    place = places.__getitem__

    def partner(index: int) -> str:
        return places[like[index]]

    found = [
        _finding(
            "near overlap", True, "held-out rows much like a training row", across, place, partner
        ),
        _finding("near duplicates", False, "rows much like an earlier one", inside, place, partner),
    ]
    for name, check, message in _TEXTS:
        serious = check == "secrets" or (
            check == "template mismatch" and len(hits[name]) > 0.01 * len(places)
        )
        found.append(_finding(check, serious, message, hits[name], place))
    return found + said.calls.findings(place)


class _Texts:
    """What was found in the text of rows: their problems, and which earlier row each is like."""

    def __init__(self, encoder: Encoder, seen: NearDuplicates) -> None:
        self.places: list[str] = []
        self.like: dict[int, int] = {}
        self.hits: dict[str, list[int]] = defaultdict(list)
        self.calls = _Calls()
        self._seen = seen
        self._control = encoder.tokenizer.control
        self._hashes: list[int] = []

    def add(self, row: Row, place: str) -> None:
        """Look at one more row."""
        number = len(self.places)
        self.places.append(place)
        said = list(texts(row))
        text = "\n".join(text for text, _ in said) or " ".join(map(str, row.ids))
        self._hashes.append(hash(text))
        answers = [text for text, role in said if role == "assistant"]
        others = ("assistant", "system", "developer")
        asked = "\n".join(text for text, role in said if role not in others)
        earlier = self._seen.add("\n".join(answers) or text, asked)
        # Exact copies are another finding.
        if earlier is not None and self._hashes[earlier] != self._hashes[number]:
            self.like[number] = earlier
        for name in problems(row, text, self._control):
            self.hits[name].append(number)
        self.calls.add(number, row)


def _calls_of(messages: Sequence[Message]) -> Iterator[tuple[str, dict[str, Json]]]:
    """(name, arguments) of every call whose arguments are an object."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function["arguments"], dict):
                yield function["name"], function["arguments"]


class _Calls:
    """The arguments of all tool calls: which are null almost everywhere, and which the tool does
    not have.
    """

    def __init__(self) -> None:
        self._times: Counter[tuple[str, str]] = Counter()
        self._null: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._strange: dict[int, set[str]] = defaultdict(set)
        self._left_out: list[int] = []

    def add(self, number: int, row: Row) -> None:
        """Look at the calls of row `number`."""
        if INVENTED in row.notes:
            self._left_out.append(number)
        known = parameters(row.tools)
        for name, arguments in _calls_of(row.messages):
            for key, value in arguments.items():
                self._times[name, key] += 1
                if value is None:
                    self._null[name, key].append(number)
                if name in known and key not in known[name]:
                    self._strange[number].add(f"{name}.{key}")

    def findings(self, place: Place) -> list[Finding]:
        """What was found in all rows."""
        empty = {
            key for key, rows in self._null.items() if len(rows) >= max(0.9 * self._times[key], FEW)
        }
        rows = sorted({number for key in empty for number in self._null[key]})
        names = _named([".".join(key) for key in sorted(empty)])
        strange = _named(sorted({name for found in self._strange.values() for name in found}))
        return [
            _finding(
                "null arguments",
                False,
                f"rows with arguments that are null almost everywhere{names}",
                rows,
                place,
            ),
            _finding("invented nulls", False, f"rows with {INVENTED}", self._left_out, place),
            _finding(
                "strange arguments",
                True,
                f"rows with arguments that the tool does not have{strange}",
                sorted(self._strange),
                place,
            ),
        ]


def _named(names: Sequence[str]) -> str:
    return f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
