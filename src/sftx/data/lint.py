"""What is likely wrong with data: findings with the places of the rows, most serious first."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftx.config import Config, Data
from sftx.data.chat.turns import LOST_REASONING
from sftx.data.corpus import Corpus
from sftx.data.encode import load_corpora
from sftx.data.length import runs
from sftx.data.minhash import NearDuplicates
from sftx.data.render import Encoder
from sftx.data.view import raw_tables, read_rows
from sftx.types import Row, RowError

NAMED = 10  # places of a finding
Place = Callable[[int], str]

MOJIBAKE = re.compile(r"\ufffd|Ã[\x80-\xbf¡-¿]|Â[\xa0-\xbf]|â€[\x90-\x9f™œ“”˜¦\x9d]|ï»¿|ðŸ[\x80-\xbf˜™]")
SECRETS = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_\w{60,}|\bhf_[A-Za-z0-9]{30,}\b"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[0-9A-Za-z_-]{35}\b"
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
)
CARD = re.compile(r"(?<![\d.])\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?![\d.])")
MARKERS = re.compile(  # what chat templates write, and text should not hold
    r"<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<\|(?:user|assistant|system|endoftext|end_of_text|begin_of_text|return|channel)\|>|<\|turn\|?>"
    r"|^### (?:Instruction|Response):|^(?:Human|Assistant): ",
    re.MULTILINE,
)


@dataclass(slots=True)
class Finding:
    """One kind of problem: how many rows have it, and where the first of them stand."""

    check: str
    serious: bool
    message: str
    count: int
    places: list[str]


def lint(config: Config, encoder: Encoder) -> list[Finding]:
    """All findings in the training and held-out data of a run, serious ones first.

    Raises:
        UserError: a file cannot be read at all.
    """
    once = config.model_copy(update={"data": _once(config.data)})
    corpus, held_out = load_corpora(once, encoder.tokenizer, encoder.max_length)
    found = _of_drops(corpus) + _of_tokens(corpus, encoder) + _of_copies(corpus, held_out)
    if held_out is not None:
        found += _of_drops(held_out) + _of_tokens(held_out, encoder)
    found += _of_texts(once, encoder)
    return sorted((f for f in found if f.count), key=lambda f: (not f.serious, -f.count))


def _once(data: Data) -> Data:
    """The same data with every row once, bad rows left out."""

    def unweighted(given: Any) -> Any:
        if not isinstance(given, list):
            return given
        return [s if isinstance(s, str) else s.model_copy(update={"weight": 1.0}) for s in given]

    plain = {"on_bad_row": "skip", "mix_by": "rows"}
    return data.model_copy(update={**plain, "train": unweighted(data.train), "eval": unweighted(data.eval)})


def _finding(check: str, serious: bool, message: str, where: Any, place: Place) -> Finding:
    """A finding at the given indices or lines; the first few are named."""
    indices = list(where)
    return Finding(check, serious, message, len(indices), list(dict.fromkeys(place(int(i)) for i in indices[:NAMED])))


def _of_drops(corpus: Corpus) -> list[Finding]:
    def place(index: int) -> str:
        drop = corpus.drops[index]
        return f"{corpus.origins[drop.origin].place(drop.line)}: {drop.reason}"

    kinds = {bad: [i for i, drop in enumerate(corpus.drops) if drop.bad == bad] for bad in (True, False)}
    return [
        _finding("bad rows", True, "rows that cannot be encoded", kinds[True], place),
        _finding("dropped rows", True, "rows that the settings drop", kinds[False], place),
    ]


def _of_tokens(corpus: Corpus, encoder: Encoder) -> list[Finding]:
    """Findings in the encoded examples: outputs without content or end, lost targets, extreme lengths."""
    stops = set(encoder.tokenizer.stop_ids) | {encoder.stop_id}
    is_special = np.isin(np.arange(encoder.tokenizer.vocab_size), list(encoder.tokenizer.control_ids))
    columns = corpus.columns
    last_of_row = np.append(columns.part[1:] == 0, True) if len(corpus) else np.zeros(0, np.bool_)
    empty, single, endless = [], [], []
    thoughtless: dict[int, None] = {}  # the first example of each row
    first = 0
    for index in range(len(corpus)):
        example = corpus.example(index)
        first = index if example.part == 0 else first
        if LOST_REASONING in example.note:
            thoughtless[first] = None
        for start, stop in runs(example.weights):
            ends = int(example.ids[stop - 1]) in stops
            content = int((~is_special[example.ids[start:stop]]).sum())
            if ends and content < 2:
                (single if content else empty).append(index)
            whole = last_of_row[index] or not columns.split[index]
            if not ends and whole:
                endless.append(index)
    typical = float(np.median(corpus.lengths)) if len(corpus) else 0.0
    extreme = np.flatnonzero((corpus.lengths > 30 * typical) | (corpus.lengths < 4))
    lost = np.flatnonzero(columns.cut_targets > 0)
    cut = np.flatnonzero((columns.cut_tokens > 0) & (columns.cut_targets == 0))
    split = np.flatnonzero((columns.split != 0) & (columns.part == 0))
    limit, place = f"max_length {encoder.max_length:,}", corpus.place
    reasoning = "rows whose reasoning the template leaves out"
    if thoughtless:
        reasoning += f"; {encoder.how_to_keep_reasoning()}"
    return [
        _finding("lost reasoning", True, reasoning, thoughtless, place),
        _finding("lost targets", True, f"rows that lose targets at {limit}", lost, place),
        _finding("endless outputs", True, "outputs that do not end in a stop token", endless, place),
        _finding("empty outputs", True, "outputs of nothing but a stop token", empty, place),
        _finding("short outputs", False, "outputs of one token", single, place),
        _finding("lost context", False, f"rows that lose context at {limit}", cut, place),
        _finding("split rows", False, f"rows cut in pieces at {limit}", split, place),
        _finding("extreme lengths", False, f"examples far from the median of {typical:.0f} tokens", extreme, place),
    ]


def _of_copies(corpus: Corpus, held_out: Corpus | None) -> list[Finding]:
    """Rows whose tokens and weights are those of another row, whatever else their lines say."""
    rows = _row_digests(corpus)
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    starts = np.flatnonzero(corpus.part == 0)
    again = starts[first[inverse] != np.arange(len(rows))]
    found = [
        _finding("exact duplicates", len(again) > 0.01 * len(rows), "rows that repeat another", again, corpus.place)
    ]
    if held_out is not None:
        inside = np.isin(_row_digests(held_out), rows)
        overlap = np.flatnonzero(held_out.part == 0)[inside]
        found.append(_finding("overlap", True, "held-out rows that are also trained on", overlap, held_out.place))
    return found


def _row_digests(corpus: Corpus) -> NDArray[np.uint64]:
    """uint64[rows]: a hash of all examples of each row."""
    starts = np.flatnonzero(corpus.part == 0)
    mixed = corpus.columns.digest * (corpus.part.astype(np.uint64) * np.uint64(2) + np.uint64(1))
    return np.add.reduceat(mixed, starts) if len(starts) else mixed


def _of_texts(config: Config, encoder: Encoder) -> list[Finding]:
    """Findings in the rows' own text: near duplicates, roles, foreign markers, mojibake, secrets."""
    places: list[str] = []
    hashes: list[int] = []
    like: dict[int, int] = {}
    hits: dict[str, list[int]] = defaultdict(list)
    seen, trained = NearDuplicates(), 0
    with raw_tables(config) as tables:
        for table in tables:
            for line, row in read_rows(table):
                if isinstance(row, RowError):
                    continue
                number = len(places)
                places.append(table.origin.place(line))
                text = "\n".join(_texts(row)) or " ".join(map(str, row.ids))
                hashes.append(hash(text))
                earlier = seen.add(text)
                if earlier is not None and hashes[earlier] != hashes[number]:  # exact copies are another finding
                    like[number] = earlier
                for name in _problems(row, text, encoder.tokenizer.control):
                    hits[name].append(number)
            trained = trained if table.held_out else len(places)
    across = [i for i, j in like.items() if j < trained <= i]
    inside = sorted(set(like) - set(across))
    many = len(hits["markers"]) > 0.01 * len(places)
    place = places.__getitem__
    return [
        _finding("secrets", True, "rows with what looks like a key, password or card number", hits["secrets"], place),
        _finding("near overlap", True, "held-out rows much like a training row", across, place),
        _finding("template mismatch", many, "rows with markers of another chat template", hits["markers"], place),
        _finding("special tokens", False, "rows that spell the tokenizer's special tokens", hits["own markers"], place),
        _finding("near duplicates", False, "rows much like an earlier one", inside, place),
        _finding("role order", False, "conversations whose roles are in an unusual order", hits["roles"], place),
        _finding("mojibake", False, "rows with text that was decoded wrongly", hits["mojibake"], place),
    ]


def _texts(row: Row) -> Iterator[str]:
    yield row.text
    yield from (phrase.text for phrase in row.phrases)
    for message in row.messages:
        yield from (message.get("content", ""), message.get("reasoning_content", ""))
        yield from (json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ()))


def _problems(row: Row, text: str, control: re.Pattern[str]) -> Iterator[str]:
    if _wrong_order(row):
        yield "roles"
    if row.kind == "tokens":  # the text is that of numbers
        return
    if control.search(text):
        yield "own markers"
    if any(not control.fullmatch(match.group()) for match in MARKERS.finditer(text)):
        yield "markers"
    if MOJIBAKE.search(text):
        yield "mojibake"
    if SECRETS.search(text) or any(_luhn(match.group()) for match in CARD.finditer(text)):
        yield "secrets"


def _luhn(text: str) -> bool:
    """Whether digits carry the check digit of a card number, and are not all alike."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d if i % 2 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)]
    return sum(doubled) % 10 == 0 and len(set(digits)) > 3


def _wrong_order(row: Row) -> bool:
    """System not first, the same speaker twice in a row, a tool result nobody asked for, or no answer at the end."""
    roles = [message.get("role", "") for message in row.messages]
    twice = any(a == b and a in ("user", "assistant", "system") for a, b in pairwise(roles))
    late = any(role in ("system", "developer") for role in roles[1:]) and roles[:2] != ["system", "developer"]
    asked = [bool(message.get("tool_calls")) or message.get("role") == "tool" for message in row.messages]
    unasked = any(role == "tool" and (i == 0 or not asked[i - 1]) for i, role in enumerate(roles))
    return bool(roles) and (twice or late or unasked or roles[-1] != "assistant")
