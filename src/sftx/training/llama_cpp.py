"""llama.cpp as a reader of a GGUF file: how it cuts text, which logits it gives, where it stops.

It is reached through `llama-cpp-python`, or through `xllamacpp`, which comes prebuilt; the first that
is installed is taken. Everything runs on the CPU, with a cache of keys and values in float32.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from sftx.training.parity import Question

_SURE = 1e4  # added to a logit, makes its token the next one


class LlamaCpp(Protocol):
    """A GGUF file, loaded by llama.cpp."""

    def cut(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are spelled; none is put around it."""
        ...

    def served(self, question: Question) -> list[int] | None:
        """The ids that its server makes of a chat with its own reading of the template: none where it
        cannot render it. None where this package does not tell.
        """
        ...

    def next_token(self, ids: Sequence[int]) -> Tensor:
        """The logits of the token after `ids`, float32[V], up to a constant."""
        ...

    def answer(self, ids: Sequence[int], most: int) -> list[int]:
        """The greedy answer of at most `most` tokens, without the token at which it stopped."""
        ...

    def stops_at(self, token: int) -> bool:
        """Whether an answer ends at this token."""
        ...


def open_llama_cpp(file: Path, rows: int, context: int) -> LlamaCpp | None:
    """The file as llama.cpp reads it; None where no llama.cpp is installed.

    `rows` is the number of rows of the embeddings, `context` the most tokens of a question and its
    answer together.
    """
    if find_spec("llama_cpp") is not None:
        return _Bindings(file, context)
    if find_spec("xllamacpp") is not None:
        return _Server(file, rows, context)
    return None


class _Bindings:
    """Through llama-cpp-python."""

    def __init__(self, file: Path, context: int) -> None:
        self.library: Any = import_module("llama_cpp")
        self.model: Any = self.library.Llama(
            str(file),
            n_ctx=context,
            n_batch=context,
            n_gpu_layers=0,
            n_threads=os.cpu_count(),
            type_k=self.library.GGML_TYPE_F32,
            type_v=self.library.GGML_TYPE_F32,
            swa_full=True,
            logits_all=True,
            verbose=False,
        )

    def cut(self, text: str) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=False, special=True))

    def served(self, question: Question) -> list[int] | None:
        return None  # its templates are rendered by jinja2, as transformers renders them

    def next_token(self, ids: Sequence[int]) -> Tensor:
        self.model.reset()
        self.model.eval(list(ids))
        return torch.tensor(self.model.scores[len(ids) - 1])

    def answer(self, ids: Sequence[int], most: int) -> list[int]:
        said: list[int] = []
        while len(said) < most:
            token = int(self.next_token([*ids, *said]).argmax())
            if self.stops_at(token):
                break
            said.append(token)
        return said

    def stops_at(self, token: int) -> bool:
        vocabulary = self.library.llama_model_get_vocab(self.model.model)
        return bool(self.library.llama_vocab_is_eog(vocabulary, token))


class _Server:
    """Through xllamacpp: llama.cpp's own server inside this process, asked on 127.0.0.1."""

    def __init__(self, file: Path, rows: int, context: int) -> None:
        library: Any = import_module("xllamacpp")
        asked: Any = library.CommonParams()
        asked.model.path = str(file)
        asked.n_ctx = context
        asked.n_parallel = 1
        asked.n_gpu_layers = 0
        asked.fit_params = False  # take the context as it is given
        asked.warmup = False
        asked.verbosity = -1
        asked.cache_type_k = library.ggml_type.GGML_TYPE_F32
        asked.cache_type_v = library.ggml_type.GGML_TYPE_F32
        asked.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        asked.swa_full = True
        self.server: Any = library.Server(asked)
        self.rows = rows

    def _post(self, path: str, **body: object) -> dict[str, Any]:
        request = Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request) as reply:
            return json.load(reply)

    def _complete(self, ids: Sequence[int], most: int, **more: object) -> dict[str, Any]:
        return self._post(
            "/completion",
            prompt=list(ids),
            n_predict=most,
            temperature=0,
            return_tokens=True,
            **more,
        )

    def cut(self, text: str) -> list[int]:
        found = self._post("/tokenize", content=text, add_special=False, parse_special=True)
        return cast("list[int]", found["tokens"])

    def served(self, question: Question) -> list[int] | None:
        asked: dict[str, object] = {"messages": question.messages}
        if question.tools:
            asked["tools"] = question.tools
        if question.kwargs:
            asked["chat_template_kwargs"] = question.kwargs
        try:
            text = self._post("/apply-template", **asked)["prompt"]
        except HTTPError:
            return []
        found = self._post("/tokenize", content=text, add_special=True, parse_special=True)
        return cast("list[int]", found["tokens"])

    def next_token(self, ids: Sequence[int]) -> Tensor:
        # Probabilities are told only beside a token that is a whole letter: let it be the "a".
        letter = self.cut("a")[-1]
        found = self._complete(ids, 1, n_probs=self.rows, logit_bias=[[letter, _SURE]])
        scores = torch.full((self.rows,), -torch.inf)
        for each in found["completion_probabilities"][0]["top_logprobs"]:
            scores[each["id"]] = each["logprob"]
        return scores

    def answer(self, ids: Sequence[int], most: int) -> list[int]:
        found = self._complete(ids, most)
        said = cast("list[int]", found["tokens"])
        return said[:-1] if found["stop_type"] == "eos" else said

    def stops_at(self, token: int) -> bool:
        letter = self.cut("a")[-1:]
        return self._complete(letter, 2, logit_bias=[[token, _SURE]])["stop_type"] == "eos"
