"""Tool calls of answers: read in the form that the chat template writes, and given to clients as such."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sftx.data.chat.turns import ChatTemplate
from sftx.data.tokenizer import Tokenizer
from sftx.eval.call_forms import FORMS, form_of, template_of
from sftx.eval.sampling import Sampling
from sftx.model.runtime import Machine
from sftx.settings.schema import Model
from sftx.talk.assistant import Answer, Assistant
from sftx.talk.call_stream import CallStream
from sftx.talk.endpoint import Endpoint
from sftx.talk.load import load_assistants
from sftx.types import UserError

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "chat_templates"
NOTHING = re.compile("(?!)")
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Find a thing.",
            "parameters": {
                "type": "object",
                "properties": {"what": {"type": "string"}, "most": {"type": "integer"}},
            },
        },
    }
]
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = '\n<tool_call>\n{"name": "find", "arguments": {"what": "a } lamp", "most": 3}}\n</tool_call>'
FOUND = [("find", {"what": "a } lamp", "most": 3})]

WRITTEN = {
    "json in tags": CALL,
    "functions in tags": "\n<tool_call>\n<function=find>\n<parameter=what>\na } lamp\n</parameter>\n"
    "<parameter=most>\n3\n</parameter>\n</function>\n</tool_call>",
    "keys in tags": "<tool_call>find\n<arg_key>what</arg_key>\n<arg_value>a } lamp</arg_value>\n"
    "<arg_key>most</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    "list behind a mark": '[TOOL_CALLS] [{"name": "find", "arguments": '
    '{"what": "a } lamp", "most": 3}}]',
    "each behind a mark": '[TOOL_CALLS]find[ARGS]{"what": "a } lamp", "most": 3}',
    "words in marks": '<|tool_call>call:find{what:<|"|>a } lamp<|"|>,most:3}<tool_call|>',
}


def _read(form: str, text: str, size: int) -> tuple[str, str, list[tuple[str, Any]]]:
    """(what is shown at once, what at the end, the calls) of a text that comes in pieces."""
    stream = CallStream(template_of(form), TOOLS, NOTHING)
    shown = "".join(stream.feed(text[at : at + size]) for at in range(0, len(text), size))
    return shown, stream.end(), stream.calls


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("form", WRITTEN)
def test_calls_are_told_apart_from_text(form: str, size: int) -> None:
    text = WRITTEN[form]
    assert _read(form, f"Let me see.{text}", size) == ("Let me see.", "", FOUND)
    shown, rest, calls = _read(form, "A lamp <too [TOOL and {so} on", size)
    assert (shown + rest, calls) == ("A lamp <too [TOOL and {so} on", [])
    if form != "list behind a mark":
        assert _read(form, text + text, size)[2] == FOUND * 2


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_whole_answer_that_is_a_call(size: int) -> None:
    call = '{"name": "find", "parameters": {"what": "a } lamp", "most": 3}}'
    for before in ("", "<|python_tag|>"):
        assert _read("bare json", before + call, size) == ("", "", FOUND)
    for other in (f"So: {call}", '{"lamps": 3}', '{"name": "Ada", "age": 3}'):
        shown, rest, calls = _read("bare json", other, size)
        assert (shown + rest, calls) == (other, [])


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "find", "argu',  # cut off
        "<tool_call>{3}</tool_call> and on",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "find", "arguments": [1]}</tool_call>',
        f'{CALL}\n<tool_call>\n{{"name": "fin',
    ],
)
def test_what_is_no_whole_call_stays_text(text: str, size: int) -> None:
    shown, rest, calls = _read("json in tags", f"Hm. {text}", size)
    assert (shown + rest, calls) == (f"Hm. {text}", [])


def test_text_behind_a_call_is_not_lost() -> None:
    assert _read("json in tags", f"{CALL}\nThat is all.", 2) == ("", "\nThat is all.", FOUND)


def test_the_form_is_measured() -> None:
    tokenizer = Tokenizer.of(tiny.tokenizer())
    assert form_of(ChatTemplate(TEMPLATE, tokenizer)) == "json in tags"
    assert form_of(ChatTemplate(TEMPLATE.replace("tool_call>", "call>"), tokenizer)) == ""
    assert form_of(ChatTemplate(tiny.CHAT_TEMPLATE, tokenizer)) == ""


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs the shared templates")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", "json in tags"),
        ("Qwen-Qwen3-0.6B", "json in tags"),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "json in tags"),
        ("Qwen3-Coder", "functions in tags"),
        ("GLM-4.6", "keys in tags"),
        ("meta-llama-Llama-3.1-8B-Instruct", "bare json"),
        ("meta-llama-Llama-3.2-3B-Instruct", "bare json"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "list behind a mark"),
        ("Mistral-Small-3.2-24B-Instruct-2506", "each behind a mark"),
        ("google-gemma-4-31B-it", "words in marks"),
        ("microsoft-Phi-3.5-mini-instruct", ""),
        ("openai-gpt-oss-120b", ""),
    ],
)
def test_the_forms_of_published_templates(name: str, form: str) -> None:
    (path,) = PUBLISHED.rglob(f"{name}.jinja")
    made = tiny.tokenizer()
    source = path.read_text(encoding="utf-8")
    marks = re.findall(r"<\|[a-z_]+\|>|</s>|\[/?[A-Z_]{3,}\]", source)
    made.add_special_tokens({"additional_special_tokens": sorted(set(marks))})
    assert form_of(ChatTemplate(source, Tokenizer.of(made))) == form


# Over the endpoint


def _assistant(path: Path, template: str, said: list[int]) -> Assistant:
    made = tiny.tokenizer()
    made.chat_template = template
    tiny.folder(path)
    made.save_pretrained(path)
    here = Machine(torch.device("cpu"), torch.float32)
    (assistant,) = load_assistants(Model(path=str(path)), "auto", "", "", here)
    assistant._generated = lambda *_: (token for token in said)  # type: ignore[method-assign]
    return assistant


@pytest.fixture(scope="module")
def said() -> list[int]:
    return []


@pytest.fixture(scope="module")
def client(said: list[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a model that says what is in `said`."""
    openai = pytest.importorskip("openai")
    assistant = _assistant(tmp_path_factory.mktemp("calls") / "model", TEMPLATE, said)
    with Endpoint([assistant], Sampling(), port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        server.shutdown()


def _say(said: list[int], text: str) -> None:
    said[:] = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


ASKED: list[Any] = [{"role": "user", "content": "Where is the lamp?"}]


def test_a_client_is_given_the_calls(client: Any, said: list[int]) -> None:
    _say(said, f"Let me see.{CALL}{CALL}<|end|><eos>")
    (choice,) = client.chat.completions.create(model="model", messages=ASKED, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    found = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
    assert found == FOUND * 2
    assert len({call.id for call in choice.message.tool_calls}) == 2
    _say(said, f"{CALL}<|end|><eos>")
    (choice,) = client.chat.completions.create(model="model", messages=ASKED, tools=TOOLS).choices
    assert choice.message.content is None


def test_a_client_is_given_the_calls_in_a_stream(client: Any, said: list[int]) -> None:
    _say(said, f"Let me see.{CALL}{CALL}<|end|><eos>")
    with client.chat.completions.stream(model="model", messages=ASKED, tools=TOOLS) as stream:
        whole = stream.get_final_completion()
    (choice,) = whole.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    found = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
    assert found == FOUND * 2


def test_without_tools_or_a_whole_call_the_text_is_left(client: Any, said: list[int]) -> None:
    _say(said, f"{CALL}<eos>")
    (choice,) = client.chat.completions.create(model="model", messages=ASKED).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", CALL)
    assert choice.message.tool_calls is None
    _say(said, f"{CALL[:-5]}<eos>")
    (choice,) = client.chat.completions.create(model="model", messages=ASKED, tools=TOOLS).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", CALL[:-5])


def test_calls_and_results_reach_the_template(tmp_path: Path) -> None:
    """A client sends arguments as JSON text, and templates read an object."""
    from sftx.talk.requests import read_request

    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "find", "arguments": '{"what":"x"}'},
    }
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "on the table"},
    ]
    body = json.dumps({"model": "m", "messages": turns, "tools": TOOLS}).encode()
    asked = read_request(body, Sampling())
    assistant = _assistant(tmp_path / "m", TEMPLATE, [])
    text = assistant.prompt(asked.messages, asked.tools)
    assert text.startswith(f"<|system|>{json.dumps(TOOLS)}<|end|>\n<|user|>Where")
    assert '{"name": "find", "arguments": {"what": "x"}}' in text
    assert text.endswith("<|tool|>on the table<|end|>\n<|assistant|>")
    with pytest.raises(UserError, match="JSON"):
        read_request(body.replace(b'{\\"what\\"', b"{what"), Sampling())


def test_tools_that_the_template_would_drop_are_refused(tmp_path: Path) -> None:
    assistant = _assistant(tmp_path / "m", tiny.CHAT_TEMPLATE, [])
    with pytest.raises(UserError, match="does not write tools"):
        assistant.prompt(ASKED, TOOLS)


def test_the_template_for_tools_is_used(tmp_path: Path) -> None:
    made = tiny.tokenizer()
    made.chat_template = {"default": tiny.CHAT_TEMPLATE, "tool_use": TEMPLATE}
    path = tmp_path / "m"
    tiny.folder(path)
    made.save_pretrained(path)
    here = Machine(torch.device("cpu"), torch.float32)
    (assistant,) = load_assistants(Model(path=str(path)), "auto", "", "", here)
    assert "Find a thing." in assistant.prompt(ASKED, TOOLS)
    assert "Find" not in assistant.prompt(ASKED)
    assert assistant.call_template == template_of("json in tags")


def test_a_folder_may_say_itself_how_calls_are_written(tmp_path: Path) -> None:
    own = template_of("each behind a mark")
    path = tmp_path / "m"
    written = '<|tool|>find{"what": "a } lamp", "most": 3}'
    own["fields"]["tool_calls"] = {
        **FORMS["each behind a mark"],
        "open_pattern": r"<\|tool\|>(?P<name>\w+)",
    }
    said = tiny.tokenizer()(f"So: {written}<eos>", add_special_tokens=False)["input_ids"]
    _assistant(path, TEMPLATE, said)  # writes the folder
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "response_template": own}))
    here = Machine(torch.device("cpu"), torch.float32)
    (assistant,) = load_assistants(Model(path=str(path)), "auto", "", "", here)
    assistant._generated = lambda *_: (token for token in said)  # type: ignore[method-assign]
    answer = Answer()
    for _ in assistant.stream(ASKED, Sampling(), answer, TOOLS):
        pass
    assert answer.content == "So: "  # the mark is a special token: it is in no text
    assert [call["function"]["name"] for call in answer.calls] == ["find"]
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "response_template": {}}))
    (broken,) = load_assistants(Model(path=str(path)), "auto", "", "", here)
    with pytest.raises(UserError, match="response_template"):
        list(broken.stream(ASKED, Sampling(), Answer(), TOOLS))
