"""Show the exact tokens a run trains on, by row, step or pack: `sftx inspect run.yaml row=17`.

Trained tokens stand out (on a terminal by colour, in plain text between ⟦ and ⟧), a weight other
than 1 is named, and special tokens are set apart; a text that only spells one has a backslash
before it. Numbers at the left are positions. Nothing is trained and no model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from sftx.cli._inputs import encoded, tokenizer_and_length, whole_number
from sftx.cli._output import write_json
from sftx.data.encoder import Encoder
from sftx.data.plan import Plan, plan_of
from sftx.data.shared_packs import LARGER, packs_of_step, saving_of
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import View, raw_tables, views_of_pack, views_of_rows
from sftx.printable import printable
from sftx.report.inspect_page import write_page
from sftx.report.record import Run
from sftx.settings.schema import Config
from sftx.types import UserError

STAGE = "look at data"
EXAMPLE = "sftx inspect run.yaml row=17"
EXTRA = {
    "row": "Line (or row number) of the row to show; FILE:LINE where there are several files.",
    "rows": "How many rows to show from there; default 1, or the first 3 if no row is named.",
    "step": "Show the examples of this step, numbered from 1 as in metrics.jsonl.",
    "pack": "Show this pack of the step (the first is 0) only.",
    "html": "Write one self-contained page to this file: rows, filters and charts of the whole "
    "data.",
    "json": "Write what is shown, token by token, to this file.",
}
DEFAULTS = ("output=unused",)
CPU_PACK = 1024
"""Tokens per pack where neither the settings nor a run in the output folder says how many."""
# Two shades in turn, so that the borders of tokens show.
TRAINED = ("white on #14532d", "white on #166534")
CONTEXT = ("#8a8a8a", "#b2b2b2")
INDENT = "    "  # before a branch, for every shared piece that it continues
WEIGHTED = ("white on #854d0e", "white on #a16207")  # a weight other than 0 and 1
# What a terminal would obey, as signs.
VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {9: "⇥", 10: "↵\n", 127: "␡", 155: "␛"}


def run(
    config: Config,
    row: str = "",
    rows: str = "",
    step: str = "",
    pack: str = "",
    html: str = "",
    json: str = "",
) -> int:
    """Show rows (or a step, or a pack) on the terminal; write a page or JSON where asked. Returns
    0.
    """
    console = Console(highlight=False)
    tokenizer, max_length = tokenizer_and_length(config)
    _refuse_two_questions(row + rows, step, pack)
    encoder = Encoder(tokenizer, config.data, max_length)
    corpus = encoded(config, encoder) if step or html else None
    if step and corpus is not None:
        views, how = _views_of_step(config, corpus, encoder, step, pack)
        if how:
            console.print(how)
    else:
        views = _views_of_rows(config, encoder, row, rows)
    _print(views, console)
    if json:
        write_json(json, [asdict(shown) | {"targets": shown.targets} for shown in views])
    if html and corpus is not None:
        write_page(html, config, corpus, encoder, views)
        console.print(f"page written to {printable(html)}", markup=False)
    return 0


def _refuse_two_questions(row: str, step: str, pack: str) -> None:
    if row and (step or pack):
        raise UserError("sftx inspect: row and step ask for different things; name one of them")
    if pack and not step:
        raise UserError("sftx inspect: pack= needs step=")


def _print(views: Sequence[View], console: Console) -> None:
    """The examples, and what they are together."""
    for shown in views:
        for text in paint(shown, console.width, console.is_terminal):
            console.print(text, soft_wrap=True)
    weight = sum(sum(v.weights) for v in views)
    behind = sum(v.targets for v in views if v.shortened)
    shortened = f", {behind:,} targets behind a shortened prompt" if behind else ""
    number = _number_of_examples(views)
    examples = "1 example" if number == 1 else f"{number:,} examples"
    console.print(
        f"{examples}, {_counts(views)}{shortened}, total weight {weight:g}{_shared(views)}"
    )


def _views_of_rows(config: Config, encoder: Encoder, row: str, rows: str) -> list[View]:
    """The examples of `rows` rows from `row` on, or of the first three."""
    file, _, line = row.rpartition(":")
    start = whole_number("inspect: row", line) if row else None
    count = 1 if row else 3
    if rows:
        count = whole_number("inspect: rows", rows)
    with raw_tables(config) as tables:
        return views_of_rows(tables, encoder, start, file, count)


def _views_of_step(
    config: Config, corpus: Corpus, encoder: Encoder, asked: str, pack: str
) -> tuple[list[View], str]:
    """The examples of a step in pack order, or those of one of its packs, where what several share
    is one view; and how packs run, where that is not the usual way.
    """
    plan = plan_of(corpus, config)
    step = _checked_step(asked, plan.num_steps)
    facts = Run(config).facts
    share = _shares(config) and not facts.padded
    known = config.runtime.tokens_per_pack or facts.tokens_per_pack
    size = known or _usual_size(plan, corpus, share)
    (packs, *_), read = packs_of_step(plan, corpus, step - 1, size, share, padded=facts.padded)
    if pack and whole_number("inspect: pack", pack, 0) >= len(packs):
        raise UserError(f"sftx inspect: pack={pack}: step {step} has {len(packs)} packs, from 0 on")
    views: list[View] = []
    for number, members in enumerate(packs):
        if not pack or number == int(pack):
            name = f"step {step}, pack {number}"
            views += views_of_pack(members, read, corpus.place, encoder.tokenizer, name)
    if not facts.padded:
        return views, ""
    padding = f"{100 * plan.padding(size):.1f} % padding"
    return views, f"packs run padded, in batches of like lengths, {padding}"


def _usual_size(plan: Plan, corpus: Corpus, share: bool) -> int:
    """Tokens of a pack on a CPU that has memory enough."""
    if not share:
        return CPU_PACK
    worth = saving_of(plan, corpus).pack_size
    larger = min(worth, LARGER * CPU_PACK)
    return max(larger, CPU_PACK)


def _checked_step(asked: str, num_steps: int) -> int:
    step = whole_number("inspect: step", asked)
    if not 1 <= step <= num_steps:
        raise UserError(f"sftx inspect: step={step}: the run has {num_steps:,} steps, from 1 on")
    return step


def _shares(config: Config) -> bool:
    """Whether packs share prefixes: as the run in the output folder did, or as settings say."""
    facts = Run(config).facts
    if facts.mathematics and config.runtime.share_prefixes == "auto":
        return facts.shares_prefixes
    return config.runtime.share_prefixes != "off"


def _number_of_examples(views: Sequence[View]) -> int:
    """All of them pass through the pieces that begin anew."""
    return sum(v.examples for v in views if not v.depth)


def _shared(views: Sequence[View]) -> str:
    """What is saved by showing, and computing, shared pieces once."""
    once = sum(len(v.ids) for v in views)
    each = sum(v.examples * len(v.ids) for v in views)
    if once == each:
        return ""
    return f"; shared prefixes are computed once, {each:,} tokens without ({1 - once / each:.0%} saved)"


def _counts(views: Sequence[View]) -> str:
    tokens = sum(len(v.ids) for v in views)
    targets = sum(v.targets for v in views)
    return f"{tokens:,} tokens, {targets:,} targets ({100 * targets / max(tokens, 1):.1f} %)"


def paint(shown: View, width: int, colour: bool) -> Iterator[Text]:
    """The lines of one example, at most `width` cells wide, each with the position of its first
    token.
    """
    indent = INDENT * shown.depth
    head = printable(f"{indent}{_head(shown)}")
    yield Text(head + "─" * max(width - cell_len(head), 0), style="bold")
    line = Text(f"{indent}{shown.start:6d} │ ")
    for position, (piece, style) in enumerate(_pieces(shown, colour), shown.start):
        for k, text in enumerate(piece.split("\n")):
            if k or cell_len(line.plain) + cell_len(text) > max(width, 40):
                yield line
                line = Text(f"{indent}{position + (k > 0 and not text):6d} │ ")
            line.append(text, style if colour else "")
    yield line
    legend = (
        r"; \ = text that spells a special token (data.special_tokens: escape)"
        if any(shown.spelled)
        else ""
    )
    yield Text(f"{indent}         {_counts([shown])}{legend}", style="italic")
    if shown.prompt:
        yield Text(f"         a server would send: {printable(repr(shown.prompt))}", style="italic")


def _head(shown: View) -> str:
    note = f" · {shown.note}" if shown.note else ""
    if shown.examples > 1:
        return f"── {shown.place}{note} "
    return f"── {shown.place} · example {shown.part + 1} of its row{note} "


def _pieces(shown: View, colour: bool) -> Iterator[tuple[str, str]]:
    """What is printed for each token, and its style. Without colour, brackets stand around trained
    tokens.
    """
    weights = [0.0, *shown.weights, 0.0]
    for i, (text, special) in enumerate(zip(shown.texts, shown.special, strict=True)):
        before, weight, after = weights[i : i + 3]
        text = printable(text.translate(VISIBLE))
        if shown.begins_spelling(i):
            text = "\\" + text
        if weight != before and weight not in (0, 1):
            text = f"{weight:g}:{text}"
        if not colour:
            text = _bracketed(text, before, weight, after)
        style = _shades(weight)[i % 2]
        yield text, f"{style} bold underline" if special else style


def _bracketed(text: str, before: float, weight: float, after: float) -> str:
    """The text of a token with the brackets around a run of tokens of one weight, where it begins
    or ends there.
    """
    if weight != before:
        closing = "⟧" if before and weight else ""
        opening = "⟦" if weight else ""
        text = closing + opening + text
    return f"{text}⟧" if weight and not after else text


def _shades(weight: float) -> tuple[str, str]:
    if not weight:
        return CONTEXT
    return TRAINED if weight == 1 else WEIGHTED
