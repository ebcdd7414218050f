"""Every chat template against every kind of conversation: is each trained turn what a server would
ask for and get?

    python bench/templates.py [FOLDER] [--verbose | --cost]

FOLDER is any folder of `*.jinja` files, at any depth: a collection that is published, or your own.
For each template and conversation the row is encoded, and each trained turn is compared with what
transformers renders (`template_oracle.py`, which shares no code with the engine): the prompt's ids,
the whole text of the output, the stop token, every tool call, the thought and the content. All rows
are also encoded in the reverse order by a fresh encoder: the result of a row may not depend on its
place. The table names the template and what its rows became; refusals are listed with their reason.

`--cost`: instead, the processor time of encoding a dialogue of 100 turns with each template, as a
multiple of one `apply_chat_template` call on the same dialogue.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftx.data.chat.sandbox import TEMPLATE_ERRORS, compile_template
from sftx.data.encoder import Encoder
from sftx.data.sources.rows import parse
from sftx.data.tokenizer import Tokenizer
from sftx.settings.schema import Data
from sftx.types import Example, Row, RowError

sys.path.insert(0, str(Path(__file__).parent))
from template_oracle import Oracle, Trained

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
_MARKS = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>\s]+｜>|</?s>|<[a-z_]+_of_[a-z]+>|\[/?[A-Z_]{3,}\]|\[gMASK\]|<sop>|<\|[a-z_]+>|<[a-z_]+\|>"
    r"|<sep>|<seed:[a-z:/]+>|<end_of_utterance>|<extra_id_\d>|\]~!b\[|\]~b\]|\[e~\["
)
_PLAIN = re.compile(r"</?think>|</?tool_call>|</?tool_response>")


def _tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {
            key: {"type": kind, "description": f"The {key}."} for key, kind in properties.items()
        },
        "required": list(properties),
    }
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": parameters},
    }


TOOLS = [_tool("get_weather", city="string"), _tool("find_flight", place="string")]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _model(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _call(name: str, arguments: Any, number: int = 0) -> dict[str, Any]:
    return {
        "type": "function",
        "id": f"call1234{number}",
        "function": {"name": name, "arguments": arguments},
    }


def _result(name: str, content: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "name": name, "tool_call_id": f"call1234{number}", "content": content}


_SYSTEM = {"role": "system", "content": "Be brief."}
_CALL = _call("get_weather", {"city": "Paris"})
_RESULT = _result("get_weather", '{"degrees": 21}')
_ODD = {
    "city": 'Köln "am <Rhein>" & so\nweiter',
    "days": 3,
    "where": {"lat": 50.9, "tags": ["a", "b"]},
    "now": True,
}
Talk = tuple[list[dict[str, Any]], list[dict[str, Any]]]
CONVERSATIONS: dict[str, Talk] = {
    "single": ([_user("What is 2+2?"), _model("It is 4, I think.")], []),
    "multi": (
        [
            _user("Hi"),
            _model("Hello there!"),
            _user("And now?"),
            _model("Now we talk."),
            _user("Bye"),
            _model("Bye!"),
        ],
        [],
    ),
    "system": ([_SYSTEM, _user("Hi"), _model("Yes."), _user("So"), _model("No.")], []),
    "tools": ([_user("Hi"), _model("Hello.")], TOOLS),
    "calls": (
        [
            _user("Weather?"),
            _model("", tool_calls=[_CALL]),
            _RESULT,
            _model("It is 21 degrees."),
            _user("Ok"),
            _model("Fine."),
        ],
        TOOLS,
    ),
    "reasoning": (
        [
            _user("What is 3+4?"),
            _model("It is 7.", reasoning_content="Three and four make seven."),
            _user("Sure?"),
            _model("Quite.", reasoning_content="I counted twice."),
        ],
        [],
    ),
    "mixed": (
        [_user("Hi"), _model("Ho.", reasoning_content="Say ho."), _user("So"), _model("Well.")],
        [],
    ),
    "edges": (
        [
            _user("  a\n"),
            _model("\n  padded \n"),
            _user("[[x]] שלום"),
            _model("🙂 end "),
            _user("rest"),
        ],
        [],
    ),
    "sys_call": (
        [_SYSTEM, _user("Weather?"), _model("", tool_calls=[_CALL]), _RESULT, _model("It is 21.")],
        TOOLS,
    ),
    "said_call": (
        [
            _user("Weather?"),
            _model("I will use get_weather for that.", tool_calls=[_CALL]),
            _RESULT,
            _model("It is 21."),
        ],
        TOOLS,
    ),
    "same_fn": (
        [
            _user("Weather?"),
            _model("", tool_calls=[_CALL, _call("get_weather", {"city": "Lisbon"}, 1)]),
            _RESULT,
            _result("get_weather", "It rains.", 1),
            _model("21 degrees, and rain."),
        ],
        TOOLS,
    ),
    "equal_calls": (
        [
            _user("Twice?"),
            _model("", tool_calls=[_CALL, _call("get_weather", {"city": "Paris"}, 1)]),
        ],
        TOOLS,
    ),
    "two_fns": (
        [
            _user("A trip?"),
            _model("", tool_calls=[_CALL, _call("find_flight", {"place": "Lisbon"}, 1)]),
            _RESULT,
            _result("find_flight", "At nine.", 1),
            _model("Warm, and at nine."),
        ],
        TOOLS,
    ),
    "as_text": (
        [
            _user("Weather?"),
            _model("", tool_calls=[_call("get_weather", '{"city": "Paris"}')]),
            _RESULT,
            _model("It is 21."),
        ],
        TOOLS,
    ),
    "odd_args": (
        [
            _user("Weather?"),
            _model("", tool_calls=[_call("get_weather", _ODD)]),
            _RESULT,
            _model("21."),
        ],
        TOOLS,
    ),
    "rounds": (
        [
            _SYSTEM,
            _user("A trip?"),
            _model("", tool_calls=[_CALL]),
            _RESULT,
            _model("", tool_calls=[_call("find_flight", {"place": "Lisbon"}, 1)]),
            _result("find_flight", "At nine.", 1),
            _model("Go."),
            _user("Weather again?"),
            _model("", tool_calls=[_call("get_weather", {"city": "Oslo"}, 2)]),
            _result("get_weather", "Snow.", 2),
            _model("It snows."),
        ],
        TOOLS,
    ),
    "th_calls": (
        [
            _user("Weather?"),
            _model("", reasoning_content="Ask the tool first.", tool_calls=[_CALL]),
            _RESULT,
            _model("It is 21.", reasoning_content="The tool says so."),
        ],
        TOOLS,
    ),
    "th_all": (
        [
            _user("One?"),
            _model("First.", reasoning_content="Begin with one."),
            _user("Two?"),
            _model("Second.", reasoning_content="Then comes two."),
            _user("Three?"),
            _model("Third.", reasoning_content="And three is last."),
        ],
        [],
    ),
    "twice": (
        [_user("Hi"), _model("Hello."), _model("Still there?"), _user("Yes"), _model("Good.")],
        [],
    ),
    "twice_th": (
        [
            _user("Hi"),
            _model("Hello.", reasoning_content="Greet."),
            _model("You?", reasoning_content="Now ask."),
        ],
        [],
    ),
    "first": ([_model("Welcome!"), _user("Hi"), _model("How can I help?")], []),
    "sys_first": ([_SYSTEM, _model("Welcome!"), _user("Hi"), _model("How can I help?")], []),
    "empty": ([_user("Say nothing."), _model(""), _user("Say yes."), _model("yes")], []),
    "white": (
        [
            _user("List:"),
            _model("\n\n- one\n- two\n\n"),
            _user("  Code?  "),
            _model("    return 1\n"),
        ],
        [],
    ),
}


@dataclass
class Result:
    """What one conversation became with one template: `kind` is pass, split, forced or refused;
    `reason` says more.
    """

    kind: str
    reason: str = ""
    wrong: list[str] = field(default_factory=list)


def prepared(sources: list[str]) -> tuple[Tokenizer, Any]:
    """A tokenizer that knows the marks of all templates as its own tokens: ours, and the one of
    transformers.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    published = SHARED / "tokenizers" / "qwen3" / "tokenizer.json"
    if published.exists():
        backend = tokenizers.Tokenizer.from_file(str(published))
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
        from small_tokenizers import backend as small

        backend = small("byte_level")
    source = "\n".join(sources)
    marks = sorted({"<s>", "</s>", *_MARKS.findall(source)})
    backend.add_special_tokens(
        [tokenizers.AddedToken(mark, normalized=False, special=True) for mark in marks]
    )
    backend.add_tokens(
        [
            tokenizers.AddedToken(mark, normalized=False)
            for mark in sorted(set(_PLAIN.findall(source)))
        ]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return Tokenizer.of(theirs), theirs


def row_of(name: str) -> Row:
    """The row of one kind of conversation, read as it would be from a file."""
    messages, tools = CONVERSATIONS[name]
    return parse({"messages": messages, "tools": tools}, "messages")


def spans(example: Example) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of targets."""
    begin = None
    for i, weight in enumerate([*example.weights.tolist(), 0.0]):
        if weight and begin is None:
            begin = i
        elif not weight and begin is not None:
            yield begin, i
            begin = None


def said(theirs: Any, example: Example, begin: int, end: int) -> str:
    """The text of some tokens of an example, as it reads behind the tokens before them."""
    before, whole = (theirs.decode(example.ids[:at]) for at in (begin, end))
    return whole.removeprefix(before)


def check(encoder: Encoder, theirs: Any, name: str, source: str = "") -> Result:
    """Encode one conversation and hold every trained turn against what transformers renders with
    the template `source`; default: the encoder's own.
    """
    messages, tools = CONVERSATIONS[name]
    oracle = Oracle(theirs, source or str(encoder.chat_template), messages, tools)
    encoded = encoder.encode([row_of(name)])[0]
    if isinstance(encoded, RowError):
        return Result("refused", str(encoded), oracle.refused_wrongly())
    result = Result("split" if len(encoded.examples) > 1 else "pass", "; ".join(encoded.notes))
    turns = [t for t, message in enumerate(messages) if message["role"] == "assistant"]
    found = [(example, begin, end) for example in encoded.examples for begin, end in spans(example)]
    if len(found) != len(turns):
        result.wrong.append(f"{len(found)} spans for {len(turns)} turns")
        return result
    lost = any("left out" in note for note in encoded.notes)
    for t, (example, begin, end) in zip(turns, found, strict=True):
        if "opening" in example.note or "no-thinking" in example.note:
            result.kind = "forced"
        switch = {
            key: value == "True"
            for key, value in re.findall(r"prompt \((\w+)=(\w+)\)", example.note)
        }
        output = said(theirs, example, begin, end)
        last = theirs.decode([example.ids[end - 1]])
        trained = Trained(t, example.ids[:begin].tolist(), output, last)
        result.wrong += oracle.wrongs(trained, switch, lost)
    return result


def moved(ours: Tokenizer, path: Path) -> list[str]:
    """The conversations whose result depends on the order of the rows."""
    names = list(CONVERSATIONS)
    rows = [row_of(name) for name in names]
    data = Data(template=str(path))
    forward = Encoder(ours, data, 4096).encode(rows)
    backward = Encoder(ours, data, 4096).encode(rows[::-1])[::-1]
    return [
        name for name, a, b in zip(names, forward, backward, strict=True) if _state(a) != _state(b)
    ]


def _state(encoded: Any) -> Any:
    if isinstance(encoded, RowError):
        return str(encoded)
    return [(e.ids.tolist(), e.weights.tolist(), e.note) for e in encoded.examples], sorted(
        encoded.notes
    )


def main(given: list[str] | None = None) -> None:
    """Print the table; exit code 1 if any turn is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SHARED / "chat_templates")
    parser.add_argument("--verbose", action="store_true", help="show the trained outputs")
    parser.add_argument("--only", default="", help="templates whose path holds this")
    parser.add_argument("--cost", action="store_true", help="what dialogues of 100 turns cost")
    arguments = parser.parse_args(given)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    counts: Counter[str] = Counter()
    refused: list[str] = []
    texts = {path: readable(path) for path in sorted(arguments.folder.rglob("*.jinja"))}
    if not texts:
        parser.error(f"{arguments.folder} holds no file named *.jinja")
    paths = [path for path, text in texts.items() if text and arguments.only in str(path)]
    ours, theirs = prepared(list(texts.values()))
    counts["unusable"] = list(texts.values()).count("")
    if arguments.cost:
        return print_costs(paths, ours, theirs)
    print(f"{'template':58s} {'stop':22s} " + " ".join(f"{name:9s}" for name in CONVERSATIONS))
    for path in paths:
        encoder = Encoder(ours, Data(template=str(path)), 4096)
        cells = []
        details = []
        for name in CONVERSATIONS:
            result = check(encoder, theirs, name)
            kind = "WRONG" if result.wrong else result.kind
            counts[kind] += 1
            cells.append(f"{kind:9s}")
            details += [f"    {name}: {line}" for line in result.wrong]
            if result.kind == "refused":
                refused.append(f"{path.name} {name}: {result.reason}")
            elif arguments.verbose:
                details.append(f"    {name}: {result.reason}")
                details += [f"      {line}" for line in outputs(encoder, theirs, name)]
        for name in moved(ours, path):
            counts["MOVED"] += 1
            details.append(f"    {name}: its result depends on the order of the rows")
        stop = theirs.decode([encoder.stop_id])
        print(f"{path.relative_to(arguments.folder)!s:58s} {stop:22s} " + " ".join(cells))
        print("".join(line + "\n" for line in details), end="")
    print("\nrefusals:\n" + "\n".join(refused))
    print("\n" + " ".join(f"{kind}={count}" for kind, count in sorted(counts.items()) if count))
    raise SystemExit(1 if counts["WRONG"] or counts["MOVED"] else 0)


def readable(path: Path) -> str:
    """The text of a template; "" for what is none, which is said."""
    try:
        text = path.read_text(encoding="utf-8")
        compile_template(text)
    except (UnicodeDecodeError, *TEMPLATE_ERRORS) as error:
        print(f"not usable: {path}: {error}")
        return ""
    return text


def print_costs(paths: list[Path], ours: Tokenizer, theirs: Any) -> None:
    """For each kind of dialogue: the templates whose cost is over 3 calls, and a summary."""
    said = "the quick brown fox jumps over a lazy dog and says something " * 4 + "else"
    asked = [(_user(f"{i} {said}"), f"{i} {said}") for i in range(50)]
    plain = [message for user, text in asked for message in (user, _model(text))]
    calls = [
        m
        for user, text in asked[:25]
        for m in (user, _model("", tool_calls=[_CALL]), _RESULT, _model(text))
    ]
    thoughts = [
        message
        for user, text in asked
        for message in (user, _model(text, reasoning_content=text[::-1]))
    ]
    kinds = {"plain": (plain, []), "calls": (calls, TOOLS), "reasoning": (thoughts, [])}
    costs: dict[str, list[float]] = {name: [] for name in kinds}
    for path in paths:
        encoder = Encoder(ours, Data(template=str(path)), 1 << 20)
        for name, (messages, tools) in kinds.items():
            row = Row("messages", messages=tuple(messages), tools=tuple(tools))
            if isinstance(encoder.encode([row])[0], RowError):
                continue
            oracle = Oracle(theirs, str(encoder.chat_template), messages, tools)
            one = seconds(lambda oracle=oracle: oracle.ids(len(oracle.messages), generate=False))
            costs[name].append(seconds(lambda e=encoder, r=row: e.encode([r])) / one)
            if costs[name][-1] > 3:
                print(f"{name:10s} {costs[name][-1]:5.1f} {path.name}", flush=True)
    for name, found in costs.items():
        within = sum(cost <= 3 for cost in found)
        print(
            f"{name}: {within} of {len(found)} templates within 3 calls, median "
            f"{sorted(found)[len(found) // 2]:.2f}"
        )


def seconds(run: Callable[[], Any]) -> float:
    """Least processor time of three runs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def outputs(encoder: Encoder, theirs: Any, name: str) -> Iterator[str]:
    """Each trained span as text, with the end of its prompt before it."""
    encoded = encoder.encode([row_of(name)])[0]
    assert not isinstance(encoded, RowError)
    for example in encoded.examples:
        for begin, end in spans(example):
            prompt = theirs.decode(example.ids[:begin])
            yield f"...{prompt[-40:]!r} -> {theirs.decode(example.ids[begin:end])!r}"


if __name__ == "__main__":
    main()
