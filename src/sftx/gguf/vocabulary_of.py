"""The vocabulary of a Hugging Face folder as a GGUF file holds it: the reverse of `vocabulary`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

import tokenizers

from sftx.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NAMED,
    NORMAL,
    PATTERNS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS_FIRST,
    Vocabulary,
)
from sftx.types import Json, UserError

Object = dict[str, Json]


def vocabulary_of(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of the tokenizer in `folder`, filled up to `rows`, those of the embeddings.

    Raises:
        UserError: llama.cpp has no way to cut text as this tokenizer does.
    """
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    state = cast("Object", json.loads(backend.to_str()))
    config = _json(folder / "tokenizer_config.json")
    model = cast("Object", state["model"])
    if model.get("type") != "BPE":
        raise _refused(f"its model is {model.get('type')}, not BPE")
    is_piece = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(backend, rows, is_piece, model.get("unk_token"))
    vocabulary = Vocabulary(
        "llama" if is_piece else "gpt2", "" if is_piece else _rule(state, model), tokens, kinds
    )
    merges = [_pair(merge) for merge in cast("list[Json]", model["merges"])]
    if is_piece:
        vocabulary.scores = _scores(tokens, merges)
    elif merges:
        vocabulary.merges = [f"{left} {right}" for left, right in merges]
    else:
        raise _refused("it merges nothing")
    vocabulary.named = _named(config, backend)
    vocabulary.stop_ids = _stop_ids(folder)
    encoded = backend.encode("a").ids
    vocabulary.adds = {
        "bos": encoded[:1] == [vocabulary.named.get("bos_token")],
        "eos": encoded[-1:] == [vocabulary.named.get("eos_token")],
        "space": is_piece and _adds_space(state, folder),
    }
    vocabulary.templates = _templates(folder)
    return vocabulary


def _refused(why: str) -> UserError:
    return UserError(f"format=gguf: llama.cpp cannot cut text as this tokenizer does: {why}")


def _json(path: Path) -> Object:
    if path.exists():
        return cast("Object", json.loads(path.read_text(encoding="utf-8")))
    return {}


def _tokens(
    backend: tokenizers.Tokenizer, rows: int, is_piece: bool, unknown: Json
) -> tuple[list[str], list[int]]:
    """The text and the kind of every token, by number; what no token has is filled up."""
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    for token, at in backend.get_vocab(with_added_tokens=True).items():
        if at >= rows:
            raise _refused(f"token {at:,} has no row in embeddings of {rows:,}")
        tokens[at] = token
        kinds[at] = _kind(token, unknown) if is_piece else NORMAL
    _mark_added(backend, kinds)
    return tokens, kinds


def _mark_added(backend: tokenizers.Tokenizer, kinds: list[int]) -> None:
    """Set the kinds of the added tokens."""
    for at, token in backend.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word:
            raise _refused(f"the token {token.content!r} takes spaces or word ends beside it")
        if kinds[at] != UNKNOWN:
            kinds[at] = CONTROL if token.special else USER_DEFINED


def _kind(token: str, unknown: Json) -> int:
    """The kind of a token of SentencePiece."""
    if token == unknown:
        return UNKNOWN
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return BYTE
    return NORMAL


def _pair(merge: Json) -> tuple[str, str]:
    if isinstance(merge, str):
        left, _, right = merge.partition(" ")
        return left, right
    left, right = cast("list[str]", merge)
    return left, right


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Scores by which SentencePiece merges in the same order: the earlier merged, the higher."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    never = len(merges) + 1
    return [-float(first.get(token, never)) for token in tokens]


def _rule(state: Object, model: Object) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text before it merges."""
    match state["pre_tokenizer"]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            rule = "gpt-2"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        }:
            rule = "smollm"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            names = [name for name, known in PATTERNS.items() if known == pattern]
            rule = names[0] if names else ""
        case _:
            rule = ""
    if not rule:
        raise _refused(f"its pre_tokenizer is {json.dumps(state['pre_tokenizer'])[:200]}")
    _check_rule(rule, state, model)
    return rule


def _check_rule(rule: str, state: Object, model: Object) -> None:
    """UserError where llama.cpp does more or less under the rule than the tokenizer."""
    normalizer = state.get("normalizer")
    is_nfc = isinstance(normalizer, dict) and normalizer.get("type") == "NFC"
    if normalizer and not (is_nfc and rule == "qwen2"):
        raise _refused(f"its normalizer is {json.dumps(normalizer)[:100]}")
    if bool(model.get("ignore_merges")) != (rule in WHOLE_WORDS_FIRST):
        raise _refused(f"ignore_merges is {model.get('ignore_merges')} under the rule {rule}")


def _adds_space(state: Object, folder: Path) -> bool:
    """Whether a text begins with a space that was not there.

    llama.cpp adds it after every special token too. A tokenizer that adds it to the first text alone
    has none to add in a chat, which begins with a special token.
    """
    match state.get("normalizer"), state.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace"}]}, None:
            return True
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, (
            None | {"type": "Split", "pattern": {"String": " "}}
        ):
            return False
        case None, {"type": "Metaspace", "prepend_scheme": scheme, "split": False}:
            return scheme == "always" or (scheme == "first" and not _templates(folder))
        case normalizer, cutting:
            told = json.dumps([normalizer, cutting])[:200]
            raise _refused(f"its normalizer and pre_tokenizer are {told}")


def _named(config: Object, backend: tokenizers.Tokenizer) -> dict[str, int]:
    """The ids of the named special tokens."""
    named: dict[str, int] = {}
    for name in NAMED:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        at = backend.token_to_id(text) if isinstance(text, str) else None
        if at is not None:
            named[name] = at
    return named


def _stop_ids(folder: Path) -> list[int]:
    """The ids at which generation_config.json lets a server stop."""
    stops = _json(folder / "generation_config.json").get("eos_token_id")
    listed = stops if isinstance(stops, list) else [stops]
    return [at for at in listed if isinstance(at, int)]


def _templates(folder: Path) -> dict[str, str]:
    """The chat templates by name."""
    found = {path.stem: path.read_text("utf-8") for path in folder.glob("additional*/*.jinja")}
    default = folder / "chat_template.jinja"
    if default.exists():
        found["default"] = default.read_text(encoding="utf-8")
    return found
