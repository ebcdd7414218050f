"""Bad rows, kind by kind: each is named at once, with its place, its field and the reason, and what
to do about bad rows follows; where bad rows are skipped, no good one goes with them.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import ours

from sftx.data.dataset import load_corpora
from sftx.data.store.corpus import Corpus
from sftx.settings.make import make_config
from sftx.types import UserError

HINT = "\n(data.on_bad_row=skip leaves bad rows out and lists them)"
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "yes"}
HUMAN, GPT = {"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}
GOOD: dict[str, Any] = {
    "text": {"text": "the quick brown fox"},
    "pairs": {"prompt": "hello", "completion": "yes"},
    "dialogue": {"dialogue": ["hello", "yes"]},
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "hello", "output": "yes"},
    "segments": {"segments": [{"text": "hello", "weight": 0}, {"text": "yes", "weight": 1}]},
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
}


def pair(**more: Any) -> dict[str, Any]:
    return {"prompt": "p", "completion": "c", **more}


def answer(**more: Any) -> dict[str, Any]:
    """A row of messages whose answer has more fields than usual."""
    return {"messages": [USER, {**ANSWER, **more}]}


def called(**function: Any) -> dict[str, Any]:
    return answer(tool_calls=[{"type": "function", "function": function}])


def talk(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [*messages], **more}


def shares(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": [*turns], **more}


def tokens(*ids: Any, **more: Any) -> dict[str, Any]:
    return {"input_ids": [*ids], **more}


# The format of the good rows around it, the bad row (a value, or the very line), and a part of what
# must be said.
BAD_ROWS: dict[str, tuple[str, Any, str]] = {
    # --- no JSON, or no row
    "no JSON": ("pairs", b"not json", "not valid JSON: Expecting value at column 1"),
    "cut off in a text": ("pairs", b'{"prompt": "half a ro', "the line is cut off"),
    "cut off in an object": ("pairs", b'{"prompt": "p", "completion": "c"', "the line is cut off"),
    "a comma too many": ("pairs", b'{"prompt": "p", "completion": "c",}', "not valid JSON"),
    "single quotes": ("pairs", b"{'prompt': 'p', 'completion': 'c'}", "not valid JSON"),
    "a comment": ("pairs", b"// the rest is new", "not valid JSON"),
    "two objects": ("pairs", b'{"prompt": "p", "completion": "c"} {}', "Extra data at column 36"),
    "a bracket": ("pairs", b"[", "a JSON array of rows is read from a file named .json"),
    "a tab inside a text": ("pairs", b'{"prompt": "a\tb", "completion": "c"}', "at column 14"),
    "no UTF-8": ("pairs", b'{"prompt": "\xff", "completion": "c"}', "not UTF-8"),
    "UTF-16": ("pairs", '{"prompt": "p"}'.encode("utf-16-le"), "not valid JSON"),
    "thousands of digits": ("pairs", b'{"prompt": %s}' % (b"1" * 5000), "thousands of digits"),
    "deep": ("pairs", b'{"prompt": %s}' % (b"[" * 9999 + b"]" * 9999), "nested too deeply"),
    "a number": ("pairs", 17, "number"),
    "null": ("pairs", None, "null"),
    "true": ("pairs", True, "true or false"),
    "an empty list": ("pairs", [], "list"),
    "an empty object": ("pairs", {}, "none"),
    "another format": ("pairs", ["p", "c"], "expected an object with"),
    # --- pairs
    "a column missing": ("pairs", {"prompt": "p"}, "completion"),
    "a misspelt column": (
        "pairs",
        {"promt": "p", "completion": "c"},
        "did you mean 'prompt' where it says 'promt'?",
    ),
    "columns of another tool": ("pairs", {"query": "q", "response": "r"}, "query, response"),
    "a number as text": ("pairs", pair(completion=7), "'completion' must be text, not a number"),
    "null as text": ("pairs", pair(completion=None), "'completion' must be text, not null"),
    "an object as text": ("pairs", pair(prompt={"a": 1}), "'prompt' must be text, not an object"),
    "half a character": (
        "pairs",
        rb'{"prompt": "a\ud800b", "completion": "c"}',
        "'prompt' holds half of a surrogate pair at character 1",
    ),
    "messages and a text": ("pairs", pair(prompt=[]), "'prompt' and 'completion' must both be"),
    "tools without messages": ("pairs", pair(tools=[{}]), "'tools' needs"),
    "settings of a template without messages": (
        "pairs",
        pair(chat_template_kwargs={"a": 1}),
        "'chat_template_kwargs' needs",
    ),
    "a number as system": ("pairs", pair(system=3), "'system' must be text"),
    "a text as history": ("pairs", pair(history="x"), "'history' must be a list"),
    "half a turn in the history": ("pairs", pair(history=[["a"]]), "history[0] must be"),
    "a number in the history": ("pairs", pair(history=[["a", 1]]), "history[0][1]"),
    "an answer that is not wanted": ("pairs", pair(label=False), "KTO"),
    "images": ("pairs", pair(images=["a.png"]), "'images' is not read"),
    "functions": ("pairs", pair(functions=[{"name": "f"}]), "'functions' is not read"),
    "many columns": ("pairs", pair(**{f"k{i}": 1 for i in range(1200)}), "1,202 columns"),
    # --- text
    "a number instead of a text": ("text", {"text": 5}, "'text' must be text, not a number"),
    "null instead of a text": ("text", {"text": None}, "'text' must be text, not null"),
    "an empty text": ("text", {"text": ""}, "no token to learn"),
    # --- dialogues
    "an odd number of phrases": ("dialogue", {"dialogue": ["a", "b", "c"]}, "an odd number"),
    "no phrase": ("dialogue", {"dialogue": []}, "'dialogue'"),
    "a number among phrases": ("dialogue", {"dialogue": ["a", 1]}, "dialogue[1]"),
    "null among phrases": ("dialogue", {"dialogue": [None, "a"]}, "dialogue[0]"),
    "a text as dialogue": ("dialogue", {"dialogue": "a"}, "'dialogue'"),
    # --- messages
    "no message": ("messages", talk(), "'messages'"),
    "a text as messages": ("messages", {"messages": "a"}, "'messages'"),
    "a text among messages": ("messages", talk(USER, "a"), "messages[1] must be an object"),
    "no role": ("messages", talk(USER, {"content": "a"}), "messages[1] must be an object"),
    "a misspelt role": (
        "messages",
        talk(USER, {"role": "asistant", "content": "a"}),
        "messages[1].role is 'asistant'; did you mean 'assistant'?",
    ),
    "a role of ShareGPT": (
        "messages",
        talk({"role": "human", "content": "a"}, ANSWER),
        "messages[0].role is 'human'; did you mean 'user'?",
    ),
    "an unknown role": (
        "messages",
        talk({"role": "wizard", "content": "a"}, ANSWER),
        "messages[0].role is 'wizard'; known:",
    ),
    "no content": ("messages", talk(USER, {"role": "assistant"}), "messages[1].content is missing"),
    "content null": ("messages", answer(content=None), "messages[1].content is null"),
    "content a number": ("messages", answer(content=3), "messages[1].content"),
    "an image": (
        "messages",
        talk({"role": "user", "content": [{"type": "image"}]}, ANSWER),
        "messages[0].content[0] is a part of type 'image'",
    ),
    "a part with a mark": (
        "messages",
        answer(content=[{"type": "text", "text": "a", "train": False}]),
        "messages[1].content[0].train is not read",
    ),
    "half a character in a message": (
        "messages",
        json.dumps(answer(content="\ud800")).encode(),
        "messages[1].content",
    ),
    "a misspelt field": ("messages", answer(wieght=0), "did you mean 'weight'?"),
    "many fields": ("messages", answer(**{f"k{i}": 1 for i in range(1200)}), "1,202 fields"),
    "a function_call": ("messages", answer(function_call={"name": "f"}), "write it as tool_calls"),
    "a weight as text": ("messages", answer(weight="1"), "messages[1].weight must be a number"),
    "a weight that is no number": ("messages", answer(weight=float("nan")), "messages[1].weight"),
    "a weight below 0": ("messages", answer(weight=-1), "messages[1].weight"),
    "an endless weight": ("messages", answer(weight=float("inf")), "messages[1].weight"),
    "a weight beyond float32": ("messages", answer(weight=1e300), "messages[1].weight"),
    "train a number": ("messages", answer(train=1), "messages[1].train must be true or false"),
    "training a text": ("messages", answer(training="no"), "messages[1].training must be"),
    "loss of a question": ("messages", talk({**USER, "loss": True}, ANSWER), "messages[0].loss"),
    "train and loss differ": ("messages", answer(loss=False, train=True), "messages[1] says"),
    "loss_scale": ("messages", answer(loss_scale=0.5), "messages[1].loss_scale is not read"),
    "train_detail": ("messages", answer(train_detail=[{}]), "messages[1].train_detail"),
    "an image beside the text": ("messages", answer(image="a.png"), "messages[1].image"),
    "calls as text": ("messages", answer(tool_calls="f"), "messages[1].tool_calls must be a list"),
    "a call without a name": ("messages", called(arguments={}), "messages[1].tool_calls[0] must"),
    "arguments cut off": (
        "messages",
        called(name="f", arguments='{"a": '),
        "messages[1].tool_calls[0].function.arguments is not valid JSON",
    ),
    "arguments too deep": ("messages", called(name="f", arguments="[" * 9999), "too deeply"),
    "calls that the template leaves out": (
        "messages",
        called(name="weather", arguments={"city": "Paris"}),
        "turn 1: the chat template does not render tool calls",
    ),
    "tools cut off": ("messages", talk(USER, ANSWER, tools="{"), "tools is not valid JSON"),
    "texts as tools": ("messages", talk(USER, ANSWER, tools=["f"]), "'tools' must be a list"),
    "a misspelt tools": ("messages", talk(USER, ANSWER, tool=[]), "did you mean 'tools'?"),
    "a list as settings of the template": (
        "messages",
        talk(USER, ANSWER, chat_template_kwargs=[1]),
        "'chat_template_kwargs' must be an object",
    ),
    "two system messages": (
        "messages",
        talk({"role": "system", "content": "A"}, USER, ANSWER, system="B"),
        "'system' and the first message are both system messages, and differ",
    ),
    "no answer": ("messages", talk(USER), "no token to learn: no turn carries weight"),
    "no answer with weight": ("messages", answer(weight=0), "no turn carries weight"),
    "preferences": ("messages", talk(USER, chosen=[ANSWER], rejected=[ANSWER]), "'chosen'"),
    "an answer that the template has no prompt for": (
        "messages",
        talk(ANSWER),
        "the conversation begins with an output",
    ),
    "a message that the template refuses": (
        "messages",
        talk({"role": "system", "content": "no"}, USER, ANSWER),
        "the chat template refuses the messages up to turn 3: no system here",
    ),
    # --- ShareGPT
    "no turn": ("sharegpt", shares(), "'conversations'"),
    "an unknown speaker": (
        "sharegpt",
        shares({"from": "narrator", "value": "a"}, GPT),
        "conversations[0].from is 'narrator'",
    ),
    "a turn without value": ("sharegpt", shares(HUMAN, {"from": "gpt"}), "conversations[1] must"),
    "a turn of null": ("sharegpt", shares(HUMAN, {**GPT, "value": None}), "conversations[1]"),
    "a turn of a number": ("sharegpt", shares(HUMAN, {**GPT, "value": 1}), "conversations[1]"),
    # --- Alpaca
    "no output": ("alpaca", {"instruction": "a"}, "'output' is missing"),
    "output null": ("alpaca", {"instruction": "a", "output": None}, "'output' must be text"),
    "a number as input": ("alpaca", {**GOOD["alpaca"], "input": 1}, "'input' must be text"),
    # --- segments
    "no segment": ("segments", {"segments": []}, "'segments'"),
    "a segment without weight": ("segments", {"segments": [{"text": "a"}]}, "segments[0] must"),
    "a segment with more fields": (
        "segments",
        {"segments": [{"text": "a", "weight": 1, "mask": 0}]},
        "segments[0] has unknown fields: mask",
    ),
    "a segment that weighs no number": (
        "segments",
        {"segments": [{"text": "a", "weight": float("nan")}]},
        "segments[0].weight must be a number",
    ),
    "segments of no weight": ("segments", {"segments": [{"text": "a", "weight": 0}]}, "no token"),
    # --- tokens
    "no token": ("tokens", tokens(), "'input_ids' must be a list of whole numbers"),
    "half a token": ("tokens", tokens(1, 2.5), "'input_ids' must be a list of whole numbers"),
    "true as a token": ("tokens", tokens(1, True), "'input_ids' must be a list of whole numbers"),
    "a token below 0": ("tokens", tokens(1, -1), "'input_ids' holds -1"),
    "a token beyond 32 bits": ("tokens", tokens(1, 2**31), "'input_ids' holds 2147483648"),
    "a token beyond the vocabulary": ("tokens", tokens(1, 99_999), "input_ids[1] is 99999"),
    "too few labels": ("tokens", tokens(1, 2, labels=[1]), "'labels'"),
    "labels shifted by one": ("tokens", tokens(1, 2, 3, labels=[2, 3, -100]), "look shifted"),
    "other labels": ("tokens", tokens(1, 2, labels=[1, 300]), "labels[1] is 300"),
    "labels and weights": ("tokens", tokens(1, 2, labels=[1, 2], weights=[1, 1]), "not both"),
    "too few weights": ("tokens", tokens(1, 2, weights=[1]), "'weights'"),
    "a text as weight": ("tokens", tokens(1, 2, weights=[1, "1"]), "weights[1] must be a number"),
    "a mask of another tool": ("tokens", tokens(1, 2, loss_mask=[0, 1]), "rename it to 'weights'"),
    "padding": ("tokens", tokens(1, 2, attention_mask=[1, 0]), "'attention_mask' marks padding"),
    "a pack of documents": ("tokens", tokens(1, 2, position_ids=[0, 0]), "'position_ids'"),
    "all masked": ("tokens", tokens(1, 2, labels=[-100, -100]), "no token to learn"),
}
TEMPLATE = (
    "{{ raise_exception('no system here') if messages[0].role == 'system' }}"
    "{% for m in messages %}{{ '<s>' if m.role == 'user' }}{{ m.content }}{{ '<|im_end|>' if m.role"
    " == 'assistant' }}{% endfor %}"
)


def written(folder: Path, form: str, bad: Any, at: int) -> Path:
    """A file of two good rows and a bad one in line `at`."""
    good = json.dumps(GOOD[form]).encode()
    lines = [good, good]
    lines.insert(at - 1, bad if isinstance(bad, bytes) else json.dumps(bad).encode())
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read(path: Path, **data: Any) -> Corpus:
    tokenizer = ours()
    tokenizer.chat_templates = {"default": TEMPLATE}
    text = path.read_text("latin-1")
    template = "auto" if '"messages"' in text or '"conversations"' in text else "none"
    given: Any = {"train": str(path), "workers": 0, "template": template, **data}
    given["cache"] = str(path.parent / "cache")
    config = make_config(model="unused", output="unused", data=given)
    return load_corpora(config, tokenizer, 64)[0]


def refusal(path: Path, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **data)
    return str(caught.value)


@cache
def ids_of_good(form: str) -> list[int]:
    """The tokens of the good row of a format."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(GOOD[form]) + "\n")
        return read(path, format=form).example(0).ids.tolist()


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_at_once_and_costs_no_good_one(
    kind: str, at: int, tmp_path: Path
) -> None:
    form, bad, reason = BAD_ROWS[kind]
    path = written(tmp_path, form, bad, at)
    said = refusal(path, format=form)
    assert said.startswith(f"{path}:{at}: ")
    assert said.endswith(HINT)
    assert reason in said[: -len(HINT)]
    assert "on_bad_row" not in said[: -len(HINT)]
    kept = read(path, format=form, on_bad_row="skip")
    assert (kept.ledger.read, kept.ledger.trained, kept.ledger.dropped) == (3, 2, 1)
    assert [kept.example(i).ids.tolist() for i in range(len(kept))] == [ids_of_good(form)] * 2


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_first_row_is_named_though_it_decides_the_format(kind: str, tmp_path: Path) -> None:
    form, bad, _ = BAD_ROWS[kind]
    path = written(tmp_path, form, bad, 1)
    said = refusal(path)
    if kind == "another format":  # then the second row is the first bad one, and the third too
        assert said.startswith(f"{path}:2: field 'dialogue' is missing")
        assert "1 more bad rows" in said
    else:
        assert said.startswith(f"{path}:1: ")
        assert len(said) > len(f"{path}:1: {HINT}") + 10
    assert said.endswith("data.on_bad_row=skip leaves bad rows out and lists them)")
