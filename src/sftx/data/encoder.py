"""Rows become weighted tokens: the trained tokens of a turn are exactly what the model must produce
when served.

`Encoder.encode` takes rows in batches, so that all their text is tokenised in one call. Every kind
of row first becomes texts with weights, then token sequences, then examples of at most `max_length`
tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from sftx.data.chat.answer import Turn
from sftx.data.chat.conversation import Conversation, conversation_of, marked, spells
from sftx.data.chat.learn_skeleton import learn_skeleton
from sftx.data.chat.limits import watched
from sftx.data.chat.skeleton import Skeleton
from sftx.data.chat.spans import APART, SpanTokenizer
from sftx.data.chat.template_files import template_texts
from sftx.data.chat.text_sequence import TextSequence, text_sequences
from sftx.data.chat.turns import ChatTemplate
from sftx.data.chat.weighing import set_weights, set_weights_joined
from sftx.data.plain import without_turns
from sftx.data.shorten import shorten
from sftx.data.tokenizer import Tokenizer
from sftx.data.truncation import Fitted, TokenSequence, fit
from sftx.settings.schema import Data
from sftx.types import ONE_EACH, Example, Row, RowError, joined_notes

DECIDES = ("template", "train_on", "too_long", "forced_opening", "special_tokens", "lost_reasoning")
"""The settings of `data` that decide, beside the length, which examples a row becomes."""
KEPT_AS_TEXT = "special tokens kept as text"
"""The note of a row whose own text spells special tokens."""
VERSION = 6  # raise it when the same rows and settings become other tokens
DEFAULT_LENGTH = 8192  # where no model says how many positions it has
_KINDS = 16  # so many kinds of rows, by their template and its settings, may have a skeleton each


@dataclass(slots=True)
class Encoded:
    """What became of one row. `action` is as in the ledger; `notes` say what was done to it, in
    fixed phrases.
    """

    examples: list[Example]
    action: Literal["trained", "split", "dropped"] = "trained"
    reason: str = ""
    tokens_truncated: int = 0
    targets_truncated: int = 0
    notes: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class _Plan:
    """A row on its way: its texts, or its tokens if it came with them, and what was done to it.
    `dropped`: why there is nothing of it.
    """

    texts: list[TextSequence] = field(default_factory=list[TextSequence])
    tokens: TokenSequence | None = None
    notes: list[str] = field(default_factory=list[str])
    conversation: Conversation | None = None
    dropped: str = ""


class Encoder:
    """Turns rows into examples, for one tokenizer, one template and the settings of `data`.

    `stop_id` is the token that ends a trained output: generation must stop at it (and at the other
    `stop_ids`). `chat_template` is the template to save with the trained tokenizer (None: turns are
    joined as they are).
    """

    def __init__(self, tokenizer: Tokenizer, data: Data, max_length: int):
        """`UserError` for a template that is not there or does not compile."""
        self.tokenizer = tokenizer
        self.data = data
        self.max_length = max_length
        self._templates = {
            name: ChatTemplate(text, tokenizer, data.forced_opening, label, data.lost_reasoning)
            for name, (text, label) in template_texts(data.template, tokenizer).items()
        }
        self._escape = data.special_tokens == "escape"
        self._weights: dict[str, float] = {**data.weights}
        self._spans = SpanTokenizer(tokenizer, self._escape)
        self._skeletons: dict[tuple[ChatTemplate, str], Skeleton | None] = {}

    @property
    def chat_template(self) -> str | None:
        """Text of the template that the rows are rendered with."""
        return self._templates["default"].source if self._templates else None

    @property
    def stop_id(self) -> int | None:
        """The token that ends every trained output; None if the tokenizer has no EOS and no
        template gives one.
        """
        if not self._templates:
            return self.tokenizer.eos_id
        with watched():
            return self._templates["default"].stop_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """All tokens that end trained outputs: `stop_id`, and what ends a tool call where that is
        another token.
        """
        if not self._templates:
            return frozenset() if self.stop_id is None else frozenset([self.stop_id])
        with watched():
            return self._templates["default"].stop_ids

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which examples a row becomes."""
        state = {name: getattr(self.data, name) for name in DECIDES} | {
            "template": {name: template.source for name, template in self._templates.items()},
            "tokenizer": self.tokenizer.fingerprint,
            "max_length": self.max_length,
            "version": VERSION,
        }
        if self.data.weights:
            state["weights"] = self.data.weights
        text = json.dumps(state, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def encode(self, rows: Sequence[Row]) -> list[Encoded | RowError]:
        """One result for each row, in order. A bad row gives its `RowError` and leaves the others
        alone.
        """
        with watched():
            plans = [self._plan(row) for row in rows]
        texts = [plan.texts for plan in plans if isinstance(plan, _Plan)]
        sequences = iter(self._spans.sequences(texts))
        results: list[Encoded | RowError] = []
        for plan in plans:
            if isinstance(plan, RowError):
                results.append(plan)
            else:
                results.append(self._finish(plan, next(sequences)))
        return results

    def missing_template(self) -> str:
        """What to say where rows of turns come and there is no chat template to write them with;
        empty if there is one, or `data.template: none` joins the turns as they are.
        """
        if self._templates or self.data.template == "none":
            return ""
        return (
            "the rows are turns, and the tokenizer has no chat template to write them with. Take "
            "an instruct model, or "
            "set data.template: plain (turns a person can read; for a base model), chatml, a "
            ".jinja file, or none "
            "(turns joined as they are, EOS after the last)"
        )

    def how_to_keep_reasoning(self) -> str:
        """What to do where the template leaves out the reasoning of turns."""
        with watched():
            return self._templates["default"].how_to_keep_thoughts()

    def template(self, with_tools: bool) -> ChatTemplate:
        """The template that renders rows with or without tools."""
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates["default"]

    def _plan(self, row: Row) -> _Plan | RowError:
        if not row.weight:
            return _Plan(dropped="the row has weight 0")
        try:
            if row.kind in ("messages", "phrases"):
                return self._plan_of_turns(row)
            return self._plan_without_turns(row)
        except RowError as error:
            return error
        except RecursionError:
            return RowError("the row is nested too deeply")

    def _plan_without_turns(self, row: Row) -> _Plan:
        if self.data.train_on != "all":
            raise RowError(
                f"data.train_on: {self.data.train_on} needs turns; a row of {row.kind} has none"
            )
        plan = _Plan()
        if self.data.template not in ("auto", "none"):
            plan.notes.append("no turns: data.template is not used")
        plan.texts, plan.tokens = without_turns(row, self.tokenizer, bool(self.data.weights))
        return plan

    def _plan_of_turns(self, row: Row) -> _Plan:
        conversation = conversation_of(row, self.data.train_on, self._weights)
        if not conversation.trained:
            raise RowError("row has no token to learn: no turn carries weight")
        plan = self._rendered(conversation)
        plan.conversation = conversation
        if not conversation.weights[-1]:
            plan.notes.append("turns after the last output left out")
        return plan

    def _rendered(self, conversation: Conversation) -> _Plan:
        if self._templates:
            return self._with_template(conversation)
        return self._joined(conversation)

    def _joined(self, conversation: Conversation) -> _Plan:
        """Turns as they are, each tokenised alone, EOS after the last output, BOS before a first
        output.
        """
        if problem := self.missing_template():
            raise RowError(problem)
        has_calls = any("tool_calls" in message for message in conversation.messages)
        if conversation.tools or conversation.kwargs or has_calls:
            raise RowError(
                "data.template: none cannot render tools, tool calls or chat_template_kwargs"
            )
        texts = [message["content"] for message in conversation.messages]
        chunks = list(zip(texts, conversation.weights, strict=True))
        del chunks[conversation.trained[-1] + 1 :]
        text, weight = chunks.pop()
        eos = self.tokenizer.special.get("eos_token", "")
        chunks.append((text.removesuffix(eos), weight))
        sequence = TextSequence(chunks, eos=True, alone=True, bos=None)
        if conversation.shares:
            set_weights_joined(sequence, conversation)
        return _Plan([sequence])

    def _with_template(self, conversation: Conversation) -> _Plan:
        mark = ""
        notes: list[str] = []
        if self._escape and spells(
            conversation, self.tokenizer.control, self.tokenizer.control_as_json
        ):
            conversation, mark = marked(conversation, self.tokenizer.control)
            notes.append(KEPT_AS_TEXT)
        turns = self._turns(conversation)
        texts = text_sequences(turns, [conversation.weights[t] for t in conversation.trained], mark)
        if len(texts) > 1:
            notes.append(ONE_EACH)
        if conversation.shares:
            template = self.template(conversation.tools is not None)
            notes += set_weights(texts, turns, conversation, template)
        done: set[str] = set()
        for turn in turns:
            if turn.note:
                done.update(turn.note.split("; "))
        return _Plan(texts, notes=notes + sorted(done))

    def _turns(self, conversation: Conversation) -> list[Turn]:
        """The trained turns: from one rendering where the template's skeleton fits the row, else
        one by one.
        """
        template = self.template(conversation.tools is not None)
        kwargs = conversation.kwargs
        kind = (template, json.dumps(kwargs, sort_keys=True) if kwargs else "")
        if kind not in self._skeletons:
            self._skeletons[kind] = None
            if len(self._skeletons) <= _KINDS:
                self._skeletons[kind] = learn_skeleton(template, self.tokenizer, kwargs)
        skeleton = self._skeletons[kind]
        if skeleton is not None:
            turns = skeleton.turns(template, conversation)
            if turns is not None:
                return turns
        return template.turns(conversation)

    def _fitted(self, plan: _Plan, sequences: list[TokenSequence]) -> list[Fitted]:
        """The sequences at most `max_length` tokens long."""
        too_long = self.data.too_long
        is_long = any(len(sequence.ids) > self.max_length for sequence in sequences)
        if plan.conversation is None or too_long != "split" or not is_long:
            return [fit(sequence, self.max_length, too_long) for sequence in sequences]

        def again(shorter: Conversation) -> list[TokenSequence]:
            return self._spans.sequences([self._rendered(shorter).texts])[0]

        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in self.tokenizer.encode_batch(texts)]

        with watched():
            return shorten(sequences, plan.conversation, again, count, self.max_length)

    def _finish(self, plan: _Plan, sequences: list[TokenSequence]) -> Encoded | RowError:
        """What became of a row that is now tokens."""
        if plan.dropped:
            return Encoded([], "dropped", plan.dropped)
        sequences = sequences if plan.tokens is None else [plan.tokens]
        if not any(sequence.weights.any() for sequence in sequences):
            return self._without_target(sequences)
        try:
            fits = self._fitted(plan, sequences)
        except RowError as error:
            return error
        encoded = Encoded([], notes=plan.notes)
        for fitted in fits:
            _add_pieces(encoded, fitted)
        if any(APART in sequence.note for sequence in sequences):
            encoded.notes.append(APART)
        self._judge(encoded, fits, max(len(sequence.ids) for sequence in sequences))
        return encoded

    def _without_target(self, sequences: list[TokenSequence]) -> Encoded | RowError:
        """A row with nothing to learn is a mistake, unless `data.weights` makes it so."""
        nothing = (
            "row has no token to learn: each target is empty, has weight 0 or has nothing before it"
        )
        if self.data.weights and any(sequence.spans for sequence in sequences):
            return Encoded([], "dropped", f"{nothing} (data.weights)")
        return RowError(nothing)

    def _judge(self, encoded: Encoded, fits: list[Fitted], longest: int) -> None:
        """Say what became of a row, whose longest sequence had so many tokens."""
        if not encoded.examples:
            encoded.action = "dropped"
            encoded.reason = f"{longest:,} tokens, longer than data.max_length {self.max_length:,}"
        elif any(len(fitted.pieces) > 1 for fitted in fits):
            encoded.action = "split"
            encoded.reason = f"{longest:,} tokens cut in {len(encoded.examples)} pieces"
        elif encoded.tokens_truncated:
            encoded.reason = f"{longest:,} tokens cut to data.max_length {self.max_length:,}"


def _add_pieces(encoded: Encoded, fitted: Fitted) -> None:
    """Add what became of one sequence to what became of its row."""
    encoded.tokens_truncated += fitted.tokens_lost
    encoded.targets_truncated += fitted.targets_lost
    count = len(fitted.pieces)
    for k, piece in enumerate(fitted.pieces, 1):
        note = piece.note
        if count > 1:
            note = joined_notes(note, f"split {k} of {count}")
        part = len(encoded.examples)
        encoded.examples.append(
            Example(piece.ids, piece.weights, note, part, piece.shortened, piece.kinds)
        )
