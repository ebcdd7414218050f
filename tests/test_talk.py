"""Answers of `sftx chat` and `sftx serve`, against transformers' own rendering and generation."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftx import encode
from sftx.cli import main
from sftx.eval.sampling import Sampling
from sftx.model.runtime import Machine
from sftx.settings.schema import Model
from sftx.talk.assistant import Answer, Assistant
from sftx.talk.endpoint import Endpoint, is_local
from sftx.talk.load import load_assistants
from sftx.talk.real_servers import commands
from sftx.talk.sampling import sampling_of
from sftx.types import Message, UserError

HERE = Machine(torch.device("cpu"), torch.float32)
TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the lamp?"},
]
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("talk") / "model"
    # With larger weights, and a head of its own, its answers are no repetition of one token.
    return tiny.folder(path, tie_word_embeddings=False, initializer_range=0.4)


@pytest.fixture(scope="module")
def adapter(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("talk") / "adapter"
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(str(path))
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def _loaded(path: str, base: str = "") -> list[Assistant]:
    return load_assistants(Model(path=path), "auto", base, "", HERE)


def _answer(
    assistant: Assistant, sampling: Sampling = GREEDY, talk: list[Message] = TALK
) -> Answer:
    answer = Answer()
    pieces = list(assistant.stream(talk, sampling, answer))
    assert "".join(piece.text for piece in pieces) == answer.thought + answer.content
    return answer


def _by_transformers(path: str, adapter: str = "", **settings: object) -> list[int]:
    """The ids that transformers generates for TALK, from the folder alone."""
    model = AutoModelForCausalLM.from_pretrained(path)
    if adapter:
        model.load_adapter(adapter)
    tokenizer = AutoTokenizer.from_pretrained(path)
    given = tokenizer.apply_chat_template(
        TALK, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **given, max_new_tokens=12, do_sample=False, **settings
    )
    return out[0, given["input_ids"].shape[1] :].tolist()


def _text(folder: str, ids: list[int]) -> str:
    """The text of ids, without half a character at its end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def _with_stop(folder: str, path: Path, stop: int) -> str:
    """The same model, whose generation_config stops at `stop`."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    GenerationConfig(eos_token_id=[2, stop], pad_token_id=0).save_pretrained(path)
    return str(path)


def test_an_answer_is_what_transformers_generates(folder: str) -> None:
    answer = _answer(_loaded(folder)[0])
    assert answer.ids == _by_transformers(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert answer.content == _text(folder, answer.ids)
    assert answer.reason == "length"
    prompt = tokenizer.apply_chat_template(TALK, add_generation_prompt=True)
    assert answer.prompt_tokens == len(prompt["input_ids"])


def test_it_stops_where_servers_stop(folder: str, tmp_path: Path) -> None:
    said = _by_transformers(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = next(token for token in said[1:] if tokenizer.decode([token]).isalnum())
    answer = _answer(_loaded(_with_stop(folder, tmp_path / "m", stop))[0])
    assert answer.ids == said[: said.index(stop) + 1]
    assert answer.reason == "stop"
    assert answer.content == _text(folder, answer.ids[:-1])


def test_an_adapter_beside_its_own_base(folder: str, adapter: str) -> None:
    tuned, base = _loaded(adapter, "own")
    assert (tuned.name, base.name) == ("adapter", "base")
    assert _answer(tuned).ids == _by_transformers(folder, adapter)
    assert _answer(base).ids == _by_transformers(folder)
    assert _answer(tuned).ids != _answer(base).ids
    with pytest.raises(UserError, match="is no adapter"):
        _loaded(folder, "own")


def test_an_adapter_samples_as_its_own_folder_says(folder: str, adapter: str) -> None:
    said = _by_transformers(folder, adapter)
    before = _loaded(adapter)[0]
    assert _answer(before).ids == said
    own = GenerationConfig(eos_token_id=[2], pad_token_id=0, repetition_penalty=3.0)
    own.save_pretrained(adapter)
    try:
        answer = _answer(_loaded(adapter)[0])
    finally:
        (Path(adapter) / "generation_config.json").unlink()
    assert answer.ids == _by_transformers(folder, adapter, repetition_penalty=3.0) != said


def test_sampling(folder: str) -> None:
    assistant = _loaded(folder)[0]
    seeded = Sampling(max_tokens=12, temperature=1.0, seed=7)
    first, again = _answer(assistant, seeded), _answer(assistant, seeded)
    other = _answer(assistant, Sampling(max_tokens=12, temperature=1.0, seed=8))
    assert first.ids == again.ids != other.ids
    assert first.ids != _answer(assistant).ids
    narrow = Sampling(max_tokens=12, temperature=1.0, top_k=1, seed=7)
    assert _answer(assistant, narrow).ids == _answer(assistant).ids
    penalised = Sampling(max_tokens=12, temperature=0, repetition_penalty=3.0)
    assert _answer(assistant, penalised).ids == _by_transformers(folder, repetition_penalty=3.0)


def test_a_stop_text_cuts(folder: str) -> None:
    assistant = _loaded(folder)[0]
    whole = _answer(assistant)
    cut = whole.content[3:5]
    answer = _answer(assistant, Sampling(max_tokens=12, temperature=0, stop=(cut,)))
    assert answer.content == whole.content[: whole.content.index(cut)]
    assert answer.reason == "stop"


def test_a_reader_that_stops_ends_the_model(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = _loaded(folder)[0]
    steps: list[int] = []
    generate = type(assistant._model).forward

    def counted(*given: Any, **named: Any) -> Any:
        steps.append(1)
        time.sleep(0.01)
        return generate(*given, **named)

    monkeypatch.setattr(type(assistant._model), "forward", counted)
    answer = Answer()
    stream = assistant.stream(TALK, Sampling(max_tokens=200, temperature=0), answer)
    earlier = {*threading.enumerate()}
    next(stream)
    (model,) = {*threading.enumerate()} - earlier
    stream.close()
    assert answer.reason == "interrupted"
    assert not model.is_alive()
    assert len(steps) < 100, "of the 200 that it would have taken"
    assert len(_answer(assistant).ids) == 12, "the lock is free again"


def test_what_has_no_room_is_refused(folder: str) -> None:
    assistant = _loaded(folder)[0]
    assert assistant.positions == 256
    long: list[Message] = [{"role": "user", "content": "a" * 300}]
    with pytest.raises(UserError, match="256 positions"):
        _answer(assistant, GREEDY, long)
    nearly: list[Message] = [{"role": "user", "content": "a" * 245}]
    answer = _answer(assistant, GREEDY, nearly)
    assert answer.prompt_tokens + answer.tokens <= 256


def test_a_template_that_refuses(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "strict.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system!') }}{% endif %}"
    file.write_text(refusal + tiny.CHAT_TEMPLATE)
    (assistant,) = load_assistants(Model(path=folder), str(file), "", "", HERE)
    assert _answer(assistant, GREEDY, TALK[1:]).tokens == 12
    with pytest.raises(UserError, match="no system!"):
        _answer(assistant)


def test_no_chat_template(tmp_path: Path) -> None:
    path = tiny.folder(tmp_path / "base", chat=False)
    with pytest.raises(UserError, match="has no chat template"):
        _loaded(path)
    (plain,) = load_assistants(Model(path=path), "none", "", "", HERE)
    assert plain.prompt([{"role": "user", "content": "Once"}]) == "Once"


def test_a_stop_token_that_no_server_knows_is_named(folder: str, tmp_path: Path) -> None:
    (assistant,) = _loaded(folder)  # its folder stops at <eos>, its template ends turns otherwise
    assert "no server stops" in assistant.notes[0]
    (mended,) = _loaded(_with_stop(folder, tmp_path / "m", 3))
    assert mended.notes == []


# The terminal


def _chat(monkeypatch: pytest.MonkeyPatch, lines: list[str], *arguments: str) -> int:
    waiting = iter(lines)

    def read(_: str = "") -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    fast = ["max_tokens=6", "temperature=0", "runtime.device=cpu"]
    return main(["chat", *arguments, *fast])


def test_a_talk_in_the_terminal(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "talk.jsonl"
    lines = [
        "/retry",
        "/save",
        "/system Be brief.",
        "Where is \\",
        "the lamp?",
        "/retry",
        f"/save {file}",
        "/set max_tokens=3",
        "/set top_p=2",
        "/set colour=red",
        "And the fox?",
        "/nothing",
        "/reset",
        f"/save {file}",
        "/quit",
        "never read",
    ]
    assert _chat(monkeypatch, lines, folder) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "there is no message to answer again",
        "/save needs a file",
        "appended to",
        "at most 1 is needed",
        "no setting 'colour' of sampling",
        "no command /nothing",
        "there is no answer to save yet",
    ):
        assert part in out
    (row,) = map(json.loads, file.read_text().splitlines())
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == "Where is \nthe lamp?"
    (example,) = encode(row, tiny.tokenizer())
    assert example.targets, "what was saved can be trained on"


def test_a_talk_beside_the_base(
    adapter: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _chat(monkeypatch, ["Where is the lamp?"], adapter, "base=own") == 0
    out = capsys.readouterr().out
    assert out.index("--- adapter") < out.index("--- base")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("temperature=warm", "a number is needed"),
        ("max_tokens=0", "at least 1"),
        ("max_tokens=1.5", "a whole number is needed"),
        ("thoughts=maybe", "show or hide"),
        ("temperatur=1", "did you mean `temperature`"),
        ("seed=-1", "at least 0"),
    ],
)
def test_mistakes_at_the_command_line(
    folder: str, argument: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", folder, argument]) == 2
    assert said in capsys.readouterr().err


def test_settings_of_sampling() -> None:
    assert sampling_of({"top_k": "5", "stop": "END"}) == Sampling(top_k=5, stop=("END",))
    assert sampling_of({"stop": ""}, Sampling(stop=("a",))) == Sampling()


# The endpoint


@pytest.fixture
def endpoint(adapter: str) -> Iterator[Endpoint]:
    assistants = _loaded(adapter, "own")
    with Endpoint(assistants, GREEDY, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def _client(endpoint: Endpoint, key: str = "none"):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0, timeout=60)


def test_the_openai_client(endpoint: Endpoint, folder: str) -> None:
    client = _client(endpoint)
    assert [model.id for model in client.models.list().data] == ["adapter", "base"]
    made = client.chat.completions.create(model="base", messages=TALK, max_tokens=12)
    assert made.choices[0].message.content == _text(folder, _by_transformers(folder))
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 12
    chunks = list(
        client.chat.completions.create(
            model="base", messages=TALK, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == made.choices[0].message.content
    assert chunks[-1].usage == made.usage
    assert chunks[-2].choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the lamp?"}]
    talk = [TALK[0], {"role": "user", "content": parts}]
    in_parts = client.chat.completions.create(model="base", messages=talk, max_tokens=12)
    assert in_parts.choices[0].message.content == made.choices[0].message.content


def test_what_the_openai_client_is_told(endpoint: Endpoint) -> None:
    openai = pytest.importorskip("openai")
    client = _client(endpoint)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'; there are: adapter, base"):
        client.chat.completions.create(model="gpt", messages=TALK)
    with pytest.raises(openai.BadRequestError, match="logit_bias: this field is not understood"):
        client.chat.completions.create(model="base", messages=TALK, logit_bias={"1": 5})
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.chat.completions.create(model="base", messages=TALK, presence_penalty=1.0)
    long = [{"role": "user", "content": "a" * 300}]
    with pytest.raises(openai.BadRequestError, match="256 positions"):
        client.chat.completions.create(model="base", messages=long, stream=True)


def _ask(endpoint: Endpoint, method: str, path: str, body: str = "", **headers: str):
    port = int(endpoint.server_address[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body or None, named)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


BODY = json.dumps(
    {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
)
JSON = {"Content_Type": "application/json"}


def test_what_a_request_must_have(endpoint: Endpoint) -> None:
    chat = "/v1/chat/completions"
    for expected, body, path, headers in [
        (200, BODY, chat, JSON),
        (415, BODY, chat, {"Content_Type": "text/plain"}),
        (403, BODY, chat, {**JSON, "Host": "evil.example"}),
        (400, "{", chat, JSON),
        (400, "[]", chat, JSON),
        (400, BODY.replace('"max_tokens": 2', '"max_tokens": "2"'), chat, JSON),
        (404, BODY, "/v1/embeddings", JSON),
        (413, BODY, chat, {**JSON, "Content_Length": str(1 << 30)}),
        (411, BODY, chat, {**JSON, "Content_Length": "-1"}),
    ]:
        response, content = _ask(endpoint, "POST", path, body, **headers)
        assert response.status == expected, content
        if expected != 200:
            assert json.loads(content)["error"]["message"]
    assert _ask(endpoint, "GET", "/health")[0].status == 200
    assert _ask(endpoint, "GET", "/etc/passwd")[0].status == 404


def test_a_token(folder: str) -> None:
    with pytest.raises(UserError, match="set token="):
        Endpoint([], GREEDY, host="0.0.0.0", port=0)
    with Endpoint(_loaded(folder), GREEDY, port=0, token="secret") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert _ask(server, "GET", "/v1/models")[0].status == 401
        wrong = {"Authorization": "Bearer secre"}
        assert _ask(server, "GET", "/v1/models", **wrong)[0].status == 401
        right = {"Authorization": "Bearer secret"}
        assert _ask(server, "GET", "/v1/models", **right)[0].status == 200
        assert _ask(server, "POST", "/v1/chat/completions", BODY, **JSON)[0].status == 401
        server.shutdown()


def test_addresses() -> None:
    assert all(map(is_local, ("127.0.0.1", "127.5.0.1", "::1", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.0.1", "example.com", "localhost.evil")))


def test_the_commands_of_real_servers(folder: str, adapter: str) -> None:
    assert f"  vllm serve {folder}" in commands(folder)
    line = next(line for line in commands(adapter) if "vllm" in line)
    assert "--max-lora-rank 8" in line  # its rank is 4; vLLM takes 8 and more
    assert f"--lora-modules tuned={adapter}" in line
