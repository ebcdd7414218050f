"""From a run's data settings to its two corpora: every row read, encoded once into the cache, and
accounted for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from sftx.data.chat.turns import LOST_REASONING
from sftx.data.encoder import Encoder
from sftx.data.groups import fields_of
from sftx.data.mixture import choose, weighted, weighted_held_out
from sftx.data.sources.tables import Table, bad_row, named_sources, open_tables
from sftx.data.store.cache import VERSION, Cache
from sftx.data.store.corpus import Corpus, Drop, Part
from sftx.data.store.encode_pool import Progress, encode_jobs
from sftx.data.store.encode_worker import Job
from sftx.data.tokenizer import Tokenizer
from sftx.files import make_folder, write_text
from sftx.printable import printable
from sftx.settings.schema import Config, Data, Source
from sftx.types import UserError

log = logging.getLogger("sftx")
TURNS = ("dialogue", "pairs", "messages", "sharegpt", "alpaca")
"""Formats whose rows are turns, which a chat template writes."""


def load_corpora(
    config: Config,
    tokenizer: Tokenizer,
    max_length: int,
    progress: Progress | None = None,
    encoder: Encoder | None = None,
) -> tuple[Corpus, Corpus | None]:
    """The training and the held-out corpus of a run, encoded now or taken from the cache.

    `encoder` is made of the rest where it is not given.

    Rows of `data.eval_split` are chosen by their content and the seed: a row keeps its side when
    others are added, and equal rows share a side.

    Raises:
        UserError: a file or row is wrong, or nothing is left to train on.
    """
    data = config.data
    train = named_sources(data.train, data.rows)
    held = named_sources(data.eval, data.eval_rows)
    if not train:
        raise UserError("data.train: nothing to train on is given")
    if held and data.eval_split:
        raise UserError(
            "data.eval_split and data.eval are both set; held-out rows come from one of them"
        )
    cache = Cache(data.cache)
    encoder = encoder or Encoder(tokenizer, data, max_length)
    with cache.turn(f"{train} {held} {encoder.fingerprint}"), cache.scratch() as scratch:
        tables = open_tables(train, data.rows, data, cache, scratch)
        held_tables = open_tables(held, data.eval_rows, data, cache, scratch)
        _require_template(encoder, [*tables, *held_tables])
        fingerprint = f"{encoder.fingerprint} {json.dumps(data.columns, sort_keys=True)}"
        jobs = _missing([*tables, *held_tables], fingerprint, cache, scratch)
        encode_jobs(jobs, encoder, cache, scratch, progress)
        corpus = _assemble(train, tables, fingerprint, cache)
        corpus.fields = fields_of(tables, config.batch.group_by, scratch)
        held_out = _assemble(held, held_tables, fingerprint, cache) if held else None
    _check(corpus, data)
    _check_renamed(data, corpus, held_out)
    _warn_of_lost_reasoning(corpus, encoder)
    _warn_of_idle_weights(data, corpus, held_out)
    if data.eval_split:
        corpus, held_out = _split(corpus, data.eval_split, config.seed)
    elif held_out is not None:
        _check(held_out, data)
        held_out = weighted_held_out(held_out, held, config.seed)
    return weighted(corpus, train, data.mix_by, config.seed), held_out


def _require_template(encoder: Encoder, tables: Sequence[Table]) -> None:
    """A chat template that is missing is one mistake of the run, not of each row."""
    problem = encoder.missing_template()
    for table in tables:
        if problem and table.form in TURNS:
            raise UserError(f"{table.origin.name} ({table.form}): {problem}")


def block_key(digest: str, form: str, fingerprint: str) -> str:
    """The name in the cache of a block: its bytes, how they are read, and how they are encoded."""
    decides = f"{VERSION} {digest} {form} {fingerprint}"
    return blake2b(decides.encode(), digest_size=20).hexdigest()


def _missing(tables: Sequence[Table], fingerprint: str, cache: Cache, scratch: Path) -> list[Job]:
    jobs: dict[str, Job] = {}
    for table in tables:
        for block in table.blocks:
            key = block_key(block.digest, table.form, fingerprint)
            if key not in jobs and cache.load(key) is None:
                jobs[key] = Job(
                    key=key,
                    path=str(table.open_lines(scratch)),
                    start=block.start,
                    stop=block.stop,
                    form=table.form,
                    lines=block.lines,
                    place=table.origin.place(block.line),
                )
    return list(jobs.values())


def _assemble(
    sources: Sequence[Source], tables: Sequence[Table], fingerprint: str, cache: Cache
) -> Corpus:
    parts: list[Part] = []
    for origin, table in enumerate(tables):
        for block in table.blocks:
            key = block_key(block.digest, table.form, fingerprint)
            part = Part(cache.path(key), table.source, origin, block.line)
            parts.append(part)
    names = [source.name or source.path for source in sources]
    origins = [replace(table.origin, form=table.form) for table in tables]
    return Corpus(parts, names, origins)


def _check(corpus: Corpus, data: Data) -> None:
    """Refuse bad rows (unless they are skipped) and a corpus of nothing; warn where many rows were
    dropped.
    """
    bad = [drop for drop in corpus.drops if drop.bad]
    if bad and data.on_bad_row == "stop":
        first = bad[0]
        raise bad_row(_place(corpus, first), first.reason, others=len(bad) - 1)
    for number, (name, ledger) in enumerate(corpus.ledgers.items()):
        if not ledger.read:
            raise UserError(f"{name}: the data set is empty")
        example = _first_dropped(corpus, number)
        if ledger.dropped == ledger.read:
            raise UserError(f"{name}: all {ledger.read:,} rows were dropped{example}")
        if ledger.dropped > 0.01 * ledger.read:
            share = 100 * ledger.dropped / ledger.read
            lost = f"{name}: {share:.1f} % of {ledger.read:,} rows were dropped{example}"
            log.warning("warning: %s", printable(lost))


def _first_dropped(corpus: Corpus, source: int) -> str:
    """Which row of a source was dropped first, and why."""
    for drop in corpus.drops:
        if drop.source == source:
            return f"; the first, {_place(corpus, drop)}: {drop.reason}"
    return ""


def _place(corpus: Corpus, drop: Drop) -> str:
    return corpus.origins[drop.origin].place(drop.line)


def _warn_of_lost_reasoning(corpus: Corpus, encoder: Encoder) -> None:
    """Warn where the chat template leaves out the reasoning of more than 1 % of the rows of a
    source.
    """
    for name, ledger in corpus.ledgers.items():
        lost = ledger.notes.get(LOST_REASONING, 0)
        if lost > 0.01 * ledger.read:
            log.warning(
                "warning: %s: the chat template leaves out the reasoning of %s of %s rows; %s",
                name,
                f"{lost:,}",
                f"{ledger.read:,}",
                encoder.how_to_keep_reasoning(),
            )


def _warn_of_idle_weights(data: Data, corpus: Corpus, held_out: Corpus | None) -> None:
    """Warn where `data.weights` weighs something that no row has."""
    corpora = [corpus] if held_out is None else [corpus, held_out]
    found = {kind for each in corpora for kind in each.ledger.kinds}
    if "output" in found:
        found.add("assistant")
    for name in data.weights:
        if name not in found:
            log.warning("warning: data.weights.%s: no row has a text of this kind", name)


def _check_renamed(data: Data, corpus: Corpus, held_out: Corpus | None) -> None:
    corpora = [corpus] if held_out is None else [corpus, held_out]
    found = {column for each in corpora for column in each.renamed}
    for column in data.columns:
        if column not in found:
            raise UserError(f"data.columns: {column}: no row has a column of this name")


def _split(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    everything = np.ones(len(corpus), np.bool_)
    held_out = choose(corpus.table, everything, share, f"eval_split {seed}", least=1)
    if held_out.all():
        raise UserError("data.eval_split: too few different rows to hold some out")
    return corpus.divide(held_out)


def write_ledger(corpus: Corpus, folder: str | Path) -> list[str]:
    """Write `ledger.json` (counts, whole and per source) and `dropped.jsonl` (file, line, reason)
    to `folder`.

    Returns the names of those that were not there, or had other contents.
    """
    counts = {
        "fingerprint": corpus.fingerprint,
        "summary": corpus.ledger.summary(),
        "all": asdict(corpus.ledger),
        "sources": {name: asdict(ledger) for name, ledger in corpus.ledgers.items()},
    }
    dropped: list[str] = []
    for drop in corpus.drops:
        origin = corpus.origins[drop.origin]
        file = origin.name
        line = drop.line
        if origin.names:  # each of these files is one row
            file = origin.names[line - 1]
            line = 1
        row = {"file": file, "line": line, "reason": drop.reason}
        dropped.append(json.dumps(row, ensure_ascii=False) + "\n")
    texts = {
        "ledger.json": json.dumps(counts, indent=2, ensure_ascii=False) + "\n",
        "dropped.jsonl": "".join(dropped),
    }
    folder = Path(folder)
    make_folder(folder)
    new: list[str] = []
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != text.encode():
            write_text(path, text)
            new.append(name)
    return new
