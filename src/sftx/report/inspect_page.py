"""The page that `sftx inspect html=FILE` writes: chosen rows token by token, filters, and charts of
the whole data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sftx.data.encoder import Encoder
from sftx.data.plan import plan_of
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import View, view
from sftx.evenly import evenly
from sftx.report.histograms import lengths_of
from sftx.report.shell import asset, page
from sftx.settings.schema import Config
from sftx.types import Ledger

SHOWN = 240
TOKENS = 400_000
"""Examples on a page, and tokens of them at most: a page should open at once."""
DROPPED = 200
"""Dropped rows that are listed."""
POINTS = 400
"""Steps in the chart of steps."""


def write_page(
    path: str, config: Config, corpus: Corpus, encoder: Encoder, first: Sequence[View]
) -> None:
    """Write the page: the views in `first`, then the longest, the cut and evenly spaced examples of
    `corpus`.
    """
    views = list(first)
    tokens = sum(len(v.ids) for v in first)
    seen = {(v.place, v.part) for v in first}
    for index in _chosen(corpus):
        length = int(corpus.lengths[index])
        place = corpus.place(index)
        part = int(corpus.part[index])
        if (place, part) in seen or tokens + length > TOKENS:
            continue
        tokens += length
        lost = int(corpus.table["cut_tokens"][index])
        views.append(view(corpus.example(index), encoder.tokenizer, place, lost))
    ledgers = corpus.ledgers.items()
    facts = {
        "title": ", ".join(corpus.sources),
        "ledgers": {name: _in_words(ledger) for name, ledger in ledgers},
        "notes": corpus.ledger.notes,
        "dropped": _dropped(corpus),
        "examples": len(corpus),
        "maxLength": encoder.max_length,
        "lengths": lengths_of(corpus, encoder.max_length),
        "shares": [_share(name, ledger) for name, ledger in ledgers],
        "steps": _steps(config, corpus),
        "rows": [_row(v) for v in views],
    }
    script = asset("inspect_page.js")
    body = asset("inspect_page.html")
    text = page("sftx inspect", body, facts, script)
    Path(path).write_text(text, encoding="utf-8")


def _in_words(ledger: Ledger) -> str:
    return "; ".join([ledger.summary(), *ledger.warnings()])


def _share(name: str, ledger: Ledger) -> dict[str, object]:
    return {
        "source": name,
        "tokens": ledger.tokens,
        "targets": ledger.targets,
        "rows": ledger.read,
    }


def _dropped(corpus: Corpus) -> list[dict[str, str]]:
    """The first dropped rows, and why."""
    found: list[dict[str, str]] = []
    for drop in corpus.drops[:DROPPED]:
        place = corpus.origins[drop.origin].place(drop.line)
        found.append({"place": place, "reason": drop.reason})
    return found


def _chosen(corpus: Corpus) -> list[int]:
    """Indices of examples worth a look: longest, cut, with least and most targets, then evenly over
    the data.
    """
    table = corpus.table
    each = SHOWN // 6
    cut = np.flatnonzero(table["split"] | (table["cut_tokens"] > 0))
    step = max(len(cut) // each, 1)
    share = corpus.targets / np.maximum(corpus.lengths, 1)
    by_length = np.argsort(-corpus.lengths, kind="stable")
    by_share = np.argsort(share, kind="stable")
    evenly_spaced = evenly(len(corpus), SHOWN)
    picks = [by_length[:each], cut[::step][:each], by_share[:each], evenly_spaced]
    all_picks = np.concatenate(picks).tolist()
    different = list(dict.fromkeys(all_picks))
    return different[:SHOWN]


def _row(shown: View) -> dict[str, object]:
    row = asdict(shown)
    weights = np.array(row.pop("weights"), np.float64)
    runs: list[list[float]] = []
    for start in np.flatnonzero(np.diff(weights, prepend=np.nan) != 0):
        weight = round(float(weights[start]), 6)
        runs.append([int(start), weight])
    return {
        **row,
        "targets": shown.targets,
        "special": [i for i, special in enumerate(shown.special) if special],
        "spelled": [i for i, spelled in enumerate(shown.spelled) if spelled],
        "runs": runs,  # of equal weights
    }


def _steps(config: Config, corpus: Corpus) -> dict[str, object]:
    """Tokens and targets of (at most `POINTS`) evenly spaced steps."""
    plan = plan_of(corpus, config)
    numbers: list[int] = []
    tokens: list[int] = []
    targets: list[int] = []
    for step in evenly(plan.num_steps, POINTS):
        members = plan.examples(step)
        numbers.append(step + 1)
        tokens.append(int(corpus.lengths[members].sum()))
        targets.append(int(corpus.targets[members].sum()))
    return {"count": plan.num_steps, "step": numbers, "tokens": tokens, "targets": targets}
