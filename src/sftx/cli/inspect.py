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
from sftx.data.plan import plan_of
from sftx.data.store.corpus import Corpus
from sftx.data.token_view import View, raw_tables, view, views_of_rows
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
CPU_PACK = (
    1024  # tokens per pack where neither the settings nor a run in the output folder says how many
)
TRAINED = (
    "white on #14532d",
    "white on #166534",
)  # two shades in turn, so that the borders of tokens show
CONTEXT = ("#8a8a8a", "#b2b2b2")
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
    if (step or pack) and (row or rows):
        raise UserError("sftx inspect: row and step ask for different things; name one of them")
    if pack and not step:
        raise UserError("sftx inspect: pack= needs step=")
    encoder = Encoder(tokenizer, config.data, max_length)
    corpus: Corpus | None = None
    if step or html:
        corpus = encoded(config, encoder)
    if step:
        assert corpus is not None
        views, how = _views_of_step(config, corpus, encoder, step, pack)
        if how:
            console.print(how)
    else:
        file, _, line = row.rpartition(":")
        count = whole_number("inspect: rows", rows) if rows else 1 if row else 3
        start = whole_number("inspect: row", line) if row else None
        with raw_tables(config) as tables:
            views = views_of_rows(tables, encoder, start, file, count)
    for shown in views:
        for text in paint(shown, console.width, console.is_terminal):
            console.print(text, soft_wrap=True)
    weight = sum(sum(v.weights) for v in views)
    behind = sum(v.targets for v in views if v.shortened)
    shortened = f", {behind:,} targets behind a shortened prompt" if behind else ""
    console.print(f"{len(views)} examples, {_counts(views)}{shortened}, total weight {weight:g}")
    if json:
        write_json(json, [asdict(shown) | {"targets": shown.targets} for shown in views])
    if html:
        assert corpus is not None
        write_page(html, config, corpus, encoder, views)
        console.print(f"page written to {printable(html)}", markup=False)
    return 0


def _views_of_step(
    config: Config, corpus: Corpus, encoder: Encoder, asked: str, pack: str
) -> tuple[list[View], str]:
    """The examples of a step in pack order, or those of one of its packs; and how packs run, where
    that is not the usual way.
    """
    step = whole_number("inspect: step", asked)
    plan = plan_of(corpus, config)
    if not 1 <= step <= plan.num_steps:
        raise UserError(
            f"sftx inspect: step={step}: the run has {plan.num_steps:,} steps, from 1 on"
        )
    facts = Run(config).facts
    size = config.runtime.tokens_per_pack or facts.tokens_per_pack or CPU_PACK
    packs = plan.packs(step - 1, size, padded=facts.padded)[0]
    if pack and whole_number("inspect: pack", pack, 0) >= len(packs):
        raise UserError(f"sftx inspect: pack={pack}: step {step} has {len(packs)} packs, from 0 on")
    views = [
        view(corpus.example(i), encoder.tokenizer, f"step {step}, pack {number}: {corpus.place(i)}")
        for number, members in enumerate(packs)
        for i in members
        if not pack or number == int(pack)
    ]
    padding = f"{100 * plan.padding(size):.1f} % padding"
    how = f"packs run padded, in batches of like lengths, {padding}" if facts.padded else ""
    return views, how


def _counts(views: Sequence[View]) -> str:
    tokens, targets = sum(len(v.ids) for v in views), sum(v.targets for v in views)
    return f"{tokens:,} tokens, {targets:,} targets ({100 * targets / max(tokens, 1):.1f} %)"


def paint(shown: View, width: int, colour: bool) -> Iterator[Text]:
    """The lines of one example, at most `width` cells wide, each with the position of its first
    token.
    """
    note = f" · {shown.note}" if shown.note else ""
    head = f"── {shown.place} · example {shown.part + 1} of its row{note} "
    head = printable(head)
    yield Text(head + "─" * max(width - cell_len(head), 0), style="bold")
    line = Text("     0 │ ")
    for position, (piece, style) in enumerate(_pieces(shown, colour)):
        for k, text in enumerate(piece.split("\n")):
            if k or cell_len(line.plain) + cell_len(text) > max(width, 40):
                yield line
                line = Text(f"{position + (k > 0 and not text):6d} │ ")
            line.append(text, style if colour else "")
    yield line
    legend = (
        r"; \ = text that spells a special token (data.special_tokens: escape)"
        if any(shown.spelled)
        else ""
    )
    yield Text(f"         {_counts([shown])}{legend}", style="italic")
    if shown.prompt:
        yield Text(f"         a server would send: {printable(repr(shown.prompt))}", style="italic")


def _pieces(shown: View, colour: bool) -> Iterator[tuple[str, str]]:
    """What is printed for each token, and its style. Without colour, brackets stand around trained
    tokens.
    """
    weights = [0.0, *shown.weights, 0.0]
    for i, (text, special) in enumerate(zip(shown.texts, shown.special, strict=True)):
        before, weight, after = weights[i : i + 3]
        text = ("\\" if shown.begins_spelling(i) else "") + printable(text.translate(VISIBLE))
        named = f"{weight:g}:" if weight != before and weight not in (0, 1) else ""
        if colour:
            text = named + text
        elif weight != before:
            text = ("⟧" if before and weight else "") + ("⟦" if weight else "") + named + text
        if not colour and weight and not after:
            text += "⟧"
        shades = CONTEXT if not weight else TRAINED if weight == 1 else WEIGHTED
        yield text, shades[i % 2] + (" bold underline" if special else "")
