"""Chat templates written for the tests, one for each thing that published ones do, and what the
conversations of `bench/templates.py` must become with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

END = "<|im_end|>"
HEADER = "<|im_start|>assistant\n"
GENERATE = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BODY = "{{ m.content }}"
CALL = "{{ c.function | tojson }}"
WITH_CALLS = BODY + "{% for c in m.tool_calls %}" + CALL + "{% endfor %}"


def chatml(
    body: str = BODY,
    *,
    before: str = "",
    generate: str = GENERATE,
    end: str = END + "\n",
    after: str = "",
) -> str:
    """ChatML whose messages have this `body` and `end`, with more `before` and `after` them all."""
    turn = "<|im_start|>{{ m.role }}\n" + body + end
    return before + "{% for m in messages %}" + turn + "{% endfor %}" + after + generate


def opening(opened: str) -> str:
    """A generation prompt with more behind its header."""
    return "{% if add_generation_prompt %}<|im_start|>assistant\n" + opened + "{% endif %}"


def written(first: str, *more: str) -> str:
    """A call as `CALL` writes it: name, and arguments as (key, value) in turn."""
    pairs = ", ".join(
        f'"{key}": "{value}"' for key, value in zip(more[::2], more[1::2], strict=True)
    )
    return f'{{"name": "{first}", "arguments": {{{pairs}}}}}'


PARIS = written("get_weather", "city", "Paris")
LISBON = written("get_weather", "city", "Lisbon")
FLIGHT = written("find_flight", "place", "Lisbon")
OSLO = written("get_weather", "city", "Oslo")


@dataclass(frozen=True)
class Trait:
    """A template, and for the conversations that its trait concerns: the whole text of each trained
    output, stop token included, or the reason why the row is refused.

    `sequences`: conversations that become another number of sequences than one. `notes`: what the
    ledger says of a row. `tool_use`: the template for rows with tools, where that is another.
    """

    source: str
    becomes: dict[str, list[str] | str]
    sequences: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    tool_use: str = ""
    stops: tuple[str, ...] = ()  # tokens at which generation is known to stop
    special: dict[str, Any] = field(default_factory=dict)  # named tokens of the tokenizer


def ended(*outputs: str) -> list[str]:
    """Outputs that end in the usual stop token."""
    return [output + END for output in outputs]


MULTI = ("Hello there!", "Now we talk.", "Bye!")
NO_HEADER = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}<|im_start|>{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# As Mistral's templates: an object is marked as safe, so that what is joined with it is escaped.
SAFE = (
    "{% set a = c.function.arguments %}"
    "{% if a is not string %}{% set a = a | tojson | safe %}{% endif %}"
    """{{ '{"name": "' + c.function.name + '", "arguments": ' + a + '}' }}"""
)
XML = (
    "<call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "<{{ k }}>{{ v if v is string else v | tojson }}</{{ k }}>{% endfor %}</call>"
)
THOUGHT = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
TRAITS: dict[str, Trait] = {
    "plain": Trait(
        chatml(),
        {
            "single": ended("It is 4, I think."),
            "multi": ended(*MULTI),
            "system": ended("Yes.", "No."),
            "edges": ended("\n  padded \n", "🙂 end "),
            "twice": ended("Hello.", "Still there?", "Good."),
            "empty": ended("", "yes"),
            "white": ended("\n\n- one\n- two\n\n", "    return 1\n"),
            "calls": "does not render tool calls",
        },
    ),
    "calls as JSON": Trait(
        chatml(WITH_CALLS),
        {
            "calls": ended(PARIS, "It is 21 degrees.", "Fine."),
            "sys_call": ended(PARIS, "It is 21."),
            "said_call": ended("I will use get_weather for that." + PARIS, "It is 21."),
            "same_fn": ended(PARIS + LISBON, "21 degrees, and rain."),
            "two_fns": ended(PARIS + FLIGHT, "Warm, and at nine."),
            "as_text": ended(PARIS, "It is 21."),
            "rounds": ended(PARIS, FLIGHT, "Go.", OSLO, "It snows."),
        },
    ),
    "calls as XML": Trait(
        chatml(BODY + "{% for c in m.tool_calls %}" + XML + "{% endfor %}"),
        {
            "calls": ended(
                "<call>get_weather<city>Paris</city></call>", "It is 21 degrees.", "Fine."
            ),
            "odd_args": ended(
                '<call>get_weather<city>Köln "am <Rhein>" & so\nweiter</city><days>3</days>'
                '<where>{"lat": 50.9, "tags": ["a", "b"]}</where><now>true</now></call>',
                "21.",
            ),
        },
    ),
    "arguments as text": Trait(
        chatml(
            BODY + "{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments }};"
            "{% endfor %}"
        ),
        {
            "calls": ended('get_weather {"city": "Paris"};', "It is 21 degrees.", "Fine."),
            "as_text": ended('get_weather {"city": "Paris"};', "It is 21."),
            "two_fns": ended(
                'get_weather {"city": "Paris"};find_flight {"place": "Lisbon"};',
                "Warm, and at nine.",
            ),
        },
    ),
    "arguments marked as safe": Trait(
        chatml(BODY + "{% for c in m.tool_calls %}" + SAFE + "{% endfor %}"),
        {
            "calls": ended(PARIS, "It is 21 degrees.", "Fine."),
            "as_text": ended(PARIS, "It is 21."),
        },
    ),
    "arguments as HTML": Trait(
        chatml(BODY + "{% for c in m.tool_calls %}{{ c.function | tojson | e }}{% endfor %}"),
        {"odd_args": "(get_weather) is missing or not whole", "calls": "HTML escapes"},
    ),
    "first call only": Trait(
        chatml(BODY + "{{ m.tool_calls[0].function | tojson if m.tool_calls }}"),
        {
            "calls": ended(PARIS, "It is 21 degrees.", "Fine."),
            "same_fn": "call 2 of 2 (get_weather) is missing",
            "two_fns": "call 2 of 2 (find_flight) is missing",
            "equal_calls": "call 2 of 2 (get_weather) is missing",
        },
    ),
    "calls end otherwise": Trait(
        chatml(WITH_CALLS, end="{{ '<unk>' if m.tool_calls else '<|im_end|>' }}\n"),
        {
            "calls": [PARIS + "<unk>", "It is 21 degrees." + END, "Fine." + END],
            "same_fn": [PARIS + LISBON + "<unk>", "21 degrees, and rain." + END],
        },
    ),
    "another template for tools": Trait(
        chatml(),
        {
            "multi": ended(*MULTI),
            "tools": ended("Hello."),
            "calls": ended(PARIS, "It is 21 degrees.", "Fine."),
        },
        tool_use=chatml(WITH_CALLS, before="{{ tools | length }} tools\n"),
    ),
    "refuses without tools": Trait(
        chatml(WITH_CALLS, before="{{ raise_exception('tools are needed') if not tools }}"),
        {
            "calls": ended(PARIS, "It is 21 degrees.", "Fine."),
            "multi": "tools are needed",
        },
    ),
    "history rewritten": Trait(
        chatml(
            "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}"
            "</think>{% endif %}" + BODY
        ),
        {
            "multi": ended(*["<think></think>" + text for text in MULTI]),
            "reasoning": ended(
                "<think>Three and four make seven.</think>It is 7.",
                "<think>I counted twice.</think>Quite.",
            ),
            "mixed": ended("<think>Say ho.</think>Ho.", "<think></think>Well."),
        },
        sequences={"multi": 3, "reasoning": 2, "mixed": 2},
    ),
    "thoughts kept": Trait(
        chatml(THOUGHT + WITH_CALLS),
        {
            "reasoning": ended(
                "<think>Three and four make seven.</think>It is 7.",
                "<think>I counted twice.</think>Quite.",
            ),
            "mixed": ended("<think>Say ho.</think>Ho.", "Well."),
            "th_calls": ended(
                "<think>Ask the tool first.</think>" + PARIS,
                "<think>The tool says so.</think>It is 21.",
            ),
            "twice_th": ended("<think>Greet.</think>Hello.", "<think>Now ask.</think>You?"),
        },
    ),
    "thoughts left out": Trait(
        chatml(),
        {"reasoning": ended("It is 7.", "Quite."), "mixed": ended("Ho.", "Well.")},
        notes=dict.fromkeys(("reasoning", "mixed"), "reasoning left out by the template"),
    ),
    "thought opened": Trait(
        chatml(generate=opening("<think>\n")),
        {
            "multi": ended(*["\n</think>\n\n" + text for text in MULTI]),
            "reasoning": ended(
                "Three and four make seven.\n</think>\n\nIt is 7.",
                "I counted twice.\n</think>\n\nQuite.",
            ),
        },
        sequences={"multi": 3, "reasoning": 2},
        notes={"multi": "forced opening closed"},
    ),
    "thought opened and written": Trait(
        chatml(
            "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
            "{% endif %}" + BODY,
            generate=opening("<think>\n"),
        ),
        {
            "reasoning": ended(
                "Three and four make seven.\n</think>\n\nIt is 7.",
                "I counted twice.\n</think>\n\nQuite.",
            ),
            "multi": ended(*["\n</think>\n\n" + text for text in MULTI]),
        },
        notes={"multi": "forced opening closed"},
    ),
    "thoughts switched off": Trait(
        chatml(
            generate=opening("{{ '<think></think>' if enable_thinking is false else '<think>' }}")
        ),
        {
            "multi": ended(*MULTI),
            "reasoning": ended(
                "Three and four make seven.</think>It is 7.", "I counted twice.</think>Quite."
            ),
        },
        sequences={"multi": 3, "reasoning": 2},
        notes={"multi": "no-thinking prompt (enable_thinking=False)"},
    ),
    "thoughts switched on": Trait(
        chatml(generate=opening("{{ '<think>' if enable_thinking else '<think></think>' }}")),
        {
            "multi": ended(*MULTI),
            "reasoning": ended(
                "Three and four make seven.</think>It is 7.", "I counted twice.</think>Quite."
            ),
        },
        sequences={"multi": 3, "reasoning": 2},
        notes={"reasoning": "thinking prompt (enable_thinking=True)"},
    ),
    "closed thought half written": Trait(
        chatml(
            "{{ '</think>' if m.role == 'assistant' }}" + BODY, generate=opening("<think></think>")
        ),
        {"single": ended("It is 4, I think."), "multi": ended(*MULTI)},
        sequences={"multi": 3},
    ),
    "thought opened behind a system message": Trait(
        chatml(generate=opening("{{ '<think>' if messages[0].role == 'system' }}")),
        {
            "multi": ended(*MULTI),
            "system": ended("</think>Yes.", "</think>No."),
        },
        sequences={"system": 2},
        notes={"system": "forced opening closed"},
    ),
    "thought ends in the stop token": Trait(
        chatml(
            "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}<|im_end|>{% endif %}"
            + BODY
        ),
        {
            "reasoning": ended(
                "<think>Three and four make seven.<|im_end|>It is 7.",
                "<think>I counted twice.<|im_end|>Quite.",
            ),
            "mixed": ended("<think>Say ho.<|im_end|>Ho.", "Well."),
        },
    ),
    "stop written late": Trait(
        chatml(end="{{ '<|im_end|>\n' if not loop.last or m.role == 'user' }}"),
        {"single": ended("It is 4, I think."), "multi": ended(*MULTI)},
    ),
    "two stop tokens": Trait(
        chatml(end=END + "<unk>\n"),
        {
            "single": ["It is 4, I think." + END + "<unk>"],
            "multi": [m + END + "<unk>" for m in MULTI],
        },
        special={"eos_token": None},
    ),
    "no stop token": Trait(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        {"single": [" It is 4, I think.</s>"], "multi": [f" {text}</s>" for text in MULTI]},
        sequences={"multi": 3},
    ),
    "tail by what is said": Trait(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{{ '!' if 'think' in messages[-1].content }}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        {"single": [" It is 4, I think.\n!</s>"]},
    ),
    "header is the stop": Trait(
        "{% for m in messages %}{{ {'user': '<s>', 'tool': '<unk>', 'assistant': '<|im_start|>'}"
        "[m.role] }}" + WITH_CALLS + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        {
            "multi": [f"{text}<s>" for text in MULTI],
            "calls": [PARIS + "<unk>", "It is 21 degrees.<s>", "Fine.<s>"],
        },
        stops=("<s>", "<unk>", "</s>"),
    ),
    "content in parts": Trait(
        chatml("{% for part in m.content %}{{ part.text }}{% endfor %}"),
        {"multi": ended(*MULTI), "system": ended("Yes.", "No.")},
    ),
    "BOS inside": Trait(
        chatml(before="{{ bos_token }}"),
        {"multi": ended(*MULTI), "system": ended("Yes.", "No.")},
    ),
    "content trimmed": Trait(
        chatml("{{ m.content | trim }}"),
        {
            "white": ended("- one\n- two", "return 1"),
            "edges": ended("padded", "🙂 end"),
        },
    ),
    "newest content trimmed": Trait(
        chatml("{{ m.content | trim if loop.last and m.role == 'assistant' else m.content }}"),
        {
            "white": ended("- one\n- two", "return 1"),
            "multi": ended(*MULTI),
        },
        sequences={"white": 2},
    ),
    "content dropped": Trait(
        chatml("{{ 'X' if m.role == 'assistant' else m.content }}"),
        {
            "single": "leaves out the content of the answer ('It is 4, I think.')",
            "multi": "leaves out the content of the answer ('Hello there!')",
        },
    ),
    "content beside calls dropped": Trait(
        chatml(
            "{{ m.content if not m.tool_calls }}{% for c in m.tool_calls %}" + CALL + "{% endfor %}"
        ),
        {
            "said_call": "leaves out the content of the answer",
            "calls": ended(PARIS, "It is 21 degrees.", "Fine."),
        },
    ),
    "system refused": Trait(
        chatml(before="{{ raise_exception('no system here') if messages[0].role == 'system' }}"),
        {"multi": ended(*MULTI), "system": "no system here"},
    ),
    "system in the first question": Trait(
        "{% set s = messages[0].content ~ '\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{{ s if loop.first }}{{ m.content }}<|im_end|>\n{% endfor %}" + GENERATE,
        {"multi": ended(*MULTI), "system": ended("Yes.", "No.")},
    ),
    "system in the newest question": Trait(
        "{% set s = messages[0].content ~ '\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "<s>{{ s if m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] }}"
        "{{ m.content }}<|im_start|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        {
            "multi": ended(*MULTI),
            "system": ended("Yes.", "No."),
            "sys_first": "has no prompt for an answer that follows a message of the role 'system'",
        },
        sequences={"system": 2},
    ),
    "system by default": Trait(
        chatml(
            before="{% if messages[0].role != 'system' %}<|im_start|>system\nbe quick<|im_end|>\n"
            "{% endif %}"
        ),
        {
            "multi": ended(*MULTI),
            "first": ended("Welcome!", "How can I help?"),
            "sys_first": ended("Welcome!", "How can I help?"),
        },
    ),
    "no header": Trait(
        NO_HEADER,
        {
            "multi": ended(*MULTI),
            "twice": "no prompt",
            "first": "put a prompt first",
        },
    ),
    "no header behind a result": Trait(
        "{% for m in messages %}{% if loop.previtem is not defined or loop.previtem.role != 'tool' "
        "%}<|im_start|>{{ m.role }}\n{% endif %}"
        + WITH_CALLS
        + "<|im_end|>\n{% endfor %}"
        + GENERATE,
        {
            "calls": ended(PARIS, "It is 21 degrees.", "Fine."),
            "rounds": ended(PARIS, FLIGHT, "Go.", OSLO, "It snows."),
        },
        sequences={"calls": 2, "rounds": 3},
    ),
    "no prompt behind an answer": Trait(
        chatml(
            generate=GENERATE.replace(
                "add_generation_prompt", "add_generation_prompt and messages[-1].role == 'user'"
            )
        ),
        {
            "multi": ended(*MULTI),
            "twice": "has no prompt for an answer that follows a message of the role 'assistant'",
        },
    ),
    "answers joined": Trait(
        "{% for m in messages %}{% set again = loop.previtem is defined and loop.previtem.role == "
        "m.role %}{% set goes_on = loop.nextitem is defined and loop.nextitem.role == m.role %}"
        "{{ '' if again else '<|im_start|>' ~ m.role ~ '\n' }}{{ m.content }}"
        "{{ ' ' if goes_on else '<|im_end|>\n' }}{% endfor %}" + GENERATE,
        {
            "multi": ended(*MULTI),
            "twice": "does not continue the prompt that a server would send",
        },
    ),
    "answer renamed": Trait(
        chatml(before="").replace(
            "{{ m.role }}", "{{ 'model' if m.role == 'assistant' else m.role }}"
        ),
        {"single": "does not continue the prompt that a server would send"},
    ),
    "counts the messages": Trait(
        chatml(before="{{ messages | length }}"),
        {"single": ended("It is 4, I think."), "multi": ended(*MULTI)},
        sequences={"multi": 3},
    ),
}
