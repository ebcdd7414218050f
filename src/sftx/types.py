"""The shared vocabulary: what the data layer hands to the model layer, and what a run reports.

Numpy only, so that everything that looks at data works without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple, Required, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from sftx.printable import printable

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]
Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
"""A value as it stands in a file of JSON."""
ONE_EACH = "one sequence per turn"
"""The ledger's note for rows whose turns cannot share a sequence: the template writes earlier ones
otherwise then.
"""


def joined_notes(*notes: str) -> str:
    """What was done, one note after another, without those that say nothing."""
    return "; ".join(filter(None, notes))


class UserError(ValueError):
    """A mistake in the user's input: shown as one message, without a traceback, exit code 2.

    What a terminal would obey in the message is written as an escape.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class Ended(SystemExit):
    """A run that ends early, for a reason it can say."""

    exit_code: int

    def __init__(self, message: str) -> None:
        super().__init__(self.exit_code)
        self.message = message


KINDS = (
    "context",
    "output",
    "reasoning",
    "text",
    "prompt",
    "system",
    "developer",
    "user",
    "tool",
)
"""The kinds of text that tokens are counted by. `context`: what no other kind holds, such as the
headers that a template writes.
"""
SAID = ("output", "reasoning", "text")
"""The kinds of what a model says."""


class RowError(UserError):
    """A mistake in one row. The message names the field; whoever knows the row's place puts
    `file:line: ` before it.
    """


class Function(TypedDict):
    """What a call asks for; `arguments` is an object, or text that is not JSON."""

    name: str
    arguments: Json


class ToolCall(TypedDict, total=False):
    """A call of a tool in a message."""

    type: str
    id: str
    function: Required[Function]


class Message(TypedDict, total=False):
    """One turn of a conversation, in the OpenAI shape that chat templates read."""

    role: Required[str]
    content: Required[str]
    reasoning_content: str
    tool_calls: list[ToolCall]
    tool_call_id: str
    name: str
    weight: float
    train: bool


class Phrase(NamedTuple):
    """A piece of text in a row and its weight as a target: 0 for a prompt, 1 for an output."""

    text: str
    weight: float


@dataclass(
    slots=True
)  # not frozen: there are very many, and it takes three times as long to make one
class Row:
    """One row of data, whatever file format it came from, before it becomes tokens.

    Exactly one of the five contents is set, named by `kind`: `text` (every token is a target),
    `phrases` (alternating prompts and outputs, with no roles), `messages` (with `tools` and
    `template_kwargs`), `segments` (joined exactly as they stand, nothing added but what they say),
    `tokens` (`ids` with `weights`). All weights are still to be multiplied by that of the row,
    `weight`. `prompts`: which messages are the prompt of a pair or an Alpaca row.
    """

    kind: Literal["text", "phrases", "messages", "segments", "tokens"]
    text: str = ""
    phrases: tuple[Phrase, ...] = ()  # also holds the segments
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Json], ...] = ()
    template_kwargs: dict[str, Json] = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()  # what was changed while reading, for the ledger
    weight: float = 1.0
    prompts: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A sequence of tokens and the weight of each as a target.

    `ids` int32[T]; `weights` float32[T]: the weight of predicting `ids[t]` from `ids[:t]`. 0 means
    context only. `weights[0]` is always 0: nothing stands before it. `note` says what was done to
    the row, if anything ("split 2 of 3", "forced opening closed"); `part` numbers the examples that
    came from one row. `shortened`: the row was too long, and something of its prompt is not here.
    `kinds` uint8[T]: the kind of each token, a place in `KINDS`; None where `data.weights` is not set.
    """

    ids: Int32
    weights: Float32
    note: str = ""
    part: int = 0
    shortened: bool = False
    kinds: UInt8 | None = None

    def __post_init__(self) -> None:
        if self.weights[:1].any():  # nothing stands before the first token
            weights = self.weights.copy()
            weights[0] = 0
            object.__setattr__(self, "weights", weights)

    @property
    def targets(self) -> int:
        """How many tokens carry weight."""
        return int(np.count_nonzero(self.weights))

    @property
    def said(self) -> Bools:
        """bool[T]: the tokens of what the model says, even where they weigh nothing; a prompt's are
        not, even where they weigh something.
        """
        if self.kinds is None:
            return self.weights != 0
        said = np.isin(self.kinds, [KINDS.index(kind) for kind in SAID])
        said[:1] = False  # nothing stands before it
        return said


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Segments laid end to end in one flat stream, without padding.

    The hidden state at `index[m]` predicts `label[m]` with `weight[m]`: labels are already shifted,
    so nothing downstream shifts again. `positions` restart at 0 in every segment; segment i is
    `ids[cu_seqlens[i]:cu_seqlens[i + 1]]` and sees only itself.

    With `parent`, segments share prefixes: segment i continues segment `parent[i]`, which stands
    before it in the pack (`parent[i] < i`; -1 begins anew). It sees its chain of ancestors whole and
    itself causally, and its positions continue from the parent's last. The last token of a parent
    predicts the first token of every child, so that its place is in `index` once for each.
    """

    ids: Int32  # [T]
    positions: Int32  # [T]
    cu_seqlens: Int32  # [n + 1]
    index: Int32  # [M]
    label: Int32  # [M]
    weight: Float32  # [M]
    examples: tuple[int, ...] = ()
    parent: Int32 | None = None  # [n]; None: no segment has one
    times: Int32 | None = None  # [n] examples that hold a segment; None: one each


class KindCount(TypedDict):
    """How many tokens of a kind there are, how many of them carry weight, and how much."""

    tokens: int
    targets: int
    weight: float


@dataclass(slots=True)
class Ledger:
    """Where every row went: `read == trained + split + dropped`. Rows that were cut are counted in
    `truncated` too.

    `shown`: how many different rows at least one step shows; all that were not dropped, unless the
    run is shorter than that or shows only a share of a source. `targets_shortened`: targets whose
    row was too long, and something of whose prompt is gone. `tokens_repeated`: tokens that rows
    with a sequence for each turn hold more than once.

    `kinds`: the tokens by kind of text, which add up to `tokens` and `targets`. Without
    `data.weights` they are `output` (for plain text `text`), and all else is `context`.
    """

    read: int = 0
    trained: int = 0
    split: int = 0
    dropped: int = 0
    truncated: int = 0
    shown: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    tokens_truncated: int = 0
    targets_truncated: int = 0
    targets_shortened: int = 0
    tokens_repeated: int = 0
    kinds: dict[str, KindCount] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def add(self, other: Ledger) -> None:
        """Add the counts of `other`."""
        for name, value in asdict(other).items():
            if name == "notes":
                for note, count in value.items():
                    self.notes[note] = self.notes.get(note, 0) + count
            elif name == "kinds":
                for kind, count in value.items():
                    self.count(kind, **count)
            else:
                setattr(self, name, getattr(self, name) + value)

    def count(self, kind: str, tokens: int, targets: int, weight: float) -> None:
        """Add some tokens of a kind."""
        known = self.kinds.setdefault(kind, {"tokens": 0, "targets": 0, "weight": 0.0})
        known["tokens"] += tokens
        known["targets"] += targets
        known["weight"] += weight

    def by_kind(self) -> str:
        """One line: `output 91,203 tokens (weight 91,203), user 12,000 (1,200), context 8,700 (0)`;
        empty where tokens were not told apart.
        """
        if self.kinds.keys() <= {"output", "text", "context"}:
            return ""
        parts = [
            f"{kind} {count['tokens']:,} (weight {count['weight']:,.7g})"
            for kind, count in self.kinds.items()
        ]
        return "tokens by kind: " + ", ".join(parts)

    def summary(self) -> str:
        """One line: `read 7,473 rows = trained 7,470 + split 3 + dropped 0; 91.2 % of 1,203,311
        tokens are targets`.
        """
        share = 100 * self.targets / max(self.tokens, 1)
        unseen = self.trained + self.split - self.shown
        missed = f"; {unseen:,} of these rows are in no step of this run" if unseen else ""
        kinds = self.by_kind()
        return (
            f"read {self.read:,} rows = trained {self.trained:,} + split {self.split:,} + dropped "
            f"{self.dropped:,}"
            f"{missed}; {self.examples:,} examples, {share:.1f} % of {self.tokens:,} tokens are "
            "targets" + (f"; {kinds}" if kinds else "")
        )

    def warnings(self) -> list[str]:
        """What the length limit cost and what is computed more than once, one sentence each with
        what to do.
        """
        said = []
        if self.truncated:
            lost = "of context, and no target"
            if self.targets_truncated:
                lost = f"and {self.targets_truncated:,} targets with them"
            said.append(
                f"{self.truncated:,} rows lost {self.tokens_truncated:,} tokens {lost}; "
                "raise data.max_length to keep them"
            )
        if self.targets_shortened:
            share = 100 * self.targets_shortened / max(self.targets, 1)
            said.append(
                f"{self.targets_shortened:,} targets ({share:.1f} %) stand behind a shortened "
                "prompt; "
                "raise data.max_length to train them behind the whole one"
            )
        if self.tokens_repeated:
            once = self.tokens - self.tokens_repeated
            said.append(
                f"{ONE_EACH} makes {self.tokens / max(once, 1):.1f} times the tokens "
                f"({self.tokens:,} of {once:,}), "
                "and so the time: the template writes earlier turns otherwise once others follow; "
                "a template that does "
                "not, or data.train_on: last, avoids it"
            )
        return said


@dataclass(slots=True)
class StepRecord:
    """What one optimiser step did. `seconds` is wall time; `memory` is bytes; `seconds_left` is
    what the steps that are left will take at the speed of the latest, None after the first.

    Losses are in nats per unit of weight: `loss` is the objective with what the settings' `loss`
    section adds, those in `eval` are always plain. `accuracy` is the share of the targets, by weight,
    whose argmax is right, in the model as it trains (with its dropout); a record of an older run has
    none.

    `routers`, of a mixture of experts, over all tokens of the step: `balance`, what `loss.router_aux`
    multiplies (the number of experts per token where all are chosen alike, more where they are not),
    `largest_load` and `smallest_load`, the share of the tokens that an expert of a layer gets, and
    `unused`, how many experts of all layers get no token. A router's probabilities are the softmax
    of its logits, or their sigmoids divided by their sum; `balance` is left out where its code is
    neither. None for other models.

    `loss`, `accuracy`, `grad_norm` and `routers` are None where loss or gradient was not finite: such a step was
    not applied. Step 0 stands for the model before training: it has held-out numbers alone, and the
    defaults for all else.
    """

    step: int
    num_steps: int
    epoch: float = 0.0
    loss: float | None = None
    learning_rate: float = 0.0
    grad_norm: float | None = None
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    weight: float = 0.0
    packs: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    memory: int = 0
    total_tokens: int = 0
    total_targets: int = 0
    eval: dict[str, float] | None = None
    seconds_left: float | None = None
    accuracy: float | None = None
    routers: dict[str, float] | None = None
