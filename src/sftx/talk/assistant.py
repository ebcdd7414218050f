"""A model that answers conversations, token by token, as a server of its folder would."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sftx.data.chat.conversation import Conversation, as_read
from sftx.data.chat.limits import watched
from sftx.data.chat.thoughts import may_think, open_tag
from sftx.data.chat.turns import ChatTemplate
from sftx.data.tokenizer import Tokenizer
from sftx.eval.call_forms import form_of, template_of
from sftx.eval.sampling import Sampling, generation_config
from sftx.model_config import positions_in
from sftx.talk.call_stream import CallStream
from sftx.talk.thought_stream import Piece, ThoughtStream
from sftx.types import Function, Json, Message, ToolCall, UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel

Reason = Literal["stop", "length", "interrupted"]
"""Why an answer ended: a stop token or stop text, the limit, or the reader."""


@dataclass(slots=True)
class Answer:
    """A whole answer, or what there was of it when it ended."""

    thought: str = ""
    content: str = ""
    reason: Reason = "interrupted"
    prompt_tokens: int = 0
    seconds: float = 0.0
    ids: list[int] = field(default_factory=list[int])  # of the tokens generated
    calls: list[ToolCall] = field(default_factory=list[ToolCall])  # of tools

    @property
    def tokens(self) -> int:
        """How many tokens were generated, the stop token included."""
        return len(self.ids)

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        if piece.kind == "thought":
            self.thought += piece.text
        else:
            self.content += piece.text

    def message(self) -> Message:
        """The answer as a turn of the conversation that goes on."""
        message: Message = {"role": "assistant", "content": self.content}
        if self.thought:
            message["reasoning_content"] = self.thought
        if self.calls:
            message["tool_calls"] = self.calls
        return message


class Assistant:
    """Answers with `model`, or with its base where `adapter` is given and `base` is true.

    The prompt is the rendering of the chat template, with a generation prompt; generation stops at
    the tokens at which servers stop: the tokenizer's EOS and those of generation_config.json.
    `templates`: by name, "default" and maybe "tool_use"; without any the contents of the turns are
    joined as they are. `calls`: how the model writes tool calls, where its folder says so
    (`response_template`). Of assistants that share one `lock` one at a time answers.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        templates: Mapping[str, ChatTemplate],
        lock: Lock,
        adapter: PeftModel | None = None,
        base: bool = False,
        calls: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._templates = templates
        self._calls = calls
        self._lock = lock
        self._adapter = adapter
        self._base = base

    @property
    def notes(self) -> list[str]:
        """What a user should know: a stop token that was trained, but that no server knows."""
        template = self._template(with_tools=False)
        if template is None:
            return []
        with watched():
            stop = template.stop_id
        if stop is None or stop in self._tokenizer.stop_ids:
            return []
        text = self._tokenizer.backend.id_to_token(stop)
        return [
            f"{self.name}: the template ends its turns with {text}, at which no server stops: "
            "eos_token_id in generation_config.json lacks it"
        ]

    @property
    def positions(self) -> int | None:
        """How many tokens prompt and answer may have together; None where the model sets no
        limit.
        """
        return positions_in(self._model.config.get_text_config().to_dict())

    def prompt(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Json] | None = None,
    ) -> str:
        """The text that asks for the next answer.

        Raises:
            UserError: the template refuses the conversation, or does not write its tools.
        """
        template = self._template(with_tools=bool(tools))
        text = self._rendered(template, messages, tools, kwargs)
        if tools and self._rendered(template, messages, None, kwargs) == text:
            raise UserError(
                "tools: the chat template does not write tools into the prompt, so the model would "
                "not know them; leave them out"
            )
        return text

    def _rendered(
        self,
        template: ChatTemplate | None,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        kwargs: dict[str, Json] | None,
    ) -> str:
        if template is None:
            return "".join(message.get("content", "") for message in messages)
        read = [as_read(message) for message in messages]
        conversation = Conversation(read, [0.0] * len(read), tools or None, kwargs or {})
        with watched():
            return template.render(conversation, len(read), True)

    def _template(self, with_tools: bool) -> ChatTemplate | None:
        """The template that writes conversations with or without tools."""
        default = self._templates.get("default")
        if with_tools:
            return self._templates.get("tool_use", default)
        return default

    @cached_property
    def call_template(self) -> dict[str, Any] | None:
        """How the model writes tool calls, as transformers takes it; None where that is not known."""
        if self._calls is not None:
            return self._calls
        template = self._template(with_tools=True)
        if template is None:
            return None
        with watched():
            form = form_of(template)
        return template_of(form) if form else None

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        answer: Answer,
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Json] | None = None,
    ) -> Generator[Piece]:
        """The answer to a conversation, piece by piece, while `answer` is filled with it. Where the
        reader stops, the model stops within a token.

        Raises:
            UserError: the template refuses the conversation, or it fills all positions.
        """
        text = self.prompt(messages, tools, kwargs)
        ids = self._tokenizer.encode(text)
        if not self._templates and self._tokenizer.adds_bos:
            ids = [self._tokenizer.bos_id or 0, *ids]
        room = self._room(len(ids), sampling)
        answer.prompt_tokens = len(ids)
        began = time.perf_counter()
        try:
            template = self.call_template if tools else None
            calls = CallStream(template, tools or [], self._tokenizer.control)
            yield from self._pieces(ids, open_tag(text), room, sampling, answer, calls)
        finally:
            answer.seconds = time.perf_counter() - began

    def _room(self, prompt: int, sampling: Sampling) -> int:
        """Most tokens of the answer to a prompt of so many."""
        if self.positions is None:
            return sampling.max_tokens
        if prompt >= self.positions:
            raise UserError(
                f"the conversation has {prompt:,} tokens, and the model has "
                f"{self.positions:,} positions: begin a new one"
            )
        return min(sampling.max_tokens, self.positions - prompt)

    def _pieces(
        self,
        ids: list[int],
        tag: str,
        room: int,
        sampling: Sampling,
        answer: Answer,
        calls: CallStream,
    ) -> Iterator[Piece]:
        thoughts = ThoughtStream(tag)
        stops = StopTexts(sampling.stop)
        reason: Reason = "length"
        with closing(self._generated(ids, room, sampling)) as tokens:
            for text in self._texts(tokens, answer, calls.reads):
                for piece in thoughts.feed(stops.feed(text)):
                    yield from _without_calls(piece, calls, answer)
                if stops.found:
                    break
        if stops.found or (answer.ids and answer.ids[-1] in self._tokenizer.stop_ids):
            reason = "stop"
        for piece in [*thoughts.feed(stops.rest()), *thoughts.end()]:
            yield from _without_calls(piece, calls, answer)
        if rest := calls.end():
            answer.add(Piece("content", rest))
            yield Piece("content", rest)
        answer.calls = [_as_call(name, arguments) for name, arguments in calls.calls]
        answer.reason = reason

    def _texts(self, tokens: Iterator[int], answer: Answer, with_calls: bool) -> Iterator[str]:
        """What each token adds to the text, up to a stop token. Special tokens add nothing, as with
        a server, but for those that mark a thought (`with_calls`: or may mark a call); nor does half
        a character at the end.
        """
        decoder = DecodeStream(skip_special_tokens=False)
        for token in tokens:
            answer.ids.append(token)
            if token in self._tokenizer.stop_ids:
                return
            text = decoder.step(self._tokenizer.backend, token) or ""
            is_mark = with_calls or may_think(text)
            if token in self._tokenizer.control_ids and not is_mark:
                continue
            yield text

    def _generated(self, ids: list[int], room: int, sampling: Sampling) -> Generator[int]:
        """The tokens that transformers' `generate` finds in a thread of its own; closing this stops
        it.
        """
        stop = Event()
        tokens = _Tokens()
        config = self._config(room, sampling)

        def work() -> None:
            try:
                with self._lock, self._serving():
                    if sampling.seed is not None:
                        torch.manual_seed(sampling.seed)
                    self._generate(ids, config, tokens, stop)
            except BaseException as error:  # raised again where the tokens are read
                tokens.found.put(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while (token := tokens.found.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            stop.set()
            thread.join()

    def _generate(
        self, ids: list[int], config: GenerationConfig, tokens: _Tokens, stop: Event
    ) -> None:
        device = next(self._model.parameters()).device
        given = torch.tensor([ids], device=device)
        self._model.generate(  # pyright: ignore[reportCallIssue] - transformers adds it to causal models
            input_ids=given,
            attention_mask=torch.ones_like(given),
            generation_config=config,
            streamer=tokens,
            stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
        )

    def _serving(self) -> AbstractContextManager[Any]:
        """Inside, the model is the one that is to answer."""
        if self._adapter is None or not self._base:
            return nullcontext()
        return self._adapter.disable_adapter()

    def _config(self, room: int, sampling: Sampling) -> GenerationConfig:
        stops = sorted(self._tokenizer.stop_ids)
        config = generation_config(self._model, stops, room, sampling)
        config.num_beams = 1  # answers are shown while they are found
        return config


def _without_calls(piece: Piece, calls: CallStream, answer: Answer) -> Iterator[Piece]:
    """A piece of an answer without what belongs to a call, added to the answer."""
    if piece.kind == "content":
        piece = Piece("content", calls.feed(piece.text))
    if piece.text:
        answer.add(piece)
        yield piece


def _as_call(name: str, arguments: dict[str, Any]) -> ToolCall:
    """A call as the OpenAI API writes it: the arguments are JSON text."""
    written = json.dumps(arguments, ensure_ascii=False)
    made: Function = {"name": name, "arguments": written}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": made}


class StopTexts:
    """Lets the text of an answer through up to the first of some texts; `found` tells that one has
    come. What may be the beginning of one is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = [stop for stop in stops if stop]
        self._pattern = re.compile("|".join(map(re.escape, self._stops)) or "(?!)")
        self._longest = max(map(len, self._stops), default=1)
        self._held = ""

    def feed(self, text: str) -> str:
        """What may be shown now that `text` has come."""
        if self.found:
            return ""
        self._held += text
        match = self._pattern.search(self._held)
        if match:
            self.found = True
            shown = self._held[: match.start()]
            self._held = ""
            return shown
        keep = self._longest - 1
        certain = len(self._held) - keep if keep else len(self._held)
        shown = self._held[: max(certain, 0)]
        self._held = self._held[max(certain, 0) :]
        return shown

    def rest(self) -> str:
        """What was held back, when the answer has ended."""
        rest = self._held
        self._held = ""
        return rest


class _Tokens(BaseStreamer):
    """Receives what `generate` finds: the prompt first, then each token, then the end (None)."""

    def __init__(self) -> None:
        self.found: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self._prompt_came = False

    def put(self, value: Tensor) -> None:
        """Take the ids that `generate` hands over."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        for token in value.flatten().tolist():
            self.found.put(token)

    def end(self) -> None:
        """There are no more."""
        self.found.put(None)


class _Stopped(StoppingCriteria):
    """Ends generation once `stop` is set."""

    def __init__(self, stop: Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        """bool[batch]: whether each answer ends here."""
        return torch.full((input_ids.shape[0],), self._stop.is_set(), device=input_ids.device)
