"""A tokenizer as the data layer needs it: text to ids and back, and what decides where a text
begins and ends.

Only the `tokenizers` library is used, so that looking at data needs neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray

from sftx.boundary import boundary
from sftx.data.store.word_cache import WORD, WordCache, tokenises_by_word
from sftx.hub import ask_hub
from sftx.model_config import check_links, model_folder, read_json
from sftx.settings.schema import Model
from sftx.types import Int32, UserError

# The named special tokens a chat template may refer to (bos_token, ...).
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Letters = NDArray[np.int64]
"""[T, 2]: the characters of each token of a text, as (begin, end)."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""The properties of an added token."""
_FILES = ["tokenizer*", "vocab*", "*.json", "merges.txt", "*.model", "*.jinja"]


class Tokenizer:
    """Text to ids. Made by `Tokenizer.load(path)` or `Tokenizer.of(transformers_tokenizer)`.

    `bos_id`, `eos_id`: ids or None. `stop_ids`: ids at which a server stops generating (EOS and
    those of generation_config.json). `special`: named special tokens (`eos_token` -> "</s>").
    `content`, if given, is what the fingerprint hashes in place of the backend (the bytes of its
    files: faster). `chat_templates`: the tokenizer's own templates by name ("default", "tool_use",
    ...). `added_token_ids`: ids of the tokens a run adds (`Tokenizer.of_model`), and whether each was
    unknown before.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: dict[str, str],
        chat_templates: dict[str, str],
        stop_ids: Iterable[int] = (),
        content: bytes | None = None,
    ):
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self._content = content
        self.added_token_ids: dict[int, bool] = {}
        self.special = special
        self.chat_templates = chat_templates
        named = {name: backend.token_to_id(text) for name, text in special.items()}
        self.bos_id: int | None = named.get("bos_token")
        self.eos_id: int | None = named.get("eos_token")
        self.stop_ids = frozenset(stop_ids)
        if self.eos_id is not None:
            self.stop_ids |= {self.eos_id}
        self._added = backend.get_added_tokens_decoder()
        self._words = {plain: WordCache(backend) for plain in (False, True)}
        first = backend.encode("a").ids[:1]
        self.adds_bos: bool = self.bos_id is not None and first == [self.bos_id]

    @classmethod
    def load(cls, path: str) -> Tokenizer:
        """The tokenizer in a folder, or of that name on the hub. `UserError` if there is none."""
        path = model_folder(path)
        folder = Path(path)
        if folder.is_file():
            raise UserError(f"{path}: a file; name the folder of a model, or a GGUF file")
        if not folder.is_dir():
            folder = _download(path)
        if not any(folder.glob("*.json")) and not any(folder.glob("*.model")):
            raise UserError(
                f"{path}: this folder holds no tokenizer; name the folder of a model or of a run"
            )
        check_links(folder)
        with boundary(f"{path}: no usable tokenizer there"):
            return cls._of_folder(folder)

    @classmethod
    def _of_folder(cls, folder: Path) -> Tokenizer:
        if not (folder / "tokenizer.json").is_file():
            # The slow way: a folder with only sentencepiece or vocab files.
            auto = import_module("transformers").AutoTokenizer
            given = auto.from_pretrained(folder, trust_remote_code=False)
            return cls.of(given, _stop_ids(folder))
        file = folder / "tokenizer_config.json"
        config = read_json(file)
        with boundary(folder / "special_tokens_map.json"):
            special = _named(read_json(folder / "special_tokens_map.json"))
        with boundary(file):
            special |= _named(config)
        content = (folder / "tokenizer.json").read_bytes()
        with boundary(folder / "tokenizer.json"):
            backend = tokenizers.Tokenizer.from_buffer(content)
        with boundary(file):
            _add_missing(backend, config, special)
        added = config.get("added_tokens_decoder", {})
        content += json.dumps(added, sort_keys=True).encode()
        templates = _templates(folder, config)
        return cls(backend, special, templates, _stop_ids(folder), content)

    @classmethod
    def of_model(cls, model: Model) -> Tokenizer:
        """The tokenizer of a run: the model's, with the tokens the run adds."""
        made = cls.load(model.tokenizer or model.path)
        texts = [*model.add_tokens, *model.add_special_tokens]
        if not texts:
            return made
        if not all(texts):
            raise UserError("model.add_tokens: an empty text cannot be a token")
        known = made.vocab_size
        backend: Any = made.backend
        for k, text in enumerate(texts):
            is_special = k >= len(model.add_tokens)
            token = tokenizers.AddedToken(text, normalized=False, special=is_special)
            backend.add_tokens([token])
        made = cls(made.backend, made.special, made.chat_templates, made.stop_ids)
        for text in texts:
            number = made.backend.token_to_id(text)
            assert number is not None  # it was just added
            made.added_token_ids[number] = number >= known
        return made

    @classmethod
    def of(cls, tokenizer: Any, stop_ids: Iterable[int] = ()) -> Tokenizer:
        """Adapt a fast transformers tokenizer, of whose backend a copy is made."""
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise UserError(
                f"{type(tokenizer).__name__} has no fast (Rust) backend; sftx needs one"
            )
        templates: Any = tokenizer.chat_template or {}
        if isinstance(templates, str):
            templates = {"default": templates}
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(backend, dict(tokenizer.special_tokens_map), dict(templates), stop_ids)

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1; there may be holes beneath it."""
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        return max(ids) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids. Templates are not part of it."""
        content = self._content or self.backend.to_str().encode()
        state = [self.special, sorted(self.stop_ids), tokenizers.__version__]
        content += json.dumps(state, sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()[:32]

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches the special tokens: those that `special_tokens: escape` keeps out of the data's
        own text.
        """
        return _pattern(self._added[i].content for i in self.control_ids)

    @cached_property
    def control_as_json(self) -> re.Pattern[str]:
        """Matches the special tokens inside JSON text."""
        texts: list[str] = []
        for i in self.control_ids:
            written = json.dumps(self._added[i].content, ensure_ascii=False)
            texts.append(written[1:-1])
        return _pattern(texts)

    @cached_property
    def splitting(self) -> re.Pattern[str]:
        """Matches the added tokens (special or not) at which text falls into independently
        tokenised parts.
        """
        return _pattern(self._added[i].content for i in self.splitting_ids)

    @cached_property
    def splitting_ids(self) -> list[int]:
        """Ids of the tokens that `splitting` matches.

        A token that is matched after normalisation, or only as a whole word, does not cut text
        wherever its letters stand.
        """
        found: list[int] = []
        for i, token in self._added.items():
            if not token.normalized and not token.single_word:
                found.append(i)
        return found

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(i for i, token in self._added.items() if token.special)

    def is_special(self, text: str) -> bool:
        """Whether `text` is one special token."""
        return self.backend.token_to_id(text) in self.control_ids

    def encode_batch(
        self, texts: Sequence[str], *, plain: bool = False, inside: bool = False
    ) -> list[Int32]:
        """Ids of each text, with no special token added, on all cores.

        `plain`: special tokens spelled in the text stay ordinary text. `inside`: the text continues
        another one, so a tokenizer that marks the beginning of a text (Metaspace, "first") does not
        mark this one.
        """
        backend = self._continuing if inside else self.backend
        backend.encode_special_tokens = plain
        try:
            if self.cuts_at_spaces:
                return list(map(self._words[plain].encode, texts))
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode(self, text: str, *, plain: bool = False, inside: bool = False) -> list[int]:
        """`encode_batch` of one text."""
        return self.encode_batch([text], plain=plain, inside=inside)[0].tolist()

    def letters(self, text: str, *, plain: bool = False, inside: bool = False) -> Letters:
        """int64[T, 2]: the characters of each token that `encode` gives, as (begin, end)."""
        backend = self._continuing if inside else self.backend
        backend.encode_special_tokens = plain
        try:
            offsets = backend.encode(text, add_special_tokens=False).offsets
        finally:
            backend.encode_special_tokens = False
        return np.array(offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Text of ids, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def longest_piece(self, text: str) -> int:
        """How many characters of a text have to be tokenised together."""
        if not self.cuts_at_spaces:
            return len(text)
        words = WORD.finditer(text)
        return max((word.end() - word.start() for word in words), default=0)

    @cached_property
    def cuts_at_spaces(self) -> bool:
        """Whether the words of a text are tokenised one by one."""
        return tokenises_by_word(self.backend)

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The same tokenizer without the mark that "first" schemes put before a text."""
        state = self.backend.to_str()
        if '"prepend_scheme":"first"' not in state.replace(" ", ""):
            return self.backend
        state = re.sub(r'("prepend_scheme":\s*)"first"', r'\1"never"', state)
        return tokenizers.Tokenizer.from_str(state)


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the texts at a place, as the tokenizer itself does."""
    different = {text for text in texts if text}
    if not different:
        return re.compile("(?!)")  # never matches
    return re.compile(_alternatives(sorted(different)))


def _alternatives(texts: list[str]) -> str:
    """A regular expression that shares beginnings, as hundreds of tokens like [control_8] do."""
    branches: list[str] = []
    for _, group in itertools.groupby(texts, key=lambda text: text[0]):
        words = list(group)
        begin = os.path.commonprefix(words)  # noqa: RUF071 (of letters, not of folders)
        rest = [word[len(begin) :] for word in words]
        inner = _alternatives([word for word in rest if word])
        branch = re.escape(begin)
        if inner:
            branch += f"(?:{inner})"
            if "" in rest:
                branch += "?"
        branches.append(branch)
    return "|".join(branches)


def _download(name: str) -> Path:
    ask_hub(name)
    download = import_module("huggingface_hub").snapshot_download
    with boundary(f"{name}: neither a folder here nor a tokenizer that could be fetched"):
        return Path(download(name, allow_patterns=_FILES))


def _named(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens of a config: texts, or objects with `content`. Raises TypeError for
    anything else.
    """
    texts: dict[str, str] = {}
    for name in NAMED:
        value = config.get(name)
        if not value:
            continue
        text = value
        if isinstance(value, dict):
            text = cast("dict[str, object]", value).get("content")
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a text, found {value!r}")
        texts[name] = text
    return texts


def _add_missing(backend: Any, config: dict[str, Any], special: dict[str, str]) -> None:
    """Add the tokens that only tokenizer_config.json knows, as transformers does."""
    declared = config.get("added_tokens_decoder", {})
    for number in sorted(declared, key=int):
        token = declared[number]
        content = token["content"]
        if backend.token_to_id(content) is None:
            flags = {key: token.get(key, False) for key in _FLAGS}
            backend.add_tokens([tokenizers.AddedToken(content, **flags)])
    added = backend.get_added_tokens_decoder().values()
    known = {token.content for token in added if token.special}
    missing: list[str | tokenizers.AddedToken] = []
    for text in special.values():
        if text not in known:
            missing.append(tokenizers.AddedToken(text, normalized=False, special=True))
    backend.add_special_tokens(missing)


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name; where several files have one of that name, the last
    read counts.
    """
    templates: dict[str, str] = {}
    with boundary(folder / "tokenizer_config.json"):
        declared = config.get("chat_template")
        if isinstance(declared, str):
            declared = [{"name": "default", "template": declared}]
        for entry in declared or []:
            templates[_text(entry["name"])] = _text(entry["template"])
    with boundary(folder / "chat_template.json"):
        if saved := read_json(folder / "chat_template.json"):
            templates["default"] = _text(saved["chat_template"])
    for path in (folder / "additional_chat_templates").glob("*.jinja"):
        with boundary(path):
            templates[path.stem] = path.read_text(encoding="utf-8")
    alone = folder / "chat_template.jinja"
    if alone.exists():
        with boundary(alone):
            templates["default"] = alone.read_text(encoding="utf-8")
    return templates


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"chat_template must be a text, found {value!r}")
    return value


def _stop_ids(folder: Path) -> list[int]:
    """The ids at which generation_config.json lets a server stop."""
    file = folder / "generation_config.json"
    eos = read_json(file).get("eos_token_id")
    if eos is None:
        return []
    given = cast("list[object]", eos) if isinstance(eos, list) else [eos]
    found = [i for i in given if type(i) is int]
    if len(found) < len(given):
        raise UserError(
            f"{file}: eos_token_id: found {eos!r}; a token's number, or a list of them, is needed"
        )
    return found
