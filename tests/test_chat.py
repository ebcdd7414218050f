"""Chat templates with one odd trait each: what is trained is what the row says, whole, or the row
is refused.
"""

from __future__ import annotations

import logging
import resource
import signal
import threading
from typing import Any

import numpy as np
import pytest
from small_tokenizers import ours
from test_template import CALLS, CHATML, encoded, encoder, error, model, row, shown, user

import sftx
from sftx.data.chat import limits
from sftx.data.dataset import load_corpora
from sftx.data.encoder import Encoder
from sftx.data.lint.rules import lint
from sftx.data.sources.rows import parse
from sftx.settings.make import make_config
from sftx.types import RowError, UserError

HEADER = "<|im_start|>assistant\n"
GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def with_calls(written: str) -> str:
    """A template that writes each call `c` as `written`."""
    return CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}" + written + "{% endfor %}"
    )


def call(name: str = "weather", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def outputs(messages: list[dict[str, Any]], template: str, **data: Any) -> list[str]:
    """The trained outputs of a conversation, in order."""
    made = encoder(template, **data)
    found = shown(encoded(row(messages), made), made.tokenizer)
    return [part.partition("⟧")[0] for text in found for part in text.split("⟦")[1:]]


# As Mistral's templates do: an object is marked as safe, so that what is joined with it is escaped
# as HTML.
SAFE = (
    "{% set a = c.function.arguments %}{% if a is not string %}{% set a = a | tojson | safe %}{% "
    "endif %}"
    """{{ '{"name": "' + c.function.name + '", "arguments": ' + a + '}' }}"""
)
# An object would be written as Python writes it
PRINTED = "{{ c.function.name }} {{ c.function.arguments }};"
ESCAPES = """{{ '{"name": "' + c.function.name + '"}' ~ (c.function.arguments | tojson | e) }}"""


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_arguments_are_written_as_json(arguments: Any) -> None:
    asked = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    given = parse({"messages": [user("a"), model("", tool_calls=[asked])]}, "messages")
    for written, expected in (
        (SAFE, '{"name": "weather", "arguments": {"city": "Rome"}}'),
        (PRINTED, 'weather {"city": "Rome"};'),
        ("{{ c.function | tojson }}", '{"name": "weather", "arguments": {"city": "Rome"}}'),
    ):
        made = encoder(with_calls(written))
        (text,) = shown(encoded(given, made), made.tokenizer)
        assert text.endswith(f"{HEADER}⟦{expected}<|im_end|>⟧")


def test_html_escapes_that_the_row_does_not_have_are_refused() -> None:
    template = with_calls(
        ESCAPES.replace("'{\"name\": \"' + c.function.name + '\"}'", "c.function.name")
    )
    message = error(row([user("a"), model("", tool_calls=[call(n=1)])]), encoder(template))
    assert "HTML escapes" in message or "not whole" in message
    own = outputs([user("a"), model("say &#34; &amp;")], CHATML)
    assert own == ["say &#34; &amp;<|im_end|>"]


FIRST_ONLY = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{{ m.tool_calls[0].function | tojson if m.tool_calls }}"
)


def test_every_call_is_found_or_the_row_is_refused() -> None:
    both = [call(city="Paris"), call(city="Rome")]
    assert "call 2 of 2 (weather)" in error(
        row([user("a"), model("", tool_calls=both)]), encoder(FIRST_ONLY)
    )
    written = [
        f'{{"name": "weather", "arguments": {{"city": "{city}"}}}}' for city in ("Paris", "Rome")
    ]
    found = outputs(
        [user("a"), model("", tool_calls=both)], with_calls("{{ c.function | tojson }}")
    )
    assert found == ["".join(written) + "<|im_end|>"]
    named = [user("a"), model("I ask weather for Paris, a city.", tool_calls=[call(city="Paris")])]
    assert "call 1 of 1 (weather) is missing" in error(row(named), encoder(CHATML))
    assert outputs(named, with_calls("{{ c.function | tojson }}"))[0].startswith(
        "I ask weather for Paris, a city.{"
    )
    halved = with_calls("{{ c.function.name }} {{ c.function.arguments.keys() | list | tojson }}")
    assert "'Paris' is not there" in error(
        row([user("a"), model("", tool_calls=[call(city="Paris")])]), encoder(halved)
    )
    doubled = with_calls("{{ c.function | tojson }}{{ c.function | tojson }}")
    assert "more than once" in error(
        row([user("a"), model("", tool_calls=[call(city="Paris")])]), encoder(doubled)
    )


def test_odd_arguments_are_found_in_every_form() -> None:
    odd = call(text='say "hi"\n& <b>', number=3, share=0.5, flags=[True, None], inside={"é": "ü"})
    nested = "{{ {'f': c.function | tojson} | tojson }}"
    xml = (
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>"
        "{{ v if v is string else v | tojson }}{% endfor %}"
    )
    for written in ("{{ c.function | tojson }}", nested, xml):
        assert (
            "weather" in outputs([user("a"), model("", tool_calls=[odd])], with_calls(written))[0]
        )


# Writes the thoughts of calls while no answer follows, and the thought of the newest answer: as
# gpt-oss does.
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and (loop.last or "
    "messages[-1].role == "
    "'tool') %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% for c in "
    "m.tool_calls %}"
    "{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}" + GENERATE
)


def test_the_thought_after_a_tool_result_is_trained() -> None:
    talk = [
        user("weather?"),
        model("", reasoning_content="ask", tool_calls=[call(city="Paris")]),
        result("21"),
        model("it is 21", reasoning_content="it says so"),
    ]
    assert outputs(talk, CHANNELS) == [
        '<think>ask</think>{"name": "weather", "arguments": {"city": "Paris"}}<|im_end|>',
        "<think>it says so</think>it is 21<|im_end|>",
    ]


def test_a_row_is_encoded_alike_wherever_it_stands() -> None:
    """Alone, in any order and in any batch: the same tokens or the same refusal."""
    tool = {
        "type": "function",
        "function": {"name": "weather", "description": "", "parameters": {}},
    }
    talks = [
        [model("welcome"), user("hi"), model("hello")],
        [user("hi"), model("hello"), model("still there?"), user("yes"), model("good")],
        [user("hi"), model("\n padded "), user("so"), model(" end\n")],
        [{"role": "system", "content": "be quick"}, model("welcome"), user("hi"), model("hello")],
        [user("a"), model("", tool_calls=[call(city="x")]), result("1"), model("yes")],
        [user("a"), model(""), user("b"), model("c")],
        [result("1"), model("yes")],
    ]
    rows = [row(talk, tools=tools) for talk in talks for tools in ((), (tool,))]
    trims = CALLS.replace("{{ m.content }}", "{{ m.content.lstrip() if loop.last else m.content }}")
    for template in (CALLS, trims, CHATML):
        alone = [_state(encoder(template).encode([each])[0]) for each in rows]
        for order in (range(len(rows)), range(len(rows))[::-1], [*range(1, len(rows)), 0] * 9):
            together = encoder(template).encode([rows[i] for i in order])
            assert [_state(each) for each in together] == [alone[i] for i in order]


def _state(encoded: Any) -> Any:
    if isinstance(encoded, RowError):
        return str(encoded)
    return [(e.ids.tolist(), e.weights.tolist(), e.note) for e in encoded.examples], encoded.notes


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nbe quick<|im_end|>\n{% endif %}"
    + CHATML
)
NO_HEADER = (
    "{% for m in messages %}{{ '<s>' ~ m.content ~ '<|im_start|>' if m.role == 'user' else "
    "m.content ~ '<|im_end|>' }}"
    "{% endfor %}"
)


def test_a_first_answer_is_trained_where_a_prompt_stands_before_it() -> None:
    talk = [model("welcome"), user("hi"), model("hello")]
    assert outputs(talk, DEFAULT_SYSTEM) == ["welcome<|im_end|>", "hello<|im_end|>"]
    assert "put a prompt first" in error(row(talk), encoder(NO_HEADER))


NOT_TWICE = TURNS + GENERATE.replace(
    "add_generation_prompt", "add_generation_prompt and messages[-1].role == 'user'"
)
BEHIND_RESULT = CALLS.replace(GENERATE, "") + GENERATE.replace(
    "add_generation_prompt", "add_generation_prompt and messages[-1].role != 'tool'"
)


def test_no_header_is_trained() -> None:
    twice = [user("hi"), model("hello"), model("still there?")]
    assert "has no prompt for an answer that follows a message of the role 'assistant'" in error(
        row(twice), encoder(NOT_TWICE)
    )
    assert "no prompt" in error(row(twice), encoder(NO_HEADER))
    assert outputs(twice, CHATML) == ["hello<|im_end|>", "still there?<|im_end|>"]
    talk = [user("a"), model("", tool_calls=[call(city="x")]), result("1"), model("yes")]
    assert outputs(talk, BEHIND_RESULT)[1] == "yes<|im_end|>"
    continued = CALLS.replace(
        "<|im_start|>{{ m.role }}\n",
        "{% if loop.previtem is not defined or loop.previtem.role != 'tool' %}<|im_start|>{{ "
        "m.role }}\n{% endif %}",
    )
    assert outputs(talk, continued)[1] == "yes<|im_end|>"


# Writes the system message into the newest question only: as Mistral's templates do.
SYSTEM_IN_LAST = (
    "{% set s = messages[0].content ~ '\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<s>{{ s if loop.last "
    "}}{{ m.content }}"
    "<|im_start|>{% elif m.role == 'tool' %}<unk>{{ m.content }}<unk>{% else %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endif %}{% "
    "endfor %}"
)


def test_a_system_message_with_calls_is_trained_where_history_is_rewritten() -> None:
    talk = [
        {"role": "system", "content": "be quick"},
        user("a"),
        model("", tool_calls=[call(city="x")]),
        result("1"),
    ]
    talk += [model("yes"), user("b"), model("no")]
    made = encoder(SYSTEM_IN_LAST)
    assert outputs(talk, SYSTEM_IN_LAST) == [
        '{"name": "weather", "arguments": {"city": "x"}}<|im_end|>',
        "yes<|im_end|>",
        "no<|im_end|>",
    ]
    first = shown(encoded(row(talk), made), made.tokenizer)[0]
    assert first.startswith("<s>be quick\na<|im_start|>⟦")


def test_content_that_a_template_drops_is_refused() -> None:
    for template in (
        CHATML.replace("{{ m.content }}", "{{ 'X' if m.role == 'assistant' else m.content }}"),
        CALLS.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}"),
    ):
        calls = [call(city="x")] if "tool_calls" in template else []
        bad = row([user("a"), model("the answer", **({"tool_calls": calls} if calls else {}))])
        assert "leaves out the content of the answer ('the answer')" in error(
            bad, encoder(template)
        )
    changed = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    assert encoded(row([user("a"), model("yes")]), encoder(changed)).notes == [
        "text changed by the template"
    ]
    assert outputs([user("a"), model("")], CHATML) == ["<|im_end|>"]


def thoughtful(count: int) -> list[dict[str, Any]]:
    talk = [user("hello"), model("yes", reasoning_content="hm")]
    return [{"messages": [{**talk[0], "content": f"hello {i}"}, talk[1]]} for i in range(count)]


KEEPS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.reasoning_content if m.reasoning_content and write_thinking }}{{ m.content }}",
)


@pytest.mark.parametrize(
    ("template", "advice"),
    [
        (CHATML, "set data.template to a template that writes reasoning_content"),
        (KEEPS, "'write_thinking': True"),
    ],
)
def test_lost_reasoning_is_seen(
    template: str,
    advice: str,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path))
    tokenizer = ours()
    tokenizer.chat_templates = {"default": template}
    plain = [{"messages": [user(f"hello {i}"), model("yes")]} for i in range(200)]
    for lost, warned in ((2, False), (5, True)):
        caplog.clear()
        config = make_config(
            model="m", output="o", data={"rows": plain + thoughtful(lost), "workers": 0}
        )
        with caplog.at_level(logging.WARNING, "sftx"):
            corpus, _ = load_corpora(config, tokenizer, 100)
        assert corpus.ledger.notes["reasoning left out by the template"] == lost
        assert ("leaves out the reasoning of 5 of 205 rows" in caplog.text) == warned
        assert (advice in caplog.text) == warned
    finding = {f.check: f for f in lint(config, Encoder(tokenizer, config.data, 100))}[
        "lost reasoning"
    ]
    assert (finding.serious, finding.count) == (True, 5)
    assert advice in finding.message


def test_lost_reasoning_can_be_an_error() -> None:
    talk = row([user("hello"), model("yes", reasoning_content="hm")])
    assert "leaves out the reasoning" in error(talk, encoder(CHATML, lost_reasoning="error"))
    kept = row(
        [user("hello"), model("yes", reasoning_content="hm")],
        template_kwargs={"write_thinking": True},
    )
    assert encoded(kept, encoder(KEEPS, lost_reasoning="error")).notes == []


def test_nothing_of_the_callers_process_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit, timer or signal of the whole process is set while a row is encoded."""
    touched: list[str] = []
    for module, name in (
        (resource, "setrlimit"),
        (signal, "setitimer"),
        (signal, "signal"),
        (limits.faulthandler, "register"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: touched.append(name))
    tokenizer = ours()
    tokenizer.chat_templates = {"default": CHATML}
    monkeypatch.setattr(limits, "_own_process", False, raising=False)
    assert sftx.encode({"messages": [user("a"), model("b")]}, tokenizer, max_length=100)
    assert encoder(CHATML).stop_ids
    assert touched == []
    monkeypatch.setattr(limits, "_own_process", True, raising=False)
    assert sftx.encode({"messages": [user("a"), model("c")]}, tokenizer, max_length=101)
    assert {"setrlimit", "setitimer"} <= set(touched)


@pytest.mark.slow
def test_another_thread_may_allocate_while_a_row_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MEMORY", 50 << 20)
    monkeypatch.setattr(limits, "_own_process", False, raising=False)
    failed: list[BaseException] = []
    started, done = threading.Event(), threading.Event()

    def allocate() -> None:
        started.wait()
        try:
            for _ in range(5):
                np.ones(40 << 20, np.uint8).sum()
                blocks.append(np.ones(40 << 20, np.uint8))
        except MemoryError as problem:
            failed.append(problem)
        done.set()

    blocks: list[Any] = []
    thread = threading.Thread(target=allocate)
    thread.start()
    slow = "{% for i in range(99999) %}{% for j in range(3) %}{% endfor %}{% endfor %}" + CHATML
    made = encoder(slow)
    started.set()
    while not done.is_set():
        assert not isinstance(made.encode([row([user("a"), model("b")])])[0], RowError)
    thread.join()
    assert failed == []


def test_a_template_cannot_repeat_a_text_without_end() -> None:
    with pytest.raises(UserError, match="makes a text or list of"):
        encoder("{{ 'x' * 10**10 }}").encode([row([user("a"), model("b")])])
