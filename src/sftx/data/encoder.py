"""Rows become weighted tokens: the trained tokens of a turn are exactly what the model must produce
when served.

`Encoder.encode` takes rows in batches, so that all their text is tokenised in one call. Every kind
of row first becomes texts with weights, then token sequences, then examples of at most `max_length`
tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from sftx.data.chat.conversation import Conversation, conversation_of, marked, spells
from sftx.data.chat.limits import watched
from sftx.data.chat.skeleton import Skeleton, learn_skeleton
from sftx.data.chat.spans import APART, SpanTokenizer, TextSequence, text_sequences
from sftx.data.chat.turns import ChatTemplate, Turn
from sftx.data.shorten import shorten
from sftx.data.tokenizer import Tokenizer
from sftx.data.truncation import Fitted, TokenSequence, fit, runs
from sftx.settings.schema import Data
from sftx.types import ONE_EACH, Example, Row, RowError, UserError

DECIDES = ("template", "train_on", "too_long", "forced_opening", "special_tokens", "lost_reasoning")
"""The settings of `data` that decide, beside the length, which examples a row becomes."""
_USED = ("default", "tool_use")  # of the templates of a tokenizer
KEPT_AS_TEXT = "special tokens kept as text"
"""The note of a row whose own text spells special tokens."""
VERSION = 5  # raise it when the same rows and settings become other tokens
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
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Plan:
    """A row on its way: its texts, or its tokens if it came with them, and what was done to it."""

    texts: list[TextSequence] = field(default_factory=list)
    tokens: TokenSequence | None = None
    notes: list[str] = field(default_factory=list)
    shorten: Callable[[list[TokenSequence]], list[Fitted]] | None = (
        None  # cuts a conversation between its turns
    )


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
            name: ChatTemplate(source, tokenizer, data.forced_opening, label, data.lost_reasoning)
            for name, (source, label) in _resolve_template(data.template, tokenizer).items()
        }
        self._escape = data.special_tokens == "escape"
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
        with watched():
            return self._templates["default"].stop_id if self._templates else self.tokenizer.eos_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """All tokens that end trained outputs: `stop_id`, and what ends a tool call where that is
        another token.
        """
        with watched():
            calls = self._templates["default"].stop_ids if self._templates else frozenset()
        return calls if self.stop_id is None else calls | {self.stop_id}

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which examples a row becomes."""
        state = {name: getattr(self.data, name) for name in DECIDES} | {
            "template": {name: template.source for name, template in self._templates.items()},
            "tokenizer": self.tokenizer.fingerprint,
            "max_length": self.max_length,
            "version": VERSION,
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]

    def encode(self, rows: Sequence[Row]) -> list[Encoded | RowError]:
        """One result for each row, in order. A bad row gives its `RowError` and leaves the others
        alone.
        """
        with watched():
            plans = [self._plan(row) for row in rows]
        texts = [plan.texts for plan in plans if isinstance(plan, _Plan)]
        sequences = iter(self._spans.sequences(texts))
        return [
            plan if isinstance(plan, RowError) else self._finish(plan, next(sequences))
            for plan in plans
        ]

    def served_prompt(self, row: Row, turn: int) -> str:
        """The text that a server would send to get the answer at `turn` (an index into the messages
        or phrases).
        """
        if row.kind not in ("messages", "phrases"):
            return ""
        conversation = conversation_of(row, self.data.train_on)
        if not self._templates:
            return "".join(message["content"] for message in conversation.messages[:turn])
        with watched():
            return self.template(conversation.tools is not None).turn(conversation, turn).prompt

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
        return (
            self._templates.get("tool_use" if with_tools else "default")
            or self._templates["default"]
        )

    def _plan(self, row: Row) -> _Plan | RowError:
        idle = (
            []
            if self.data.template in ("auto", "none")
            else ["no turns: data.template is not used"]
        )
        try:
            match row.kind:
                case "text" | "segments" | "tokens" if self.data.train_on != "all":
                    raise RowError(
                        f"data.train_on: {self.data.train_on} needs turns; a row of {row.kind} "
                        "has none"
                    )
                case "text":
                    return _Plan([self._text(row.text)], notes=idle)
                case "segments":
                    chunks = [(part.text, part.weight) for part in row.phrases]
                    return _Plan([TextSequence(chunks, alone=True)], notes=idle)
                case "tokens":
                    return _Plan(tokens=self._tokens(row), notes=idle)
            conversation = conversation_of(row, self.data.train_on)
            if not conversation.trained:
                raise RowError("row has no token to learn: no turn carries weight")
            render = self._rendered if self._templates else partial(self._joined, row)
            plan = render(conversation)
            if self.data.too_long == "split":
                plan.shorten = partial(self._shortened, conversation, render)
            if not conversation.weights[-1]:
                plan.notes.append("turns after the last output left out")
            return plan
        except RowError as error:
            return error
        except RecursionError:
            return RowError("the row is nested too deeply")

    def _text(self, text: str) -> TextSequence:
        """Plain text. A BOS or EOS spelled at its ends is that token: it is neither doubled nor
        escaped.
        """
        bos, eos = (self.tokenizer.special.get(name, "") for name in ("bos_token", "eos_token"))
        begins = self.tokenizer.adds_bos or (bool(bos) and text.startswith(bos))
        text = text.removeprefix(bos).removesuffix(eos)
        return TextSequence([(text, 1.0)], eos=True, alone=True, bos=begins, context=1)

    def _tokens(self, row: Row) -> TokenSequence:
        ids, size = np.array(row.ids, dtype=np.int64), self.tokenizer.vocab_size
        bad = np.flatnonzero((ids < 0) | (ids >= size))
        if len(bad):
            raise RowError(
                f"input_ids[{bad[0]}] is {ids[bad[0]]}, outside the vocabulary of {size:,} tokens"
            )
        weights = np.array(row.weights, dtype=np.float32)
        return TokenSequence(ids.astype(np.int32), weights, spans=runs(weights))

    def _joined(self, row: Row, conversation: Conversation) -> _Plan:
        """Turns as they are, each tokenised alone, EOS after the last output, BOS before a first
        output.
        """
        if problem := self.missing_template():
            raise RowError(problem)
        if (
            conversation.tools
            or conversation.kwargs
            or any("tool_calls" in m for m in conversation.messages)
        ):
            raise RowError(
                "data.template: none cannot render tools, tool calls or chat_template_kwargs"
            )
        last = conversation.trained[-1]
        chunks = [
            (m["content"], w)
            for m, w in zip(conversation.messages, conversation.weights, strict=True)
        ]
        text, weight = chunks[last]
        chunks[last] = (text.removesuffix(self.tokenizer.special.get("eos_token", "")), weight)
        return _Plan([TextSequence(chunks[: last + 1], eos=True, alone=True, bos=None)])

    def _rendered(self, conversation: Conversation) -> _Plan:
        mark, notes = "", []
        if self._escape and spells(
            conversation, self.tokenizer.control, self.tokenizer.control_as_json
        ):
            conversation, mark = marked(conversation, self.tokenizer.control)
            notes.append(KEPT_AS_TEXT)
        turns = self._turns(conversation)
        texts = text_sequences(turns, [conversation.weights[t] for t in conversation.trained], mark)
        if len(texts) > 1:
            notes.append(ONE_EACH)
        done = {note for turn in turns if turn.note for note in turn.note.split("; ")}
        return _Plan(texts, notes=notes + sorted(done))

    def _turns(self, conversation: Conversation) -> list[Turn]:
        """The trained turns: from one rendering where the template's skeleton fits the row, else
        one by one.
        """
        template = self.template(conversation.tools is not None)
        kind = (
            template,
            json.dumps(conversation.kwargs, sort_keys=True) if conversation.kwargs else "",
        )
        if kind not in self._skeletons:
            few = len(self._skeletons) < _KINDS
            self._skeletons[kind] = (
                learn_skeleton(template, self.tokenizer, conversation.kwargs) if few else None
            )
        skeleton = self._skeletons[kind]
        turns = skeleton.turns(template, conversation) if skeleton else None
        if turns is None:
            return [template.turn(conversation, t) for t in conversation.trained]
        return turns

    def _shortened(
        self,
        conversation: Conversation,
        render: Callable[[Conversation], _Plan],
        sequences: list[TokenSequence],
    ) -> list[Fitted]:
        def again(shorter: Conversation) -> list[TokenSequence]:
            return self._spans.sequences([render(shorter).texts])[0]

        def count(texts: Sequence[str]) -> list[int]:
            return [len(ids) for ids in self.tokenizer.encode_batch(texts)]

        with watched():
            return shorten(sequences, conversation, again, count, self.max_length)

    def _finish(self, plan: _Plan, sequences: list[TokenSequence]) -> Encoded | RowError:
        sequences = sequences if plan.tokens is None else [plan.tokens]
        if not any(sequence.weights.any() for sequence in sequences):
            return RowError(
                "row has no token to learn: each target is empty, has weight 0 or has nothing "
                "before it"
            )
        encoded = Encoded([], notes=plan.notes)
        try:
            if plan.shorten and any(len(sequence.ids) > self.max_length for sequence in sequences):
                fits = plan.shorten(sequences)
            else:
                fits = [
                    fit(sequence, self.max_length, self.data.too_long) for sequence in sequences
                ]
        except RowError as error:
            return error
        for fitted in fits:
            encoded.tokens_truncated += fitted.tokens_lost
            encoded.targets_truncated += fitted.targets_lost
            for k, piece in enumerate(fitted.pieces, 1):
                part = f"split {k} of {len(fitted.pieces)}" if len(fitted.pieces) > 1 else ""
                note = "; ".join(filter(None, [piece.note, part]))
                number = len(encoded.examples)
                encoded.examples.append(
                    Example(piece.ids, piece.weights, note, number, piece.shortened)
                )
        longest = max(len(sequence.ids) for sequence in sequences)
        if any(APART in sequence.note for sequence in sequences):
            encoded.notes.append(APART)
        if not encoded.examples:
            encoded.action = "dropped"
            encoded.reason = f"{longest:,} tokens, longer than data.max_length {self.max_length:,}"
        elif any(len(fitted.pieces) > 1 for fitted in fits):
            encoded.action = "split"
            encoded.reason = f"{longest:,} tokens cut in {len(encoded.examples)} pieces"
        elif encoded.tokens_truncated:
            encoded.reason = f"{longest:,} tokens cut to data.max_length {self.max_length:,}"
        return encoded


def bundled_templates() -> list[str]:
    """Names of the templates that come with sftx."""
    folder = resources.files("sftx.data") / "templates"
    return sorted(
        entry.name.removesuffix(".jinja")
        for entry in folder.iterdir()
        if entry.name.endswith(".jinja")
    )


def _resolve_template(setting: str, tokenizer: Tokenizer) -> dict[str, tuple[str, str]]:
    """The templates by name ("default", maybe "tool_use") as (text, what to call it in messages);
    {} for none.
    """
    if setting == "none":
        return {}
    if setting == "auto":
        return {
            name: (text, "chat template")
            for name, text in tokenizer.chat_templates.items()
            if name in _USED
        }
    if setting in bundled_templates():
        text = (resources.files("sftx.data") / "templates" / f"{setting}.jinja").read_text(
            encoding="utf-8"
        )
        # A bundled template does not know the tokenizer: one that begins every text with BOS begins
        # this one so too.
        return {
            "default": (
                ("{{- bos_token -}}\n" if tokenizer.adds_bos else "") + text,
                f"template {setting}",
            )
        }
    if not Path(setting).is_file():
        raise UserError(
            f"data.template: {setting!r} is neither a file nor one of auto, none, "
            f"{', '.join(bundled_templates())}"
        )
    try:
        return {"default": (Path(setting).read_text(encoding="utf-8"), f"template {setting}")}
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.template: {setting}: cannot be read as UTF-8 text: {error}"
        ) from None
