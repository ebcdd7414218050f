"""The forms in which models write tool calls, as transformers' `response_template` says them.

A folder may bring its own (`response_template` in tokenizer_config.json). For others the form is
measured: it is the one that reads, out of what the chat template writes for a call, that very call.
"""

from __future__ import annotations

import json
from typing import Any

from transformers.utils.chat_parsing import parse_response

from sftx.data.chat.conversation import Conversation
from sftx.data.chat.renderer import TOOL, USER, calls, says, says_calls
from sftx.data.chat.turns import ChatTemplate
from sftx.types import Json, RowError

_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_JSON: dict[str, Any] = {"content": "json", "transform": _CALL}
_JSON_CALL: dict[str, Any] = {
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
    "repeats": True,
}

FORMS: dict[str, dict[str, Any]] = {
    # Hermes, Qwen 2.5 and 3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    "json in tags": {
        "open_pattern": r"\s*<tool_call>(?=\s*\{)",
        "close": "</tool_call>",
        **_JSON_CALL,
    },
    # Qwen 3.5 and Qwen Coder: <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function>
    "functions in tags": {
        "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
        },
        "transform": _CALL,
    },
    # GLM 4.5 and later: <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>
    "keys in tags": {
        "open_pattern": r"\s*<tool_call>(?P<name>[^<\s{]+)\s*(?=</?[at])",
        "close": "</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<arg_key>(?P<key>[^<]+)</arg_key>\s*"
            r"<arg_value>(?P<value>.*?)</arg_value>"
        },
        "transform": _CALL,
    },
    # Llama 3: the whole answer is {"name": ..., "parameters": {...}}
    "bare json": {
        "open_pattern": r"^\s*(?:<\|python_tag\|>)?\s*\{\s*"
        r'(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>[^"]+)"\s*,\s*'
        r'"(?:parameters|arguments)"\s*:\s*',
        "close_pattern": r"\}\s*\Z",
        "repeats": True,
        **_JSON,
    },
    # Mistral, up to its tokenizer v7: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    "list behind a mark": {
        "open_pattern": r"\s*\[TOOL_CALLS\]\s*(?=\[)",
        "content": "json",
        "transform_each": True,
        "transform": {
            "type": "function",
            "function": {"name": "{name}", "arguments": "{arguments}"},
        },
    },
    # Mistral, from v11 on: [TOOL_CALLS]NAME[ARGS]{...}[TOOL_CALLS]...
    "each behind a mark": {
        "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>[^\[{]+)(?:\[CALL_ID\][^\[]*)?"
        r"(?:\[ARGS\])?(?=\s*\{)",
        "close_pattern": r"(?=\[TOOL_CALLS\])",
        "repeats": True,
        **_JSON,
    },
    # Gemma 4: <|tool_call>call:NAME{key:<|"|>text<|"|>}<tool_call|>
    "words in marks": {
        "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
        "close": "<tool_call|>",
        "repeats": True,
        "content": "json",
        "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
        "transform": _CALL,
    },
}
"""By a name of ours: what `tool_calls` is in a response template."""

BROKEN = (ValueError, KeyError)
"""What transformers raises where a call is not whole."""
_ARGUMENTS: dict[str, Json] = {"place": 'qz "x" {1}', "days": 2}
_TOOLS: list[dict[str, Json]] = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "qz",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["place", "days"],
            },
        },
    }
]


def template_of(form: str) -> dict[str, Any]:
    """The response template of one of `FORMS`: an answer is content and calls."""
    fields = {"tool_calls": FORMS[form], "content": {"content": "text", "content_args": {}}}
    fields["content"]["content_args"] = {"strip": False}
    return {"defaults": {"role": "assistant"}, "start_anchor": "\0", "fields": fields}


def form_of(template: ChatTemplate) -> str:
    """The name in `FORMS` of the form in which a chat template writes calls; "" where it is none of
    them, or the template writes no calls.
    """
    answer = says_calls(calls(_ARGUMENTS))
    conversation = Conversation([says("user", USER), answer], [0.0, 1.0], _TOOLS)
    try:
        written = template.turn(conversation, 1).output
    except RowError:
        return ""
    stop = template.traits.ending.stop or ""
    written = written.removesuffix(stop).removesuffix("<|eom_id|>")
    for form in FORMS:
        if read_calls(written, template_of(form), _TOOLS)[1] == [(TOOL, _ARGUMENTS)]:
            return form
    return ""


def read_calls(
    text: str, response_template: dict[str, Any], tools: list[dict[str, Any]]
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """What an answer says beside its calls, and the (name, arguments) of these; the whole text and []
    where there are none, or one is not whole.
    """
    try:
        message = parse_response(text, response_template, prefix="", tools=[*tools])
        found = calls_of(message)
    except BROKEN:
        return text, []
    if found:
        return (message.get("content", ""), found)
    return (text, [])


def calls_of(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The (name, arguments) of the calls in a parsed message; ValueError where one is no call."""
    found: list[tuple[str, dict[str, Any]]] = []
    given = message.get("tool_calls", ())
    for call in given if isinstance(given, list | tuple) else [given]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a call without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            raise ValueError("the arguments of a call are no object")
        found.append((function["name"], arguments))
    return found
