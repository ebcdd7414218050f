"""Tokenising by word gives the ids of tokenising at once, for every tokenizer that is said to allow
it.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from sftx.data.store.word_cache import LONGEST, REMEMBERED, WordCache, tokenises_by_word

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "tokenizers"
SAMPLE = [
    "It's the cat's hat, isn't it? (Yes: it IS!)\n\n  The end.\t1984 + 17 = 2001; über 中文 🙂 "
    "e\u0301\r\n"
] * 3
RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(
    rule: str | None, added: tuple[tokenizers.AddedToken | str, ...] = ("<|end|>", "<think>")
) -> Tokenizer:
    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None)
    if rule is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(rule), "isolated")
        cut = pre_tokenizers.Sequence([split, cut])
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = cut
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        SAMPLE, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_tokens(list(added))
    return made


TOKENIZERS = [trained(RULE), trained(RULE.replace("{1,3}", "")), trained(None)]
PIECE = st.sampled_from(
    list('aB \n\t1.,!()/_"é中🙂=<\u0308\u0338\u00a0\u2028\u3000ſ')
) | st.sampled_from(["it", "  ", "\r\n", "'s", "'LL", "234", "e\u0301", "<|end|>", "<think>", "<|"])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.lists(PIECE | st.text(max_size=3), max_size=25).map("".join), max_size=4),
    st.booleans(),
)
def test_words_have_the_ids_of_the_text(texts: list[str], plain: bool) -> None:
    for made in TOKENIZERS:
        assert tokenises_by_word(made)
        made.encode_special_tokens = plain
        words = WordCache(made)
        expected = [found.ids for found in made.encode_batch(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in map(words.encode, texts)] == expected
        assert [
            ids.tolist() for ids in map(words.encode, texts)
        ] == expected  # from what is remembered


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_real_tokenizers(name: str) -> None:
    path = SHARED / name / "tokenizer.json"
    if not path.exists():
        pytest.skip("needs the shared tokenizers")
    made = Tokenizer.from_file(str(path))
    made.no_truncation()
    assert tokenises_by_word(made)
    pieces = ["a", " ", "  ", "\n", "é", "1", ".", "'s", "<|im_end|>", "中"]
    texts = [*SAMPLE, *("".join(chosen) for chosen in itertools.product(pieces, repeat=4))]
    expected = [found.ids for found in made.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in map(WordCache(made).encode, texts)] == expected


def test_others_are_left_alone() -> None:
    """Any rule, normaliser or added token that might look across words turns it off."""
    plain = trained(RULE)
    assert not tokenises_by_word(trained(r"\s+|[^\s]+"))
    for added in (tokenizers.AddedToken("x y"), tokenizers.AddedToken("<m>", lstrip=True), "a.b"):
        assert not tokenises_by_word(trained(RULE, (added,)))
    plain.normalizer = normalizers.Lowercase()
    assert not tokenises_by_word(plain)
    spaced = trained(None)
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not tokenises_by_word(spaced)
    metaspace = Tokenizer(models.BPE())
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    assert not tokenises_by_word(metaspace)
    assert not tokenises_by_word(Tokenizer(models.Unigram()))


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    words = WordCache(TOKENIZERS[0])
    words.encode("word " + "x" * (LONGEST + 1))
    assert list(words) == ["word"]
    words.encode(" ".join(map(str, range(REMEMBERED + 2))))
    assert len(words) <= REMEMBERED
