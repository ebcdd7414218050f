"""Rows become weighted tokens: the trained tokens of a turn are exactly what the model must produce when served.

`Encoder.encode` takes rows in batches, so that all their text is tokenised in one call. Every kind of row first becomes
scripts (`Script`: sequences of texts with a weight each), then token sequences, then examples of at most `max_length`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sftx.config import Data
from sftx.data.length import TokenSequence, fit
from sftx.data.sandbox import watched
from sftx.data.template import ChatTemplate, Conversation, Turn, as_read
from sftx.data.tokenizer import Tokenizer
from sftx.types import Example, Row, RowError, UserError

VERSION = 1  # raise it when the same rows and settings become other tokens
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # characters that Unicode reserves for uses like this one


@dataclass(slots=True)
class Script:
    """One sequence as text. Chunks alternate between context (weight 0) and output; `eos` follows the last one.

    `alone`: each chunk is tokenised by itself; if not, the chunks are one text, as a server would send it. `mark` stands
    inside special tokens that are meant as ordinary text.
    """

    chunks: list[tuple[str, float]]
    eos: bool = False
    alone: bool = False
    mark: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.chunks)


@dataclass(slots=True)
class Encoded:
    """What became of one row. `action` is as in the ledger; `notes` say what was done to the row, each a fixed phrase."""

    examples: list[Example]
    action: Literal["trained", "split", "dropped"] = "trained"
    reason: str = ""
    tokens_truncated: int = 0
    targets_truncated: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Plan:
    """A row on its way: its scripts, then their sequences."""

    row: Row
    scripts: list[Script]
    sequences: list[TokenSequence] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Encoder:
    """Turns rows into examples, for one tokenizer, one template and the settings of `data`.

    `stop_id` is the token that ends a trained output: generation must stop at it. `chat_template` is the template to
    save with the trained tokenizer (None: turns are joined as they are).
    """

    def __init__(self, tokenizer: Tokenizer, data: Data, max_length: int):
        """`UserError` for a template that is not there or does not compile."""
        self.tokenizer = tokenizer
        self.data = data
        self.max_length = max_length
        sources = _resolve_template(data.template, tokenizer)
        self._templates = {
            name: ChatTemplate(source, tokenizer, data.forced_opening, label)
            for name, (source, label) in sources.items()
        }
        self._escape = data.special_tokens == "escape"

    @property
    def chat_template(self) -> str | None:
        """Text of the template that the rows are rendered with."""
        return self._templates["default"].source if self._templates else None

    @property
    def stop_id(self) -> int | None:
        """The token that ends every trained output; None if the tokenizer has no EOS and no template gives one."""
        return self._templates["default"].stop_id if self._templates else self.tokenizer.eos_id

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which examples a row becomes."""
        names = ("template", "train_on", "too_long", "forced_opening", "special_tokens")
        state = {name: getattr(self.data, name) for name in names} | {
            "template": {name: template.source for name, template in self._templates.items()},
            "tokenizer": self.tokenizer.fingerprint,
            "max_length": self.max_length,
            "version": VERSION,
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]

    def encode(self, rows: Sequence[Row]) -> list[Encoded | RowError]:
        """One result for each row, in order. A bad row gives its `RowError` and leaves the others alone."""
        results: list[Encoded | RowError | None] = [None] * len(rows)
        plans: dict[int, _Plan] = {}
        with watched():
            for i, row in enumerate(rows):
                try:
                    plans[i] = self._plan(row)
                except RowError as error:
                    results[i] = error
        self._tokenise(list(plans.values()))
        for i, plan in plans.items():
            try:
                results[i] = self._finish(plan)
            except RowError as error:
                results[i] = error
        return [result for result in results if result is not None]

    def served_prompt(self, row: Row, turn: int) -> str:
        """The text that a server would send to get the answer at `turn` (an index into the messages or phrases)."""
        scripts = self._plan(row).scripts
        if row.kind not in ("messages", "phrases") or not self._templates:
            position = min(turn, len(scripts[0].chunks)) if scripts else 0
            return "".join(text for text, _ in scripts[0].chunks[:position]) if scripts else ""
        conversation = self._conversation(row)
        with watched():
            return self.template(bool(conversation.tools)).turn(conversation, turn).prompt

    # ---- rows to scripts

    def _plan(self, row: Row) -> _Plan:
        if row.kind in ("text", "segments", "tokens") and self.data.train_on != "all":
            raise RowError(f"data.train_on: {self.data.train_on} needs turns, and a row of kind {row.kind} has none")
        match row.kind:
            case "text":
                return _Plan(row, [self._text(row.text)])
            case "segments":
                return _Plan(row, [Script([(p.text, p.weight) for p in row.phrases], alone=True)])
            case "tokens":
                return _Plan(row, [], [self._tokens(row)])
        conversation = self._conversation(row)
        if not conversation.trained:
            raise RowError("row has no token to learn: no turn has weight")
        if not self._templates:
            if row.kind == "messages" and self.data.template != "none":
                raise RowError(
                    "the tokenizer has no chat template; set data.template to a .jinja file, to a bundled template "
                    f"({', '.join(bundled_templates())}), or to none (turns joined as they are)"
                )
            return self._joined(row, conversation)
        return self._rendered(row, conversation)

    def _text(self, text: str) -> Script:
        """Plain text: a BOS or EOS spelled at its ends is that token, not doubled and not escaped."""
        special = self.tokenizer.special
        bos, eos = special.get("bos_token", ""), special.get("eos_token", "")
        begins = self.tokenizer.adds_bos or (bool(bos) and text.startswith(bos))
        text = text.removeprefix(bos) if bos else text
        text = text.removesuffix(eos) if eos else text
        return Script([*([("", 0.0)] if begins else []), (text, 1.0)], eos=True, alone=True)

    def _tokens(self, row: Row) -> TokenSequence:
        ids = np.array(row.ids, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size):
            bad = int(np.flatnonzero((ids < 0) | (ids >= self.tokenizer.vocab_size))[0])
            raise RowError(
                f"input_ids[{bad}] is {ids[bad]}, outside the vocabulary of {self.tokenizer.vocab_size:,} tokens"
            )
        weights = np.array(row.weights, dtype=np.float32)
        return TokenSequence(ids.astype(np.int32), weights, _runs(weights))

    def _conversation(self, row: Row) -> Conversation:
        train_on = self.data.train_on
        if row.kind == "phrases":
            raw: list[dict[str, Any]] = [
                {"role": "assistant" if phrase.weight else "user", "content": phrase.text, "weight": phrase.weight or 1}
                for phrase in row.phrases
            ]
        else:
            raw = [dict(message) for message in row.messages]
        roles = train_on if isinstance(train_on, list) else ["assistant"]
        chosen = [message["role"] in roles for message in raw]
        if train_on == "last":
            last = max((t for t, message in enumerate(raw) if message["role"] == "assistant"), default=-1)
            chosen = [t == last for t in range(len(raw))]
        weights = [
            float(message.get("weight", 1.0)) if message.get("train", choice) else 0.0
            for message, choice in zip(raw, chosen, strict=True)
        ]
        tools = [dict(tool) for tool in row.tools] or None
        return Conversation([as_read(message) for message in raw], weights, tools, dict(row.template_kwargs))

    def _joined(self, row: Row, conversation: Conversation) -> _Plan:
        """Turns as they are, each tokenised alone, EOS after the last output, BOS before a first output."""
        if conversation.tools or row.template_kwargs or any("tool_calls" in m for m in conversation.messages):
            raise RowError("data.template: none cannot render tools, tool calls or chat_template_kwargs")
        last = conversation.trained[-1]
        chunks = [
            (message["content"], weight)
            for message, weight in zip(conversation.messages[: last + 1], conversation.weights, strict=False)
        ]
        eos = self.tokenizer.special.get("eos_token", "")
        text, weight = chunks[-1]
        chunks[-1] = (text.removesuffix(eos) if eos else text, weight)
        return _Plan(row, [Script(chunks, eos=True, alone=True)], notes=_trailing(row, last))

    def template(self, with_tools: bool) -> ChatTemplate:
        """The template that renders rows with or without tools."""
        return self._templates.get("tool_use" if with_tools else "default") or self._templates["default"]

    def _rendered(self, row: Row, conversation: Conversation) -> _Plan:
        mark, notes = "", _trailing(row, conversation.trained[-1])
        if self._escape and self._spells_special(conversation):
            conversation, mark = self._marked(conversation)
            notes.append("special tokens kept as text")
        template = self.template(bool(conversation.tools))
        turns = [template.turn(conversation, t) for t in conversation.trained]
        weights = [conversation.weights[t] for t in conversation.trained]
        scripts = _scripts(turns, weights, mark)
        notes += sorted({turn.note for turn in turns if turn.note})
        if len(scripts) > 1:
            notes.append("one sequence per turn")
        return _Plan(row, scripts, notes=notes)

    def _spells_special(self, conversation: Conversation) -> bool:
        control = self.tokenizer.control
        for message in conversation.messages:
            for key, value in message.items():
                if key != "role" and (control.search(value) if isinstance(value, str) else _any(control, value)):
                    return True
        return _any(control, conversation.tools) or _any(control, conversation.kwargs)

    def _marked(self, conversation: Conversation) -> tuple[Conversation, str]:
        """The conversation with a reserved character inside each special token that its own text spells."""
        texts = json.dumps([conversation.messages, conversation.tools, conversation.kwargs], ensure_ascii=False)
        mark = next((mark for mark in _MARKS if mark not in texts), None)
        if mark is None:
            raise RowError("the text holds special tokens and all characters that could keep them apart")

        def broken(value: Any) -> Any:
            if isinstance(value, str):
                return self.tokenizer.control.sub(lambda m: m.group()[0] + mark + m.group()[1:], value)
            if isinstance(value, dict):
                return {broken(key): broken(item) for key, item in value.items()}
            return [broken(item) for item in value] if isinstance(value, list) else value

        return Conversation(
            broken(conversation.messages), conversation.weights, broken(conversation.tools), broken(conversation.kwargs)
        ), mark

    # ---- scripts to tokens

    def _tokenise(self, plans: list[_Plan]) -> None:
        """Fill in the sequences of all plans, with one call of the tokenizer for (almost) all their text."""
        joined = [script for plan in plans for script in plan.scripts if not script.alone and not script.mark]
        alone = [script for plan in plans for script in plan.scripts if script.alone]
        ids = dict(zip(map(id, joined), self.tokenizer.encode_batch([s.text for s in joined]), strict=True))
        parts = iter(self.tokenizer.encode_batch([t for s in alone for t, _ in s.chunks], plain=self._escape))
        for plan in plans:
            for script in plan.scripts:
                if script.alone:
                    plan.sequences.append(self._of_parts(plan.row, script, [next(parts) for _ in script.chunks]))
                else:
                    encoded = ids[id(script)] if not script.mark else self._encode(script.text, script.mark)
                    plan.sequences += self._of_text(script, encoded)

    def _encode(self, text: str, mark: str) -> list[int]:
        return self.tokenizer.encode_escaped(text, mark) if mark else self.tokenizer.encode(text)

    def _of_parts(self, row: Row, script: Script, parts: list[list[int]]) -> TokenSequence:
        """Chunks tokenised one by one; what must stand first and last is decided by the kind of row."""
        weights = [weight for _, weight in script.chunks]
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        if script.eos and eos is not None:
            parts[-1] = [*parts[-1], eos]
        first = next((weight for part, weight in zip(parts, weights, strict=True) if part), 0.0)
        starts = False
        if row.kind == "text":
            starts = len(parts) == 2
        elif row.kind in ("phrases", "messages"):
            bos = eos if bos is None else bos
            starts = first != 0
        starts = starts and bos is not None
        sequence = _sequence(
            ([[bos]] if starts and bos is not None else []) + parts, ([0.0] if starts else []) + weights
        )
        return TokenSequence(
            *sequence,
            bos=None if row.kind == "segments" else bos if starts or row.kind != "text" else None,
            begins_with_bos=starts and row.kind == "text",
            context=1 if row.kind == "text" else None,
        )

    def _of_text(self, script: Script, ids: list[int]) -> list[TokenSequence]:
        """Find the outputs of a script in the ids of its whole text.

        Text between added tokens is tokenised independently, so a border lies as many tokens after the added token
        before it as the text between them has on its own. Where the tokenizer merges letters across a border, prompt
        and output are tokenised apart, as in serving, and the next turn begins a sequence of its own.
        """
        tokenizer = self.tokenizer
        text = script.text
        array = np.array(ids, dtype=np.int32)
        places = np.flatnonzero(tokenizer.is_splitting[array])
        matches = [(m.start(), m.end()) for m in tokenizer.splitting.finditer(text)]
        borders: list[int] = []
        ends = [end for _, end in matches]
        at = 0
        for chunk, _ in script.chunks[:-1]:
            at += len(chunk)
            same = len(places) == len(matches)
            border = self._border(text, at, matches, ends, places, array, script.mark) if same else None
            if border is None:
                return self._apart(script)
            borders.append(border)
        if script.eos and tokenizer.eos_id is not None:
            array = np.append(array, np.int32(tokenizer.eos_id))
        return [self._served(array, [0, *borders, len(array)], [weight for _, weight in script.chunks], script.note)]

    def _border(
        self,
        text: str,
        at: int,
        matches: list[tuple[int, int]],
        ends: list[int],
        places: Any,
        array: Any,
        mark: str,
    ) -> int | None:
        """Index of the first token after character `at`; None if a token lies across it."""
        k = bisect.bisect_right(ends, at)
        if k == 0:
            head = self._encode(text[:at], mark)
            return len(head) if array[: len(head)].tolist() == head else None
        begin, end = matches[k - 1]
        place = int(places[k - 1])
        tail = self._tail(text[begin:at], mark) if end < at else []
        return place + 1 + len(tail) if array[place + 1 : place + 1 + len(tail)].tolist() == tail else None

    def _tail(self, text: str, mark: str) -> list[int]:
        return self._encode(text, mark)[1:]

    def _apart(self, script: Script) -> list[TokenSequence]:
        """Prompt and output tokenised apart, each output in a sequence of its own."""
        sequences = []
        prompt = ""
        for i, (chunk, weight) in enumerate(script.chunks):
            if weight:
                eos = script.eos and i == len(script.chunks) - 1 and self.tokenizer.eos_id is not None
                if script.mark:
                    output = self.tokenizer.encode_escaped("\n" + chunk, script.mark)
                    output = output[len(self.tokenizer.encode("\n")) :]
                else:
                    output = self.tokenizer.encode(chunk, inside=True)
                head = self._encode(prompt, script.mark)
                ids = np.array([*head, *output, *([self.tokenizer.eos_id] if eos else [])], dtype=np.int32)
                sequences.append(self._served(ids, [0, len(head), len(ids)], [0.0, weight], script.note))
            prompt += chunk
        return sequences

    def _served(self, ids: Any, borders: list[int], weights: list[float], note: str) -> TokenSequence:
        array = np.zeros(len(ids), dtype=np.float32)
        spans = []
        for begin, end, weight in zip(borders[:-1], borders[1:], weights, strict=True):
            if weight:
                array[begin:end] = weight
                spans.append((begin, end))
        array[:1] = 0
        begins = len(ids) > 0 and ids[0] == self.tokenizer.bos_id
        bos = self.tokenizer.bos_id if begins else None
        return TokenSequence(ids, array, tuple(spans), bos=bos, begins_with_bos=begins, note=note)

    # ---- tokens to examples

    def _finish(self, plan: _Plan) -> Encoded:
        if not any(sequence.targets for sequence in plan.sequences):
            raise RowError("row has no token to learn: every target is empty, has weight 0 or has nothing before it")
        encoded = Encoded([], notes=plan.notes)
        split = False
        for sequence in plan.sequences:
            fitted = fit(sequence, self.max_length, self.data.too_long)
            encoded.tokens_truncated += fitted.tokens_lost
            encoded.targets_truncated += fitted.targets_lost
            split |= len(fitted.pieces) > 1
            for k, piece in enumerate(fitted.pieces, 1):
                note = f"split {k} of {len(fitted.pieces)}" if len(fitted.pieces) > 1 else ""
                note = "; ".join(filter(None, [piece.note, note]))
                encoded.examples.append(Example(piece.ids, piece.weights, note, len(encoded.examples)))
        longest = max(len(sequence.ids) for sequence in plan.sequences)
        if not encoded.examples:
            encoded.action = "dropped"
            encoded.reason = f"{longest:,} tokens, longer than data.max_length {self.max_length:,}"
        elif split:
            encoded.action = "split"
            encoded.reason = f"{longest:,} tokens cut in {len(encoded.examples)} pieces"
        elif encoded.tokens_truncated:
            encoded.reason = f"{longest:,} tokens cut to data.max_length {self.max_length:,}"
        return encoded


def _scripts(turns: list[Turn], weights: list[float], mark: str) -> list[Script]:
    """Turns whose prompt continues the text so far share a sequence; the others begin one of their own."""
    scripts: list[Script] = []
    text, ends = "", False
    for turn, weight in zip(turns, weights, strict=True):
        if scripts and ends and turn.prompt.startswith(text):
            script = scripts[-1]
            script.chunks.append((turn.prompt[len(text) :], 0.0))
        else:
            script = Script([(turn.prompt, 0.0)], mark=mark)
            scripts.append(script)
        script.chunks.append((turn.output, weight))
        script.eos = not turn.ends
        script.note = turn.note or script.note
        text, ends = turn.prompt + turn.output, turn.ends
    return scripts


def _sequence(parts: list[list[int]], weights: list[float]) -> tuple[Any, Any, tuple[tuple[int, int], ...]]:
    ids = np.array([i for part in parts for i in part], dtype=np.int32)
    array = np.repeat(np.array(weights, dtype=np.float32), [len(part) for part in parts])
    array[:1] = 0  # nothing stands before the first token
    ends = np.cumsum([len(part) for part in parts]).tolist()
    spans = tuple((end - len(part), end) for end, part, w in zip(ends, parts, weights, strict=True) if w and part)
    return ids, array, spans


def _runs(weights: Any) -> tuple[tuple[int, int], ...]:
    """The (begin, end) of the stretches of weights other than 0."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights != 0, [0]]))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _any(pattern: Any, value: Any) -> bool:
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(_any(pattern, key) or _any(pattern, item) for key, item in value.items())
    return any(_any(pattern, item) for item in value) if isinstance(value, list) else False


def _trailing(row: Row, last: int) -> list[str]:
    count = len(row.messages if row.kind == "messages" else row.phrases)
    return ["turns after the last output left out"] if last + 1 < count else []


def bundled_templates() -> list[str]:
    """Names of the templates that come with sftx."""
    folder = resources.files("sftx.data") / "templates"
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))


def _resolve_template(setting: str, tokenizer: Tokenizer) -> dict[str, tuple[str, str]]:
    """The templates by name ("default", maybe "tool_use") as (text, what to call it in messages); {} for none."""
    if setting == "none":
        return {}
    if setting == "auto":
        return {
            name: (text, "chat template")
            for name, text in tokenizer.chat_templates.items()
            if name in ("default", "tool_use")
        }
    if setting in bundled_templates():
        text = (resources.files("sftx.data") / "templates" / f"{setting}.jinja").read_text(encoding="utf-8")
        # A bundled template does not know the tokenizer: one that begins every text with BOS begins this one so too.
        return {"default": (("{{- bos_token -}}\n" if tokenizer.adds_bos else "") + text, f"template {setting}")}
    if not Path(setting).is_file():
        raise UserError(
            f"data.template: {setting!r} is neither a file nor one of auto, none, {', '.join(bundled_templates())}"
        )
    return {"default": (Path(setting).read_text(encoding="utf-8"), f"template {setting}")}
