"""The settings of `data`: which rows, in which mixture, and how they become weighted tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sftx.settings.section import Section


class Source(Section):
    """One data set of a mixture."""

    path: str
    """A file, glob or folder, here or as a URL (s3://, gs://, hf://), or a hub data set."""
    name: str | None = None
    """Name in reports; default: the path."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of this source in the mixture, as `data.mix_by` reads it; by rows, 2.0 shows every row
    twice per epoch and 0.5 half of them: another half in each epoch, no row again before all were
    shown.
    """


class Data(Section):
    """What to train on, and how text becomes weighted tokens. `data: PATH` is short for `data:
    {train: PATH}`.
    """

    train: str | list[str | Source] | None = None
    """Training rows: a path or several (.jsonl .json .txt .csv .parquet .arrow; also .gz, .zst, a
    glob, a folder, a URL: s3://, gs://, hf://).
    """
    rows: list[Any] | None = None
    """Training rows held in memory (Python only): a list or generator of texts, [prompt, output,
    ...] lists or dictionaries. `data=ROWS` is short for `data={"rows": ROWS}`.
    """
    eval: str | list[str | Source] | None = None
    """Held-out rows, in the same forms as `train`."""
    eval_rows: list[Any] | None = None
    """Held-out rows held in memory (Python only)."""
    eval_split: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows to hold out when no held-out data is given; chosen by seed, row by
    row.
    """
    mix_by: Literal["rows", "tokens"] = "rows"
    """What the weights of `train` count: how often the `rows` of a source are shown in an epoch, or
    its share of the `tokens` of an epoch (which then has as many tokens as all sources together:
    small sources are repeated).
    """
    format: Literal[
        "auto", "text", "pairs", "dialogue", "messages", "sharegpt", "alpaca", "segments", "tokens"
    ] = "auto"
    """Shape of the rows. `auto` decides once per file from its first row; a row of another shape is
    an error.
    """
    columns: dict[str, str | None] = Field(default={})
    """New names for columns: {question: prompt, answer: completion}; a column named null is left
    out. Each must be in some row.
    """
    template: str = "auto"
    """How turns become text: `auto` = the tokenizer's chat template, without which rows of turns
    are refused; `none` = turns joined as they are, EOS after the last output; else a .jinja file or
    a bundled template: chatml, plain.
    """
    train_on: (
        Literal["all", "last"] | list[Literal["system", "developer", "user", "assistant", "tool"]]
    ) = "all"
    """Which turns are targets: `all` outputs, the `last` one only, or the turns of these roles."""
    weights: dict[
        Literal["system", "developer", "user", "assistant", "tool", "reasoning", "prompt"],
        Annotated[float, Field(ge=0, le=1e30)],
    ] = Field(default={})
    """How much the text of a turn counts by its role, a thought apart from its answer (`reasoning`),
    and the prompts of pairs, lists and Alpaca rows (`prompt`, else as `user`): {user: 0.1}. The rest:
    1 for outputs, 0 for all else.
    """
    max_length: int | None = Field(default=None, ge=2)
    """Longest example in tokens; default: the positions of the model, at most 8,192."""
    too_long: Literal["split", "truncate_left", "truncate_right", "drop", "error"] = "split"
    """What to do with a longer one. `split` keeps every target: text is cut in pieces; a dialogue
    is cut between turns where its turns fit, each piece keeping as much context as fits.
    """
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run with its file and line, or is dropped, counted and listed in
    the ledger.
    """
    forced_opening: Literal["close", "error"] = "close"
    """For templates whose prompt opens a thought that the row lacks: close it as the template does,
    or refuse.
    """
    lost_reasoning: Literal["note", "error"] = "note"
    """Reasoning of a turn that the template does not write: the row is trained without it and
    counted, or refused.
    """
    special_tokens: Literal["escape", "allow"] = "escape"
    """Text in a row that spells a special token: `escape` keeps it text; `allow` makes it the
    control token.
    """
    cache: str | None = None
    """Folder of the token cache; default: $SFTX_CACHE, else ~/.cache/sftx."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that encode; default: one per core. 0 encodes in this process."""
