"""A small endpoint that speaks the OpenAI chat API, with a page to compare answers.

For trying a model, and for programs that test it: one answer at a time. For real serving, `sftx
serve` prints the command of a real server.
"""

from __future__ import annotations

import hmac
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from ipaddress import ip_address
from itertools import chain
from typing import Any

from sftx.eval.sampling import Sampling
from sftx.report.shell import page
from sftx.talk.assistant import Answer, Assistant
from sftx.talk.requests import Asked, RequestError, read_request
from sftx.talk.thought_stream import Piece
from sftx.types import UserError

LARGEST = 8 << 20
"""Bytes of a request."""
_PATIENCE = 60.0  # seconds for a client to send its request
_FINISH = {"stop": "stop", "length": "length", "interrupted": "stop"}
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page names the rest itself
}


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Endpoint(ThreadingHTTPServer):
    """Serves `assistants` on `host` and `port` (0 = a free one). With `token`, every request but
    that of the page must carry it.

    Raises:
        UserError: the address is not this machine's alone and there is no token, or it cannot be
            used.
    """

    daemon_threads = True

    def __init__(
        self,
        assistants: Sequence[Assistant],
        sampling: Sampling,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str = "",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not token and not is_local(host):
            raise UserError(
                f"host={host} can be reached from other machines: set token= to a secret that "
                "clients must send, or keep host=127.0.0.1"
            )
        self.assistants = {assistant.name: assistant for assistant in assistants}
        self.sampling = sampling
        self.token = token
        self.say = say
        self.started = int(time.time())
        self.local = is_local(host)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"{host}:{port} cannot be used: {error}") from error

    @property
    def url(self) -> str:
        """Where it is reached."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    def page(self) -> str:
        """The page that puts answers side by side."""
        body, style, script = (
            (resources.files("sftx.talk") / f"compare.{kind}").read_text(encoding="utf-8")
            for kind in ("html", "css", "js")
        )
        data = {"models": list(self.assistants), "needsToken": bool(self.token)}
        return page("Talk to the model", body, data, script, style, connects=True)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Endpoint  # pyright: ignore[reportIncompatibleVariableOverride] - it is never another
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE

    def do_GET(self) -> None:
        """The page, the list of models, and whether the server is alive."""
        match self.path:
            case "/":
                self._send(self.server.page().encode(), "text/html; charset=utf-8")
            case "/health":
                self._json({"status": "ok"})
            case "/v1/models":
                self._answered(lambda: self._json(self._models()))
            case _:
                self._refuse(RequestError(f"nothing is served at {self.path}", None, 404))

    def do_POST(self) -> None:
        """A conversation to answer."""
        self._answered(self._complete)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the user's."""

    def _answered(self, answer: Callable[[], None]) -> None:
        """Run `answer`; what the user got wrong becomes a message of the API."""
        try:
            self._check_caller()
            answer()
        except RequestError as error:
            self._refuse(error)
        except UserError as error:  # of the template or the model's limits
            self._refuse(RequestError(str(error)))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the client has gone; so has the answer

    def _check_caller(self) -> None:
        """Refuse who has no token; on a local address, also pages of the web that a browser lets
        ask here.
        """
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.token and not hmac.compare_digest(
            given.encode(), self.server.token.encode()
        ):
            raise RequestError(
                "the token is missing or wrong: Authorization: Bearer TOKEN", None, 401
            )
        given = self.headers.get("Host", "")
        host = given.rpartition(":")[0] or given
        if self.server.local and not is_local(host.strip("[]")):
            raise RequestError(f"Host {host} is not this machine", None, 403)

    def _models(self) -> dict[str, object]:
        models = [
            {"id": name, "object": "model", "created": self.server.started, "owned_by": "sftx"}
            for name in self.server.assistants
        ]
        return {"object": "list", "data": models}

    def _complete(self) -> None:
        body = self._body()
        if self.path != "/v1/chat/completions":
            raise RequestError(f"nothing is served at {self.path}", None, 404)
        asked = read_request(body, self.server.sampling)
        assistant = self.server.assistants.get(asked.model)
        if assistant is None:
            known = ", ".join(self.server.assistants)
            raise RequestError(f"no model {asked.model!r}; there are: {known}", "model", 404)
        answer = Answer()
        pieces = assistant.stream(asked.messages, asked.sampling, answer, asked.tools, asked.kwargs)
        # Where the client goes away, the model stops.
        with closing(pieces):
            if asked.stream:
                self._stream(pieces, answer, asked)
            else:
                self._whole(pieces, answer, asked)
        speed = answer.tokens / max(answer.seconds, 1e-9)
        self.server.say(
            f"{asked.model}: {answer.prompt_tokens:,} tokens in, {answer.tokens:,} out, "
            f"{speed:.1f} a second, {answer.reason}"
        )

    def _whole(self, pieces: Iterator[Piece], answer: Answer, asked: Asked) -> None:
        """The answer in one response."""
        for _ in pieces:
            pass
        message = {**answer.message(), "refusal": None}
        if answer.calls and not answer.content:
            message["content"] = None
        choice = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = _finish(answer)
        head = _head("chat.completion", asked.model)
        self._json({**head, "choices": [choice], "usage": _usage(answer)})

    def _stream(self, pieces: Iterator[Piece], answer: Answer, asked: Asked) -> None:
        """The answer as server-sent events, a piece each."""
        first = next(pieces, None)  # before the status is sent: what is wrong shows here
        self.send_response(HTTPStatus.OK)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        head = _head("chat.completion.chunk", asked.model)
        self._event({**head, "choices": [_delta({"role": "assistant", "content": ""})]})
        for piece in chain([] if first is None else [first], pieces):
            name = "content" if piece.kind == "content" else "reasoning_content"
            self._event({**head, "choices": [_delta({name: piece.text})]})
        for number, call in enumerate(answer.calls):
            delta = _delta({"tool_calls": [{"index": number, **call}]})
            self._event({**head, "choices": [delta]})
        self._event({**head, "choices": [_delta({}, _finish(answer))]})
        if asked.with_usage:
            self._event({**head, "choices": [], "usage": _usage(answer)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _body(self) -> bytes:
        """The bytes of the request."""
        # A page of the web may send other types here without asking.
        if self.headers.get_content_type() != "application/json":
            raise RequestError("Content-Type: application/json is needed", None, 415)
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError("Content-Length is needed", None, 411)
        if int(length) > LARGEST:
            raise RequestError(f"more than {LARGEST:,} bytes are not read", None, 413)
        return self.rfile.read(int(length))

    def _event(self, value: dict[str, object]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _refuse(self, error: RequestError) -> None:
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
        told = {"message": str(error), "type": kind, "param": error.param, "code": None}
        self.close_connection = True  # its body may not have been read
        self._json({"error": told}, error.status)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def _head(kind: str, model: str) -> dict[str, object]:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _finish(answer: Answer) -> str:
    if answer.calls:
        return "tool_calls"
    return _FINISH[answer.reason]


def _delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, object]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": total,
    }
