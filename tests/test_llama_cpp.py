"""GGUF files in llama.cpp itself: it computes, cuts, renders and stops as was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
from test_gguf import FAMILIES, GEMMA, SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftx.gguf.header import read_header
from sftx.gguf.read import write_folder
from sftx.gguf.tensors import Layout
from sftx.training.llama_cpp import open_llama_cpp
from sftx.training.llama_cpp_check import ByLlamaCpp, check_llama_cpp
from sftx.training.parity import Question, own_rows, rendered
from sftx.types import Message, UserError

has_llama_cpp = pytest.mark.skipif(
    not (find_spec("llama_cpp") or find_spec("xllamacpp")), reason="needs a llama.cpp"
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
BOTH = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral, a window": ("Mistral", {"sliding_window": 200}),
    "gemma3, two thetas": ("Gemma3Text", GEMMA | {"num_hidden_layers": 7, "rope_parameters": BOTH}),
}
EVERY = FAMILIES | MORE


def questions(tokenizer: Any) -> list[Question]:
    """The questions of own rows, with the ids of a server."""
    asked: list[Question] = []
    for row in own_rows():
        question = Question([], "", tuple(row.messages[:-1]))
        ids = tokenizer(rendered(tokenizer, question), add_special_tokens=False).input_ids
        asked.append(Question(ids, "", question.messages))
    return asked


def export(name: str, kind: str, home: Path, tokenizer: Any = None) -> tuple[Path, Any, Any]:
    """A model of a family as a GGUF file, the model that sftx reads from it, and its tokenizer."""
    family, changes = EVERY[name]
    source = gguf_files.folder(home / "hf", family, tokenizer, **changes)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():  # a fresh model looks at all tokens alike, wherever they stand
        for part, values in model.named_parameters():
            if "q_proj" in part or "k_proj" in part:
                values.mul_(10)
    file = gguf_files.gguf_of(source, model, home / "m.gguf", kind)
    back = home / "back"
    back.mkdir()
    write_folder(read_header(file), back)
    read = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()
    return file, read, AutoTokenizer.from_pretrained(source)


def measured(name: str, kind: str, home: Path) -> ByLlamaCpp:
    """What llama.cpp makes of a family; UserError where that is not what was trained."""
    file, model, tokenizer = export(name, kind, home)
    llama_cpp = open_llama_cpp(file, model.config.vocab_size, 272)
    assert llama_cpp is not None
    asked = questions(tokenizer)
    for question in asked:
        assert llama_cpp.cut(rendered(tokenizer, question)) == question.ids
    return check_llama_cpp(llama_cpp, kind, model, asked, [2, 3])


@pytest.mark.long
@has_llama_cpp
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", EVERY)
def test_it_computes_what_was_trained(name: str, kind: str, tmp_path: Path) -> None:
    found = measured(name, kind, tmp_path)
    print(f"\n{name:28} {kind:5} {found.line()}")
    assert kind != "F32" or found.same_answers == found.answers
    assert found.same_chats == found.chats


@pytest.mark.slow
@has_llama_cpp
def test_it_refuses_what_is_not_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(Layout, "_interleaved", lambda self, name: 0)  # sftx reads what it wrote
        with pytest.raises(UserError, match=r"llama\.cpp gives other logits"):
            measured("llama", "F32", tmp_path / "rows")
    with monkeypatch.context() as planted:
        planted.setattr(Layout, "_adds_one", lambda self, name: False)
        with pytest.raises(UserError, match=r"llama\.cpp gives other logits"):
            measured("gemma2", "F16", tmp_path / "norms")
    assert measured("llama", "F32", tmp_path / "right").answers == 4


@pytest.mark.long
@has_llama_cpp
@pytest.mark.parametrize("kind", ["byte level", "pieces", "pieces with a space before"])
def test_it_cuts_text_as_the_source(kind: str, tmp_path: Path) -> None:
    space = kind.endswith("before")
    is_bytes = kind == "byte level"
    tokenizer = gguf_files.byte_level() if is_bytes else gguf_files.sentence_piece(space)
    check_cuts("llama", tokenizer, tmp_path)


@pytest.mark.long
@has_llama_cpp
@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared tokenizers")
@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3", "mistral_v3"])
def test_it_cuts_text_as_real_tokenizers(name: str, tmp_path: Path) -> None:
    check_cuts("qwen2", AutoTokenizer.from_pretrained(SHARED / name), tmp_path, "mistral" in name)


def check_cuts(family: str, tokenizer: Any, home: Path, as_chat: bool = False) -> None:
    file, model, _ = export(family, "F16", home, tokenizer)
    llama_cpp = open_llama_cpp(file, model.config.vocab_size, 64)
    assert llama_cpp is not None
    texts = [str(message["content"]) for row in own_rows() for message in row.messages]
    for text in {*gguf_files.TEXTS, *texts}:
        # Mistral's marks the beginning of a text; in a chat the text begins with a special token.
        text = f"<s>[INST]{text}[/INST]" if as_chat else text
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert llama_cpp.cut(text) == ids, text


@dataclass
class Stand:
    """A llama.cpp that is none: torch answers, with what is planted."""

    model: Any
    shift: float = 0.0
    stop: int = 3
    wrong: int | None = None

    def cut(self, text: str) -> list[int]:
        return list(text.encode())

    def served(self, question: Question) -> list[int] | None:
        return question.ids if question.ids[0] % 2 else []

    def next_token(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        return logits + 7 + self.shift * torch.arange(len(logits)).sin()

    def answer(self, ids: Sequence[int], most: int) -> list[int]:
        said: list[int] = []
        while len(said) < most:
            token = int(self.next_token([*ids, *said]).argmax())
            if token == self.stop:
                break
            said.append(token)
        return said if self.wrong is None else [self.wrong, *said[1:]]

    def stops_at(self, token: int) -> bool:
        return token == self.stop


def test_the_check_refuses_other_logits_answers_and_stops(tmp_path: Path) -> None:
    source = gguf_files.folder(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    message: Message = {"role": "user", "content": "?"}
    asked = [Question([9, 20, 31], "", (message,)), Question([264, 40, 9, 8], "", (message,))]
    right = check_llama_cpp(Stand(model), "F32", model, asked, [3])
    assert (right.same_answers, right.answers) == (2, 2)
    assert (right.same_chats, right.chats) == (1, 2)
    assert right.moved < 1e-5
    for stand, stops, said in (
        (Stand(model, shift=1.0), [3], "other logits"),
        (Stand(model, wrong=11), [3], "answers with token 11 where the trained model"),
        (Stand(model), [2, 3], "does not stop at token 2"),
    ):
        with pytest.raises(UserError, match=said):
            check_llama_cpp(stand, "Q8_0", model, asked, stops)
