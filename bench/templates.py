"""Every chat template against every kind of conversation: are the trained tokens those a server would ask for?

    python bench/templates.py [FOLDER] [--verbose | --cost]

For each template and conversation the row is encoded, and each trained span is checked against transformers: the ids
before it must equal `apply_chat_template(messages[:t], add_generation_prompt=True)`, the span must end in a token that
stops generation and hold the turn's content. The table names the template and what its rows became; refusals are
listed with their reason.

`--cost`: instead, the processor time of encoding a dialogue of 100 turns with each template, as a multiple of one
`apply_chat_template` call on the same dialogue.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftx.config import Data
from sftx.data.render import Encoder
from sftx.data.tokenizer import Tokenizer
from sftx.types import Example, Row, RowError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
_MARKS = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>\s]+｜>|</?s>|<[a-z_]+_of_[a-z]+>|\[/?[A-Z_]{3,}\]|\[gMASK\]|<sop>|<\|[a-z_]+>|<[a-z_]+\|>"
    r"|<sep>|<seed:[a-z:/]+>|<end_of_utterance>|<extra_id_\d>|\]~!b\[|\]~b\]|\[e~\["
)
_PLAIN = re.compile(r"</?think>|</?tool_call>|</?tool_response>")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _model(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


_CALL = {"type": "function", "id": "call12345", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
_RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": '{"degrees": 21}'}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "single": ([_user("What is 2+2?"), _model("It is 4, I think.")], []),
    "multi": (
        [_user("Hi"), _model("Hello there!"), _user("And now?"), _model("Now we talk."), _user("Bye"), _model("Bye!")],
        [],
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, _user("Hi"), _model("Yes."), _user("So"), _model("No.")],
        [],
    ),
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
    "mixed": ([_user("Hi"), _model("Ho.", reasoning_content="Say ho."), _user("So"), _model("Well.")], []),
    "edges": ([_user("  a\n"), _model("\n  padded \n"), _user("[[x]] שלום"), _model("🙂 end "), _user("rest")], []),
}


@dataclass
class Result:
    """What one conversation became with one template: `kind` is pass, split, forced or refused; `reason` says more."""

    kind: str
    reason: str = ""
    wrong: list[str] = field(default_factory=list)


def prepared(sources: list[str]) -> tuple[Tokenizer, Any]:
    """A tokenizer that knows the marks of all templates as its own tokens: ours, and the one of transformers."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizers" / "qwen3" / "tokenizer.json"))
    source = "\n".join(sources)
    marks = sorted({"<s>", "</s>", *_MARKS.findall(source)})
    backend.add_special_tokens([tokenizers.AddedToken(mark, normalized=False, special=True) for mark in marks])
    backend.add_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in sorted(set(_PLAIN.findall(source)))])
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return Tokenizer.of(theirs), theirs


def spans(example: Example) -> Iterator[tuple[int, int]]:
    """Begin and end of each stretch of targets."""
    begin = None
    for i, weight in enumerate([*example.weights.tolist(), 0.0]):
        if weight and begin is None:
            begin = i
        elif not weight and begin is not None:
            yield begin, i
            begin = None


def check(encoder: Encoder, theirs: Any, name: str) -> Result:
    """Encode one conversation and hold every trained span against what transformers would send."""
    messages, tools = CONVERSATIONS[name]
    row = Row("messages", messages=tuple(messages), tools=tuple(tools))  # type: ignore[arg-type]
    encoded = encoder.encode([row])[0]
    if isinstance(encoded, RowError):
        return Result("refused", str(encoded))
    result = Result("split" if len(encoded.examples) > 1 else "pass", "; ".join(encoded.notes))
    turns = [t for t, message in enumerate(messages) if message["role"] == "assistant"]
    found = [(example, begin, end) for example in encoded.examples for begin, end in spans(example)]
    if len(found) != len(turns):
        result.wrong.append(f"{len(found)} spans for {len(turns)} turns")
        return result
    for t, (example, begin, end) in zip(turns, found, strict=True):
        if "opening" in example.note or "no-thinking" in example.note:
            result.kind = "forced"
        shown = [encoder.template(bool(tools)).habits.shaped(message) for message in messages[:t]]
        switch = {key: value == "True" for key, value in re.findall(r"prompt \((\w+)=(\w+)\)", example.note)}
        served = [
            theirs.apply_chat_template(
                shown,
                tools=tools or None,
                chat_template=encoder.chat_template,
                add_generation_prompt=True,
                return_dict=False,
                **kwargs,
            )
            for kwargs in ([switch, {}] if switch else [{}])  # turns with and without a switch may share a sequence
        ]
        prompt = example.ids[:begin].tolist()
        if prompt not in served:
            result.wrong.append(f"turn {t}: prompt {theirs.decode(prompt)!r} is not {theirs.decode(served[0])!r}")
        output = theirs.decode(example.ids[begin:end])
        last = theirs.decode([example.ids[end - 1]])
        if not encoder.tokenizer.is_special(last):
            result.wrong.append(f"turn {t}: ends in {last!r}")
        thought = messages[t].get("reasoning_content", "")
        if thought not in output and "left out" not in example.note:
            result.wrong.append(f"turn {t}: {output!r} does not hold the thought")
        if messages[t]["content"].strip() not in output:
            result.wrong.append(f"turn {t}: {output!r} does not hold the content")
        if "tool_calls" in messages[t] and not ("get_weather" in output and "Paris" in output):
            result.wrong.append(f"turn {t}: {output!r} does not hold the call")
    return result


def main() -> None:
    """Print the table; exit code 1 if any span is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SHARED / "chat_templates")
    parser.add_argument("--verbose", action="store_true", help="show the trained outputs")
    parser.add_argument("--only", default="", help="templates whose path holds this")
    parser.add_argument("--cost", action="store_true", help="what dialogues of 100 turns cost")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    counts: dict[str, int] = {}
    wrong = 0
    refused: list[str] = []
    paths = [path for path in sorted(arguments.folder.rglob("*.jinja")) if arguments.only in str(path)]
    ours, theirs = prepared([path.read_text(encoding="utf-8") for path in paths])
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
            counts[kind] = counts.get(kind, 0) + 1
            wrong += bool(result.wrong)
            cells.append(f"{kind:9s}")
            details += [f"    {name}: {line}" for line in result.wrong]
            if result.kind == "refused":
                refused.append(f"{path.name} {name}: {result.reason}")
            elif arguments.verbose:
                details.append(f"    {name}: {result.reason}")
                details += [f"      {line}" for line in outputs(encoder, theirs, name)]
        stop = theirs.decode([encoder.stop_id])
        print(f"{path.relative_to(arguments.folder)!s:58s} {stop:22s} " + " ".join(cells))
        print("".join(line + "\n" for line in details), end="")
    print("\nrefusals:\n" + "\n".join(refused))
    print("\n" + " ".join(f"{kind}={count}" for kind, count in sorted(counts.items())))
    raise SystemExit(1 if wrong else 0)


def print_costs(paths: list[Path], ours: Tokenizer, theirs: Any) -> None:
    """For each kind of dialogue: the templates whose cost is over 3 calls, and a summary."""
    said = "the quick brown fox jumps over a lazy dog and says something " * 4 + "else"
    asked = [(_user(f"{i} {said}"), f"{i} {said}") for i in range(50)]
    plain = [message for user, text in asked for message in (user, _model(text))]
    calls = [m for user, text in asked[:25] for m in (user, _model("", tool_calls=[_CALL]), _RESULT, _model(text))]
    thoughts = [message for user, text in asked for message in (user, _model(text, reasoning_content=text[::-1]))]
    kinds = {"plain": (plain, []), "calls": (calls, TOOLS), "reasoning": (thoughts, [])}
    costs: dict[str, list[float]] = {name: [] for name in kinds}
    for path in paths:
        encoder = Encoder(ours, Data(template=str(path)), 1 << 20)
        for name, (messages, tools) in kinds.items():
            row = Row("messages", messages=tuple(messages), tools=tuple(tools))  # type: ignore[arg-type]
            if isinstance(encoder.encode([row])[0], RowError):
                continue
            shown = [encoder.template(bool(tools)).habits.shaped(message) for message in messages]
            asking = {"tools": tools or None, "chat_template": encoder.chat_template}
            one = seconds(lambda m=shown, a=asking: theirs.apply_chat_template(m, **a))
            costs[name].append(seconds(lambda e=encoder, r=row: e.encode([r])) / one)
            if costs[name][-1] > 3:
                print(f"{name:10s} {costs[name][-1]:5.1f} {path.name}", flush=True)
    for name, found in costs.items():
        within = sum(cost <= 3 for cost in found)
        print(f"{name}: {within} of {len(found)} templates within 3 calls, median {sorted(found)[len(found) // 2]:.2f}")


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
    messages, tools = CONVERSATIONS[name]
    encoded = encoder.encode([Row("messages", messages=tuple(messages), tools=tuple(tools))])[0]  # type: ignore[arg-type]
    assert not isinstance(encoded, RowError)
    for example in encoded.examples:
        for begin, end in spans(example):
            prompt = theirs.decode(example.ids[:begin])
            yield f"...{prompt[-40:]!r} -> {theirs.decode(example.ids[begin:end])!r}"


if __name__ == "__main__":
    main()
