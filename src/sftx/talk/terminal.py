"""The chat of the terminal: one conversation, commands that begin with a slash, answers as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from sftx.eval.sampling import Sampling
from sftx.printable import printable
from sftx.talk.assistant import Answer, Assistant
from sftx.talk.sampling import sampling_of
from sftx.types import Message, UserError

HELP = """\
/system TEXT      set the system message (nothing: take it away) and begin anew
/reset            begin anew
/retry            answer the last message again
/save FILE        append the conversation to a file, as a row that sftx trains on
/set KEY=VALUE    temperature, top_p, top_k, repetition_penalty, max_tokens, seed, stop
/help, /quit      this text; the end (also Ctrl-D)
A line that ends in a backslash goes on in the next. Ctrl-C ends an answer."""


class Screen:
    """Where the chat is read and written: stdin and stdout."""

    def __init__(self, thoughts: str) -> None:
        if thoughts not in ("show", "hide"):
            raise UserError(f"sftx chat thoughts={printable(thoughts)!r}: show or hide")
        self.console = Console(highlight=False, soft_wrap=True, markup=False)
        self.is_terminal = sys.stdin.isatty() and self.console.is_terminal
        self._shows_thoughts = thoughts == "show"
        if self.is_terminal:
            with suppress(ImportError):  # arrows and history, where there is readline
                import readline  # noqa: F401

    def ask(self) -> str:
        """The next message; EOFError at the end of the input."""
        lines: list[str] = []
        while True:
            line = input("> " if self.is_terminal and not lines else "")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def say(self, text: str, style: str = "") -> None:
        """A line of the program's own."""
        self.console.print(printable(text), style=style)

    def piece(self, kind: str, text: str) -> None:
        """Some characters of an answer."""
        if kind == "thought" and not self._shows_thoughts:
            return
        style = "dim italic" if kind == "thought" else ""
        self.console.print(printable(text), end="", style=style)
        self.console.file.flush()


class Chat:
    """A conversation with one assistant, or the same messages put to two: each of them goes on from
    its own answers.
    """

    def __init__(
        self, screen: Screen, assistants: Sequence[Assistant], sampling: Sampling, system: str
    ) -> None:
        self.screen = screen
        self.assistants = assistants
        self.sampling = sampling
        self.system = system
        self.histories: list[list[Message]] = []
        self._begin()

    def run(self) -> None:
        """Read and answer until the input ends or the user quits."""
        names = " and ".join(assistant.name for assistant in self.assistants)
        self.screen.say(f"{names}; /help lists the commands", "dim")
        for assistant in self.assistants:
            for note in assistant.notes:
                self.screen.say(f"note: {note}")
        while True:
            try:
                said = self.screen.ask()
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt: a new line, as in a shell
                self.screen.say("")
                continue
            if said.strip() == "/quit":
                return
            self._turn(said)

    def _turn(self, said: str) -> None:
        try:
            if said.startswith("/"):
                self._command(said)
            elif said.strip():
                for history in self.histories:
                    history.append({"role": "user", "content": said})
                self._answer()
        except UserError as error:
            self.screen.say(str(error), "bold red")

    def _command(self, said: str) -> None:
        name, _, argument = said.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/reset": lambda _: self._begin(),
            "/retry": lambda _: self._retry(),
            "/save": self._save,
            "/set": self._set,
            "/help": lambda _: self.screen.say(HELP),
        }
        if name not in commands:
            raise UserError(f"no command {printable(name)}; /help lists them")
        commands[name](argument.strip())

    def _begin(self) -> None:
        first: list[Message] = []
        if self.system:
            first.append({"role": "system", "content": self.system})
        self.histories = [list(first) for _ in self.assistants]

    def _set_system(self, text: str) -> None:
        self.system = text
        self._begin()

    def _set(self, text: str) -> None:
        key, equals, value = text.partition("=")
        if not equals:
            now = ", ".join(f"{key}={value}" for key, value in asdict(self.sampling).items())
            self.screen.say(f"now: {now} (None: as the model's folder says)")
            return
        self.sampling = sampling_of({key: value}, self.sampling)

    def _retry(self) -> None:
        for history in self.histories:
            while history and history[-1].get("role") == "assistant":
                history.pop()
        if not any(history and history[-1].get("role") == "user" for history in self.histories):
            raise UserError("there is no message to answer again")
        self._answer()

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file: /save talk.jsonl")
        if not any(message.get("role") == "assistant" for message in self.histories[0]):
            raise UserError("there is no answer to save yet")
        path = Path(name)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.histories[0]}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        self.screen.say(f"appended to {path}", "dim")

    def _answer(self) -> None:
        """Each assistant's answer to the last message; where none comes, the message is taken
        back.
        """
        for assistant, history in zip(self.assistants, self.histories, strict=True):
            if len(self.assistants) > 1:
                self.screen.say(f"--- {assistant.name}", "bold")
            answer = Answer()
            try:
                self._show(assistant, history, answer)
            except KeyboardInterrupt:
                self.screen.say("")
            except UserError:
                history.pop()
                raise
            history.append(answer.message())
            self.screen.say(_measured(answer, self.sampling), "dim")

    def _show(self, assistant: Assistant, history: Sequence[Message], answer: Answer) -> None:
        before = ""
        for piece in assistant.stream(history, self.sampling, answer):
            if before == "thought" and piece.kind == "content":
                self.screen.piece("thought", "\n\n")
            self.screen.piece(piece.kind, piece.text)
            before = piece.kind
        self.screen.say("")


def _measured(answer: Answer, sampling: Sampling) -> str:
    speed = answer.tokens / max(answer.seconds, 1e-9)
    how = {
        "stop": "ended by itself",
        "length": f"cut after max_tokens={sampling.max_tokens} or at the model's last position",
        "interrupted": "interrupted",
    }[answer.reason]
    return f"[{answer.tokens:,} tokens, {speed:.1f} a second, {how}]"
