"""The other side of every comparison: transformers, peft and PyTorch alone.

Nothing here uses the loss, the packs, the attention, the encoder or the loading of sftx. What is
compared with it may therefore be wrong in any of them, and it will show.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sftx.boundary import boundary
from sftx.gguf.read import converted_folder, gguf_file, is_gguf
from sftx.model.architecture import auto_class
from sftx.types import Example, Message, Row


@dataclass(frozen=True, slots=True)
class Measured:
    """A loss, summed over its targets, and its gradient for the embeddings, float32[V, h]."""

    loss: float
    gradient: Tensor


def plain_model(path: str, adapter: str | None, trust: bool, device: torch.device) -> Any:
    """The model in `path` in float32, as transformers loads it, under the adapter as peft loads it.

    Of a GGUF file transformers reads the tensors; the config is the one that sftx read, since its
    own reading leaves settings out.
    """
    transformers_logging.disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": path, "use_safetensors": True}
    if is_gguf(path):
        file = gguf_file(path)
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with boundary(f"model.path: {path} cannot be loaded"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = AutoConfig.from_pretrained(
            converted_folder(path) if is_gguf(path) else path, trust_remote_code=trust
        )
        source["config"] = config
        model: Any = auto_class(config).from_pretrained(
            **source, dtype=torch.float32, trust_remote_code=trust
        )
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
    return model.to(device).eval()


def logits_of(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits float32[sum of lengths, V] on the CPU, each text alone."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for ids in texts:
            tensor = torch.tensor([list(ids)], device=device)
            found.append(model(input_ids=tensor, use_cache=False).logits[0].float().cpu())
    return torch.cat(found)


def losses_alone(model: Any, examples: Sequence[Example]) -> Iterator[Measured]:
    """The loss of each example alone: logits of the model itself, and a weighted cross-entropy in
    float64.
    """
    device = next(model.parameters()).device
    weight = train_embeddings_only(model)
    for example in examples:
        ids = torch.tensor(example.ids.astype("int64"), device=device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
        each = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        weights = torch.tensor(example.weights[1:].astype("float64"), device=device)
        loss = (each * weights).sum()
        weight.grad = None
        loss.backward()
        assert weight.grad is not None
        yield Measured(float(loss.detach()), weight.grad.float().cpu())


def train_embeddings_only(model: Any) -> Tensor:
    """Freeze everything but the embeddings: their gradient passes through the whole model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "original_module", embeddings).weight  # beneath peft's token rows
    weight.requires_grad_(True)
    return weight


def conversation_of(row: Row) -> list[dict[str, Any]]:
    """The messages of a row as a client would send them; phrases are user and assistant in turn."""
    if row.kind == "phrases":
        roles = ("user", "assistant")
        return [
            {"role": roles[number % 2], "content": phrase.text}
            for number, phrase in enumerate(row.phrases)
        ]
    return [_as_sent(message) for message in row.messages]


def _as_sent(message: Message) -> dict[str, Any]:
    sent = {
        name: value
        for name, value in message.items()
        if name not in ("weight", "train") and value is not None
    }
    thought = sent.get("reasoning_content") or sent.get("thinking") or sent.get("reasoning")
    if thought is not None:  # templates read it under either name
        sent |= {"reasoning_content": thought, "thinking": thought}
    return sent


class Server:
    """What a server knows: the tokenizer in a folder and its generation_config.json."""

    def __init__(self, folder: Path, trust: bool) -> None:
        with boundary(f"{folder}: the saved tokenizer cannot be loaded"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust
            )
        file = folder / "generation_config.json"
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        self.stop_ids = frozenset([eos] if isinstance(eos, int) else eos or [])

    def prompt_ids(self, row: Row, turn: int) -> list[int]:
        """The ids that are sent to the model to get message `turn` of the row."""
        messages = conversation_of(row)[:turn]
        with boundary("tokenizer.apply_chat_template"):
            out = self.tokenizer.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in row.tools] or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **row.template_kwargs,
            )
        return list(out["input_ids"])

    def spells_a_special_token(self, row: Row) -> bool:
        """Whether the row's own text spells a special token: a server would take it for one."""
        text = json.dumps(
            [conversation_of(row), list(row.tools), row.template_kwargs], ensure_ascii=False
        )
        special = {
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        return any(json.dumps(token, ensure_ascii=False)[1:-1] in text for token in special)
