"""What is likely wrong with data: findings with the places of the rows, most serious first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sftx.data.chat.turns import LOST_REASONING
from sftx.data.dataset import load_corpora
from sftx.data.encoder import Encoder
from sftx.data.lint.calls import Calls
from sftx.data.lint.finding import Finding, finding
from sftx.data.lint.minhash import NearDuplicates
from sftx.data.lint.texts import problems, texts
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import raw_tables, read_rows
from sftx.data.truncation import runs
from sftx.settings.schema import Config, Data, Source
from sftx.types import Int32, Row, RowError

_Sources: TypeAlias = str | list[str | Source] | None
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
    found = [each for each in found if each.count]
    return sorted(found, key=lambda each: (not each.serious, -each.count))


def _once(data: Data) -> Data:
    """The same data with every row once, bad rows left out."""

    changes = {
        "on_bad_row": "skip",
        "mix_by": "rows",
        "train": _of_weight_one(data.train),
        "eval": _of_weight_one(data.eval),
    }
    return data.model_copy(update=changes)


def _of_weight_one(given: _Sources) -> _Sources:
    """The sources of a setting without their weights."""
    if not isinstance(given, list):
        return given
    sources: list[str | Source] = []
    for source in given:
        if isinstance(source, Source):
            source = source.model_copy(update={"weight": 1.0})
        sources.append(source)
    return sources


def _of_drops(corpus: Corpus) -> list[Finding]:
    def place(index: int) -> str:
        drop = corpus.drops[index]
        return f"{corpus.origins[drop.origin].place(drop.line)}: {drop.reason}"

    bad: list[int] = []
    dropped: list[int] = []
    for i, drop in enumerate(corpus.drops):
        if drop.bad:
            bad.append(i)
        else:
            dropped.append(i)
    return [
        finding("bad rows", True, "rows that cannot be encoded", bad, place),
        finding("dropped rows", True, "rows that the settings drop", dropped, place),
    ]


def _of_tokens(corpus: Corpus, encoder: Encoder) -> list[Finding]:
    """Findings in the encoded examples: outputs without content or end, lost targets, extreme
    lengths.
    """
    table = corpus.table
    outputs = _Outputs(corpus, encoder)
    typical = 0.0
    if len(corpus):
        typical = float(np.median(corpus.lengths))
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
        finding("lost reasoning", True, reasoning, outputs.thoughtless, place),
        finding("lost targets", True, f"rows that lose targets at {limit}", lost, place),
        finding(
            "endless outputs",
            True,
            "outputs that do not end in a stop token",
            outputs.endless,
            place,
        ),
        finding("empty outputs", True, "outputs of nothing but a stop token", outputs.empty, place),
        finding("short outputs", False, "outputs of one token", outputs.single, place),
        finding("lost context", False, f"rows that lose context at {limit}", cut, place),
        finding(
            "shortened prompts",
            many,
            f"examples without the oldest turns of their prompt at {limit}",
            behind,
            place,
        ),
        finding("split rows", False, f"rows cut in pieces at {limit}", split, place),
        finding(
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
            if example.part == 0:
                first = index
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
    first_alike = starts[first[inverse]]
    original = dict(zip(starts.tolist(), first_alike.tolist(), strict=True))
    again = [i for i, earlier in original.items() if i != earlier]
    many = len(again) > 0.01 * len(rows)
    message = "rows that repeat another"
    found = [
        finding(
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
            finding(
                "overlap", True, message, overlap, held_out.place, lambda i: corpus.place(twins[i])
            )
        )
    return found


def _row_digests(corpus: Corpus) -> NDArray[np.uint64]:
    """uint64[rows]: a hash of all examples of each row."""
    starts = np.flatnonzero(corpus.part == 0)
    numbers = corpus.part.astype(np.uint64)
    odd = numbers * np.uint64(2) + np.uint64(1)
    mixed = corpus.table["digest"] * odd
    if not len(starts):
        return mixed
    return np.add.reduceat(mixed, starts)


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
            if not table.held_out:
                trained = len(said.places)
    places = said.places
    like = said.like
    hits = said.hits
    across = [i for i, j in like.items() if j < trained <= i]
    inside = sorted(set(like) - set(across))
    place = places.__getitem__

    def partner(index: int) -> str:
        return places[like[index]]

    found = [
        finding(
            "near overlap", True, "held-out rows much like a training row", across, place, partner
        ),
        finding("near duplicates", False, "rows much like an earlier one", inside, place, partner),
    ]
    for name, check, message in _TEXTS:
        serious = check == "secrets" or (
            check == "template mismatch" and len(hits[name]) > 0.01 * len(places)
        )
        found.append(finding(check, serious, message, hits[name], place))
    return found + said.calls.findings(place)


class _Texts:
    """What was found in the text of rows: their problems, and which earlier row each is like."""

    def __init__(self, encoder: Encoder, seen: NearDuplicates) -> None:
        self.places: list[str] = []
        self.like: dict[int, int] = {}
        self.hits: dict[str, list[int]] = defaultdict(list)
        self.calls = Calls()
        self._seen = seen
        self._control = encoder.tokenizer.control
        self._hashes: list[int] = []

    def add(self, row: Row, place: str) -> None:
        """Look at one more row."""
        number = len(self.places)
        self.places.append(place)
        everything: list[str] = []
        answers: list[str] = []
        asked: list[str] = []
        for said, role in texts(row):
            everything.append(said)
            if role == "assistant":
                answers.append(said)
            elif role not in ("system", "developer"):
                asked.append(said)
        text = "\n".join(everything) or " ".join(map(str, row.ids))
        self._hashes.append(hash(text))
        answered = "\n".join(answers) or text
        earlier = self._seen.add(answered, "\n".join(asked))
        # Exact copies are another finding.
        if earlier is not None and self._hashes[earlier] != self._hashes[number]:
            self.like[number] = earlier
        for name in problems(row, text, self._control):
            self.hits[name].append(number)
        self.calls.add(number, row)
