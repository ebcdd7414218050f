"""The skeleton of a template, learned from the turns of a few probes.

Whatever a skeleton claims is tried: it is kept only where it gives the same turns as rendering a
probe turn by turn.
"""

from __future__ import annotations

from dataclasses import replace
from os.path import commonprefix

from sftx.data.chat.answer import Turn, last_added
from sftx.data.chat.conversation import ChatMessage, Conversation
from sftx.data.chat.renderer import MODEL, NEXT, TOOLS, USER, calls, result, says, says_calls
from sftx.data.chat.skeleton import Skeleton
from sftx.data.chat.turns import ChatTemplate
from sftx.data.tokenizer import Tokenizer
from sftx.types import Json, RowError

_WORDS = (USER, MODEL, NEXT, "qzfirstqz", "qzsecondqz", "qzthirdqz")
"""What users and answers say in the probe of plain turns."""
_SYSTEM = says("system", "qzsystemqz")


def learn_skeleton(
    template: ChatTemplate, tokenizer: Tokenizer, kwargs: dict[str, Json]
) -> Skeleton | None:
    """The skeleton of a template with these settings of a row, if the turns of a probe fit one."""
    messages: list[ChatMessage] = []
    for i, word in enumerate(_WORDS):
        role = "assistant" if i % 2 else "user"
        messages.append(says(role, word))
    conversation = Conversation(messages, [0.0, 1.0] * 3, None, kwargs)
    skeleton = _of_plain_turns(template, conversation)
    if skeleton is None or not _agrees(skeleton, template, conversation):
        return None
    one_turn = Conversation(messages[:2], [0.0, 1.0], None, kwargs)
    if not _agrees(skeleton, template, one_turn):
        return None
    skeleton = _with_headers(skeleton, template, tokenizer, kwargs)
    return _with_system(skeleton, template, messages, kwargs)


def _of_plain_turns(template: ChatTemplate, conversation: Conversation) -> Skeleton | None:
    """The texts between the `_WORDS` of three plain turns; None if they do not stand in order."""
    try:
        turns = template.turns(conversation)
        first, second, third = turns
        text = template.render(conversation, len(_WORDS), False, **first.switch)
    except RowError:
        return None
    begins = [text.find(word) for word in _WORDS]
    if -1 in begins or sorted(begins) != begins:
        return None
    for turn in (second, third):
        if turn.ends != first.ends or turn.note != first.note:
            return None
    ends: list[int] = []
    for begin, word in zip(begins, _WORDS, strict=True):
        ends.append(begin + len(word))
    lead, _, close = first.output.partition(MODEL)
    return Skeleton(
        gap=text[ends[0] : begins[1]],
        between=text[ends[1] : begins[2]],
        last_gap=text[ends[4] : begins[5]],
        last_close=text[ends[5] :],
        served=first.prompt[ends[0] :],
        lead=lead,
        close=close,
        ends=first.ends,
        note=first.note,
        switch=first.switch,
        joined=all(text.startswith(turn.prompt + turn.output) for turn in (first, second)),
    )


def _calls_probe(
    kwargs: dict[str, Json],
    *,
    system: bool = False,
    parallel: bool = False,
    interrupted: bool = False,
) -> Conversation:
    """A conversation with plain answers and with calls behind users and behind results."""
    call = calls({"qz": 1})
    answer = result("qzresultqz")
    called = [says_calls(call), answer]
    called_again = called
    if parallel:
        other_call = calls({"qz": 2}, 1, "qzother")
        other_answer = result("qzresultqz", 1, "qzother")
        called_again = [says_calls(call, other_call), answer, other_answer]
    messages: list[ChatMessage] = []
    if system:
        messages.append(_SYSTEM)
    messages += [says("user", USER), *called, says("assistant", "qzfirstqz")]
    messages += [says("user", NEXT), *called, *called_again, says("assistant", MODEL)]
    if interrupted:
        messages += [says("user", "qzsecondqz"), *called]
        messages += [says("user", "qzthirdqz"), says("assistant", "qzlastqz")]
    weights = [float(message["role"] == "assistant") for message in messages]
    return Conversation(messages, weights, TOOLS, kwargs)


def _with_headers(
    skeleton: Skeleton, template: ChatTemplate, tokenizer: Tokenizer, kwargs: dict[str, Json]
) -> Skeleton:
    """The skeleton, for conversations with tool calls too if their turns can be told apart by their
    headers.
    """
    if skeleton.note or skeleton.switch:
        return skeleton
    conversation = _calls_probe(kwargs)
    try:
        turns = template.turns(conversation)
    except RowError:
        return skeleton
    header = _header(turns, tokenizer)
    stops = _stops(turns, tokenizer)
    if not header or not stops:
        return skeleton
    extended = replace(skeleton, header=header, stops=stops)
    if not _agrees(extended, template, conversation):
        return skeleton
    for more in ("parallel", "interrupted"):
        candidate = replace(extended, **{more: True})
        if _agrees(candidate, template, _calls_probe(kwargs, **{more: True})):
            extended = candidate
    return extended


def _header(turns: list[Turn], tokenizer: Tokenizer) -> str:
    """What all prompts end in, from the first added token in it on; "" if there is none."""
    reversed_end = commonprefix([turn.prompt[::-1] for turn in turns])  # noqa: RUF071 (of letters)
    end = reversed_end[::-1]
    first = tokenizer.splitting.search(end)
    if first is None:
        return ""
    return end[first.start() :]


def _stops(turns: list[Turn], tokenizer: Tokenizer) -> tuple[str, ...]:
    """What the outputs end in, from the last added token in each on; () if one has none."""
    found: set[str] = set()
    for turn in turns:
        last = last_added(tokenizer, turn.output)
        if last is None:
            return ()
        found.add(turn.output[last.start() :])
    return tuple(sorted(found))


def _with_system(
    skeleton: Skeleton,
    template: ChatTemplate,
    messages: list[ChatMessage],
    kwargs: dict[str, Json],
) -> Skeleton:
    """The skeleton, for conversations that begin with a system message too if that changes nothing
    else.
    """
    extended = replace(skeleton, system=True)
    weights = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    probes = [Conversation([_SYSTEM, *messages], weights, None, kwargs)]
    if skeleton.header:
        probes.append(_calls_probe(kwargs, system=True))
    for probe in probes:
        if not _agrees(extended, template, probe):
            return skeleton
    return extended


def _agrees(skeleton: Skeleton, template: ChatTemplate, conversation: Conversation) -> bool:
    try:
        turns = template.turns(conversation)
    except RowError:
        return False
    return skeleton.turns(template, conversation) == turns
