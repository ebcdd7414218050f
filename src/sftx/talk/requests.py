"""Requests of the OpenAI chat API, checked: what is not understood is refused, nothing is ignored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from sftx.data.sources.messages import MessageReader
from sftx.eval.sampling import Sampling
from sftx.types import Json, Message, RowError, UserError


class RequestError(UserError):
    """What is wrong with a request; `param` names its field, `status` is the HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Part(_Request):
    type: Literal["text"]
    text: str


class _Turn(_Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None


class _StreamOptions(_Request):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions, as far as it is understood.

    The fields without a meaning here (`user`, `metadata`, `store`) are taken, since they ask for
    nothing of the answer; those that would change it are refused unless they ask for what is done
    anyway.
    """

    messages: list[_Turn] = Field(min_length=1)
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as an `Assistant` takes it."""

    model: str
    messages: list[Message]
    sampling: Sampling
    stream: bool = False
    with_usage: bool = False
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Json] = field(default_factory=dict[str, Json])


def read_request(body: bytes, defaults: Sampling) -> Asked:
    """What the body of a request asks for; `defaults` where it leaves a setting of sampling open.

    Raises:
        RequestError: it is not JSON, or a field is not understood; the message names the field.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        problem = first["msg"]
        if first["type"] == "extra_forbidden":
            problem = "this field is not understood here; leave it out"
        raise RequestError(f"{place}: {problem}" if place else problem, place or None) from error
    options = request.stream_options
    turns: list[Json] = [_turn(turn) for turn in request.messages]
    try:
        messages = MessageReader(request.tools or []).read(turns, "messages")
    except RowError as error:
        raise RequestError(str(error), "messages") from error
    return Asked(
        model=request.model,
        messages=messages,
        sampling=_sampling(request, defaults),
        stream=request.stream,
        with_usage=options is not None and options.include_usage,
        tools=request.tools or None,
        kwargs=request.chat_template_kwargs,
    )


def _turn(turn: _Turn) -> dict[str, Json]:
    """A turn as a row of data has it: a reader brings calls into the shape that templates read."""
    message: dict[str, Json] = turn.model_dump(exclude_none=True)
    message.setdefault("content", "")
    if turn.role == "developer":
        message["role"] = "system"
    return message


def _sampling(request: ChatRequest, defaults: Sampling) -> Sampling:
    stop = request.stop
    if isinstance(stop, str):
        stop = [stop]
    return Sampling(
        max_tokens=request.max_completion_tokens or request.max_tokens or defaults.max_tokens,
        temperature=_or(request.temperature, defaults.temperature),
        top_p=_or(request.top_p, defaults.top_p),
        top_k=_or(request.top_k, defaults.top_k),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        seed=_or(request.seed, defaults.seed),
        stop=defaults.stop if stop is None else tuple(stop),
    )


_N = TypeVar("_N", int, float)


def _or(given: _N | None, default: _N | None) -> _N | None:
    return default if given is None else given
