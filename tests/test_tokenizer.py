"""The tokenizer: the same ids as transformers gives, from every form in which a tokenizer is
stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import backend, ours, theirs

from sftx.data.chat.spans import SpanTokenizer, TextSequence
from sftx.data.tokenizer import Tokenizer
from sftx.types import UserError

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "tokenizers"
TEXTS = [
    "hello there",
    "  two  spaces\n\nand lines ",
    "<s>x</s>",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    "שלום 🙂",
    "a<think>b",
]


def ids_of(mine: Tokenizer) -> list[list[int]]:
    return [ids.tolist() for ids in mine.encode_batch(TEXTS)]


def theirs_of(other: Any) -> list[list[int]]:
    return [other(text, add_special_tokens=False).input_ids for text in TEXTS]


def folder(path: Path, config: dict[str, object], **files: str) -> str:
    backend(adds_bos=True).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    return str(path)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_ids_are_those_of_transformers(kind: str) -> None:
    mine, other = ours(kind), theirs(kind)
    assert ids_of(mine) == [other(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert ids_of(Tokenizer.of(other)) == ids_of(mine)
    assert mine.vocab_size == len(other)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared tokenizers")
@pytest.mark.parametrize(
    "name", ["gpt2", pytest.param("llama3", marks=pytest.mark.slow), "mistral_v3", "qwen3"]
)
def test_real_tokenizers_are_loaded_as_transformers_loads_them(name: str) -> None:
    from transformers import AutoTokenizer

    mine, other = Tokenizer.load(str(SHARED / name)), AutoTokenizer.from_pretrained(SHARED / name)
    assert ids_of(mine) == [other(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert (mine.bos_id, mine.eos_id) == (other.bos_token_id, other.eos_token_id)
    assert mine.adds_bos == (other("a").input_ids[0] == other.bos_token_id)
    assert mine.chat_templates.get("default") == other.chat_template
    assert mine.special == other.special_tokens_map


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared tokenizers")
@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3", "mistral_v3"])
def test_any_text_is_cut_as_the_library_cuts_it(name: str) -> None:
    tokenizer = Tokenizer.load(str(SHARED / name))
    signs = st.sampled_from(
        [
            *" \n\t.,;:!?()'\"0123aZ\u00e9\u0301\u200d\u3042\u05d0",
            "  ",
            "don't",
            "<|im_end|>",
            "</s>",
            "🙂",
        ]
    )

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(
            st.lists(signs | st.characters(exclude_categories=("Cs",)), max_size=30).map("".join),
            max_size=4,
        )
    )
    def same(texts: list[str]) -> None:
        expected = [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in texts]
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected

    same()


def test_special_tokens_in_plain_text_stay_text() -> None:
    for kind in ("byte_level", "metaspace"):
        tokenizer = ours(kind)
        ids = tokenizer.encode("a</s>b", plain=True)
        assert tokenizer.eos_id not in ids
        assert tokenizer.eos_id in tokenizer.encode(
            "a</s>b"
        )  # and the setting does not stay behind
        assert tokenizer.decode(ids) == "a</s>b"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_text_inside_another_is_not_marked_as_a_beginning(kind: str) -> None:
    tokenizer = ours(kind)
    whole = tokenizer.encode("<|im_start|>hello there<|im_end|>")
    assert whole[1:-1] == tokenizer.encode("hello there", inside=True)
    text = TextSequence([("<|im_start|>say <\ufdd0/s> twice<|im_end|>", 0.0)], mark="\ufdd0")
    marked = SpanTokenizer(tokenizer, True).sequences([[text]])[0][0].ids.tolist()
    assert (marked[0], marked[-1]) == (whole[0], whole[-1])
    assert tokenizer.eos_id not in marked
    assert tokenizer.decode(marked) == "<|im_start|>say </s> twice<|im_end|>"


def test_added_tokens_are_found_where_the_tokenizer_finds_them() -> None:
    raw = backend()
    raw.add_special_tokens(["<|a", "<|a|>", "<|a|>b", "[x]", "[x", "]"])
    tokenizer = Tokenizer(raw, {}, {})
    for text in ("<|a|>b[x]", "<|a|> <|a[x <|a|>bb]", "<|", "x<|im_end|><s>[[x]]", ""):
        matched = [match.group() for match in tokenizer.splitting.finditer(text)]
        ids = [i for i in tokenizer.encode(text) if i in tokenizer.splitting_ids]
        assert [tokenizer.backend.id_to_token(i) for i in ids] == matched


def test_folder_with_every_form_of_template(tmp_path: Path) -> None:
    plain = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "a").mkdir()
    path = folder(
        tmp_path / "a",
        {**plain, "chat_template": "one"},
        **{"generation_config.json": '{"eos_token_id": [2, 4]}'},
    )
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.chat_templates["default"], tokenizer.stop_ids, tokenizer.adds_bos) == (
        "one",
        {2, 4},
        True,
    )
    (tmp_path / "b").mkdir()
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    assert Tokenizer.load(
        folder(tmp_path / "b", {**plain, "chat_template": named})
    ).chat_templates == {
        "default": "one",
        "tool_use": "two",
    }
    (tmp_path / "c").mkdir()
    files = {"chat_template.jinja": "file", "additional_chat_templates__rag.jinja": "more"}
    tokenizer = Tokenizer.load(folder(tmp_path / "c", {**plain, "chat_template": "one"}, **files))
    assert tokenizer.chat_templates == {"default": "file", "rag": "more"}


def test_tokens_that_only_the_config_knows_are_added(tmp_path: Path) -> None:
    added = {"900": {"content": "<extra>", "special": True}}
    tokenizer = Tokenizer.load(
        folder(tmp_path, {"eos_token": "<new>", "added_tokens_decoder": added})
    )
    assert tokenizer.is_special("<extra>")
    assert tokenizer.is_special("<new>")
    assert tokenizer.eos_id == tokenizer.backend.token_to_id("<new>")
    assert tokenizer.encode("a<new>")[-1] == tokenizer.eos_id


def test_fingerprint_follows_what_decides_ids(tmp_path: Path) -> None:
    prints = {
        ours().fingerprint,
        ours("metaspace").fingerprint,
        ours(adds_bos=True).fingerprint,
        ours(eos_token="<|im_end|>").fingerprint,
    }
    assert len(prints) == 4
    assert ours().fingerprint == ours().fingerprint


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(UserError, match="no such folder or file here"):
        Tokenizer.load(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no fast"):
        Tokenizer.of(object())


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_file_that_is_no_json_is_named(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path, {"eos_token": "</s>"})
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=f"{tmp_path / name}: "):
        Tokenizer.load(path)
