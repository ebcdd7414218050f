"""The tokenizer of a GGUF file, as the files of a Hugging Face folder.

Two kinds are read: `gpt2` (byte-level BPE; `tokenizer.ggml.pre` names the rule by which text is cut
before) and `llama` (SentencePiece's BPE, whose merges follow from the scores of its tokens).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sftx.boundary import boundary
from sftx.gguf.header import Header, Value
from sftx.types import Json, UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of tokens, as llama.cpp numbers them."""
SPACE = "▁"  # how SentencePiece writes a space
NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Where a file keeps the tokens at which llama.cpp stops."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace("{1,3}", ""), "tekken": _TEKKEN}
"""The regular expressions of those rules that are one, by llama.cpp's names."""
RULES = ("gpt-2", "smollm", *PATTERNS)
SAME_RULE = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")
"""Rules under which a word that is a token is not merged from its pieces."""


@dataclass(slots=True)
class Vocabulary:
    """What a GGUF file says of its tokens; `kinds` are those of `NORMAL`, `CONTROL` and so on."""

    model: str
    rule: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list[str])
    scores: list[float] = field(default_factory=list[float])
    named: dict[str, int] = field(default_factory=dict[str, int])
    stop_ids: list[int] = field(default_factory=list[int])
    adds: dict[str, bool] = field(default_factory=dict[str, bool])
    templates: dict[str, str] = field(default_factory=dict[str, str])


def read_vocabulary(header: Header) -> Vocabulary:
    """The vocabulary of a file, checked.

    Raises:
        UserError: there is none, it is of another kind, or its lists do not fit each other.
    """
    reader = _Reader(header)
    model = reader.text("model", "")
    if model not in ("gpt2", "llama"):
        kind = model or "none"
        raise UserError(
            f"{header.path}: its tokenizer is of the kind {kind!r}; sftx reads gpt2 "
            "(byte-level BPE) and llama (SentencePiece BPE)"
        )
    tokens, kinds = _tokens(reader)
    vocabulary = Vocabulary(model, _rule(reader, model), tokens, kinds)
    if model == "llama":
        scores = [float(each) for each in reader.numbers("scores", None)]
        vocabulary.scores = scores[: len(tokens)]
        if len(vocabulary.scores) != len(tokens):
            raise UserError(f"{header.path}: {len(scores):,} scores for {len(tokens):,} tokens")
    elif _has_merged(tokens, kinds):
        vocabulary.merges = reader.texts("merges")
    _add_special(vocabulary, reader)
    vocabulary.templates = _templates(header)
    return vocabulary


def _tokens(reader: _Reader) -> tuple[list[str], list[int]]:
    """The tokens and their kinds, without those at the end that only fill the embeddings up."""
    tokens = reader.texts("tokens")
    all_normal = [NORMAL] * len(tokens)
    kinds = [int(kind) for kind in reader.numbers("token_type", all_normal)]
    has_twice = len(set(tokens)) < len(tokens)
    if not tokens or has_twice or len(kinds) != len(tokens):
        raise UserError(
            f"{reader.header.path}: tokenizer.ggml.tokens is empty, holds a token twice, or has "
            "not one token_type for each"
        )
    while kinds[-1:] == [UNUSED]:
        kinds.pop()
        tokens.pop()
    return tokens, kinds


def _has_merged(tokens: list[str], kinds: list[int]) -> bool:
    """Whether a token stands for several letters: then there are merges."""
    pairs = zip(tokens, kinds, strict=True)
    return any(len(token) > 1 for token, kind in pairs if kind == NORMAL)


def _add_special(vocabulary: Vocabulary, reader: _Reader) -> None:
    """Add the named tokens, those that end an answer, and what is put around a text."""
    count = len(vocabulary.tokens)
    for name, key in NAMED.items():
        at = reader.token(key, count)
        if at is not None:
            vocabulary.named[name] = at
    for key in STOPS:
        at = reader.token(key, count)
        if at is not None and at not in vocabulary.stop_ids:
            vocabulary.stop_ids.append(at)
    is_llama = vocabulary.model == "llama"
    often_has_bos = is_llama or vocabulary.rule in WHOLE_WORDS_FIRST
    vocabulary.adds = {
        "bos": reader.flag("add_bos_token", often_has_bos),
        "eos": reader.flag("add_eos_token", False),
        "space": reader.flag("add_space_prefix", is_llama),
    }


def tokenizer_files(vocabulary: Vocabulary, place: object) -> dict[str, str]:
    """The contents of tokenizer.json, tokenizer_config.json, generation_config.json and of the files
    of chat templates, by their names. `place` is what an error names.
    """
    with boundary(f"{place}: its tokenizer cannot be built"):
        backend = _backend(vocabulary)
        _check_ids(backend, vocabulary, place)
    config: dict[str, Json] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.adds["bos"],
        "add_eos_token": vocabulary.adds["eos"],
    }
    named = vocabulary.named
    for name, at in named.items():
        config[name] = vocabulary.tokens[at]
    generation: dict[str, object] = {}
    if "bos_token" in named:
        generation["bos_token_id"] = named["bos_token"]
    if vocabulary.stop_ids:
        generation["eos_token_id"] = vocabulary.stop_ids
    if "pad_token" in named:
        generation["pad_token_id"] = named["pad_token"]
    files = {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False),
        "generation_config.json": json.dumps(generation, indent=1),
    }
    for name, text in vocabulary.templates.items():
        file = f"additional_chat_templates/{name}.jinja"
        if name == "default":
            file = "chat_template.jinja"
        files[file] = text
    return files


def merges_of_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: every cut of a token into two tokens, the
    cuts of the best token first.
    """
    at = {token: number for number, token in enumerate(tokens)}

    def score_of(token: str) -> float:
        return scores[at[token]]

    def numbers_of(pair: tuple[str, str]) -> tuple[int, int]:
        left, right = pair
        return at[left], at[right]

    merges: list[tuple[str, str]] = []
    for token in sorted(tokens, key=lambda each: -score_of(each)):
        known: list[tuple[str, str]] = []
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in at and right in at:
                known.append((left, right))
        merges += sorted(known, key=numbers_of)
    return merges


class _Reader:
    """The keys `tokenizer.ggml.*` of a file, read with the type that each must have."""

    def __init__(self, header: Header) -> None:
        self.header = header

    def _value(self, key: str) -> Value | None:
        return self.header.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str, default: str) -> str:
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._value(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list of texts")
        found = [each for each in value if isinstance(each, str)]
        if len(found) < len(value):
            raise self._wrong(key, "a list of texts")
        return found

    def numbers(self, key: str, default: list[int] | None) -> list[float]:
        value = self._value(key)
        if value is None and default is not None:
            return [float(each) for each in default]
        if not isinstance(value, list):
            raise self._wrong(key, "a list of numbers")
        found: list[float] = [each for each in value if isinstance(each, int | float)]
        if len(found) < len(value):
            raise self._wrong(key, "a list of numbers")
        return found

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def token(self, key: str, count: int) -> int | None:
        """The id of a named token; None where the file names none."""
        value = self._value(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < count:
            raise self._wrong(key, f"the number of one of its {count:,} tokens")
        return value

    def _wrong(self, key: str, wanted: str) -> UserError:
        found = str(self._value(key))[:40]
        return UserError(f"{self.header.path}: tokenizer.ggml.{key} is {found}; {wanted} is needed")


def _rule(reader: _Reader, model: str) -> str:
    """The name of the rule by which text is cut before it is merged; empty for SentencePiece."""
    if model == "llama":
        return ""
    name = reader.text("pre", "none")
    rule = SAME_RULE.get(name, name)
    if rule not in RULES:
        known = ", ".join((*RULES, *SAME_RULE))
        raise UserError(
            f"{reader.header.path}: tokenizer.ggml.pre is {name!r}, a rule of cutting text that "
            f"sftx does not know; known: {known}"
        )
    return rule


def _templates(header: Header) -> dict[str, str]:
    """The chat templates by name."""
    found: dict[str, str] = {}
    for key, value in header.metadata.items():
        prefix, _, name = key.partition("tokenizer.chat_template")
        if prefix or not isinstance(value, str):
            continue
        if name and not name.startswith("."):
            continue
        called = name.removeprefix(".") or "default"
        if not called.replace("_", "").isalnum():
            raise UserError(f"{header.path}: a chat template of the odd name {called!r}")
        found[called] = value
    return found


def _backend(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The tokenizer itself."""
    ids = {token: at for at, token in enumerate(vocabulary.tokens)}
    build = _byte_level if vocabulary.model == "gpt2" else _sentence_piece
    backend = build(vocabulary, ids)
    unknown = vocabulary.named.get("unk_token")
    for at, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        special = kind == CONTROL or (kind == UNKNOWN and at == unknown)
        if special or kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=special)])
    _add_edges(backend, vocabulary)
    return backend


def _add_edges(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Let the tokenizer put BOS and EOS around a text, where the file says so."""
    first = _edge(vocabulary, "bos")
    last = _edge(vocabulary, "eos")
    special: dict[str, int] = {}
    for at in (*first, *last):
        special[vocabulary.tokens[at]] = at
    if not special:
        return
    single = ["$A:0"]
    for at in first:
        single.insert(0, f"{vocabulary.tokens[at]}:0")
    for at in last:
        single.append(f"{vocabulary.tokens[at]}:0")
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=list(special.items())
    )


def _edge(vocabulary: Vocabulary, name: str) -> list[int]:
    """The token put before (bos) or after (eos) a text, if the file says so."""
    at = vocabulary.named.get(f"{name}_token")
    if vocabulary.adds[name] and at is not None:
        return [at]
    return []


def _byte_level(vocabulary: Vocabulary, ids: Mapping[str, int]) -> tokenizers.Tokenizer:
    merges: list[tuple[str, str]] = []
    for merge in vocabulary.merges:
        left, right = merge.split(" ", 1)
        merges.append((left, right))
    whole = vocabulary.rule in WHOLE_WORDS_FIRST
    backend = tokenizers.Tokenizer(BPE(dict(ids), merges, ignore_merges=whole))
    if vocabulary.rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    space = vocabulary.adds["space"]
    if vocabulary.rule == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    elif vocabulary.rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=space)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    else:
        split = pre_tokenizers.Split(Regex(PATTERNS[vocabulary.rule]), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(vocabulary: Vocabulary, ids: Mapping[str, int]) -> tokenizers.Tokenizer:
    mergeable: list[str] = []
    scores: list[float] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind in (NORMAL, USER_DEFINED):
            mergeable.append(token)
            scores.append(vocabulary.scores[ids[token]])
    unknown = None
    if "unk_token" in vocabulary.named:
        unknown = vocabulary.tokens[vocabulary.named["unk_token"]]
    model = BPE(
        dict(ids),
        merges_of_scores(mergeable, scores),
        byte_fallback=BYTE in vocabulary.kinds,
        fuse_unk=True,
        unk_token=unknown,
    )
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.adds["space"]:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _check_ids(backend: tokenizers.Tokenizer, vocabulary: Vocabulary, place: object) -> None:
    """Every token must have the number that the file gives it."""
    for at, token in enumerate(vocabulary.tokens):
        if backend.token_to_id(token) != at:
            raise UserError(
                f"{place}: token {at:,} ({token!r}) cannot be given this number; the file is damaged"
            )
