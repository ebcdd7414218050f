"""An Ollama Modelfile beside a GGUF file.

Ollama writes prompts with a template of its own language. Where a chat template writes every message
as the same text around it, whatever stands before and after, it is written in that language and
compared with the original; else the Modelfile holds no template, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Render = Callable[[list[dict[str, str]]], str]
"""The chat template: from messages to the prompt for the next answer. It may raise ValueError."""

_TRIES: Sequence[Sequence[str]] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a template writes: before a first message that is no system message, around the message of
    each role, and before the answer.
    """

    without_system: str
    around: Mapping[str, tuple[str, str]]
    answer: str

    def write(self, messages: Sequence[dict[str, str]]) -> str:
        """What Ollama would write with `as_template`."""
        text = "" if messages[0]["role"] == "system" else self.without_system
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer

    def as_template(self) -> str:
        """The same in Ollama's language (Go's)."""
        text = ""
        if self.without_system:
            is_system = 'eq (index .Messages 0).Role "system"'
            text = f"{{{{ if not ({is_system}) }}}}{self.without_system}{{{{ end }}}}"
        text += "{{ range .Messages }}"
        for number, (role, (before, after)) in enumerate(self.around.items()):
            word = "else if" if number else "if"
            text += f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        return text + "{{ end }}{{ end }}" + self.answer


def pieces_of(render: Render, bos: str) -> Pieces | None:
    """The pieces of a chat template; None where it cannot be told in pieces. `bos` is the text that
    llama.cpp puts before a prompt by itself: it is left out.
    """
    for has_system in (True, False):
        tries = [roles for roles in _TRIES if has_system or "system" not in roles]
        try:
            pieces = _taken_apart(render, has_system)
            found = pieces is not None and all(_agrees(pieces, render, roles) for roles in tries)
        except ValueError:  # the template takes no such messages
            continue
        if pieces is not None and found:
            around = dict(pieces.around)
            if has_system:
                before, after = around["system"]
                around["system"] = (before.removeprefix(bos), after)
            return Pieces(pieces.without_system.removeprefix(bos), around, pieces.answer)
    return None


def _messages(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"Said{at}by{role}."} for at, role in enumerate(roles)]


def _gaps(render: Render, roles: Sequence[str]) -> list[str]:
    """What stands before, between and after the messages; ValueError where one is not written."""
    said = _messages(roles)
    rest = render(said)
    gaps: list[str] = []
    for message in said:
        before, found, rest = rest.partition(message["content"])
        if not found:
            raise ValueError(f"the template does not write a message of {message['role']}")
        gaps.append(before)
    return [*gaps, rest]


def _taken_apart(render: Render, has_system: bool) -> Pieces | None:
    """The pieces as renderings show them. An answer begins with all that follows its question: where
    one ends and the other begins makes no difference.
    """
    start, between, again, answer = _gaps(render, ("user", "assistant", "user"))
    if between != answer:
        return None  # an answer does not begin as its prompt ends
    befores = [start, again]
    opening = ""
    if has_system:
        opening, after_system, _ = _gaps(render, ("system", "user"))
        befores.append(after_system)
    user_begins = _common_tail(befores)
    around = {"system": (opening, befores[-1].removesuffix(user_begins))} if has_system else {}
    around |= {
        "user": (user_begins, ""),
        "assistant": (answer, again.removesuffix(user_begins)),
    }
    return Pieces(start.removesuffix(user_begins), around, answer)


def _common_tail(texts: Sequence[str]) -> str:
    """The longest text that all end with."""
    tail = min(texts, key=len)
    while not all(text.endswith(tail) for text in texts):
        tail = tail[1:]
    return tail


def _agrees(pieces: Pieces, render: Render, roles: Sequence[str]) -> bool:
    messages = _messages(roles)
    return pieces.write(messages) == render(messages)


def modelfile(file: str, pieces: Pieces | None, stops: Sequence[str]) -> str:
    """The text of the Modelfile for a GGUF file of that name; `stops` are the texts of the tokens at
    which it stops.
    """
    lines = [f"FROM ./{file}"]
    template = "" if pieces is None else pieces.as_template()
    written = [pieces.without_system, pieces.answer] if pieces else []
    if template and not any(mark in text for text in written for mark in ('"""', "{{", "}}")):
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append(
            "# The chat template of this model cannot be written in Ollama's language: Ollama would\n"
            "# send other prompts than were trained. llama.cpp takes it from the GGUF file:\n"
            f"# llama-server -m {file} --jinja"
        )
    for stop in stops:
        if '"' not in stop and stop.isprintable():
            lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"
