"""Writing a GGUF file of a trained model, and reading it back: by sftx, by transformers, and by
llama.cpp where it is installed.
"""

# Libraries leave types of their members open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sftx.boundary import boundary, cause
from sftx.gguf.header import read_header
from sftx.gguf.modelfile import Pieces, modelfile, pieces_of
from sftx.gguf.pieces import ids_of_pieces
from sftx.gguf.read import write_folder
from sftx.gguf.vocabulary import read_vocabulary
from sftx.gguf.write import KINDS, layout_of, rounded, write_gguf
from sftx.model.load import load_model
from sftx.model.save import load_tokenizer, serving_config
from sftx.settings.schema import Model
from sftx.training.llama_cpp import LlamaCpp, open_llama_cpp
from sftx.training.merging import Trained
from sftx.training.parity import (
    LONGEST,
    NEW_TOKENS,
    Question,
    Reading,
    check_ids,
    reading_of,
    rendered,
)
from sftx.types import Json, Message, UserError

FILE = "model.gguf"
SAME = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
QUANTISER = "llama-quantize"
_UNREAD = ("gemma",)  # families whose GGUF files transformers does not read
_NOT_COMPUTED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "transformers_version",
        "initializer_range",
        "use_cache",
        "pretraining_tp",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "attention_dropout",
        "max_position_embeddings",
        "max_window_layers",
        "model_type",
        "_sliding_window_pattern",
        "quantization_config",
    }
)
"""What a config says that changes no logit of a token within the context."""


def kind_of(dtype: str, stored: torch.dtype) -> str:
    """The type of matrices that `dtype` names; default: BF16 where the model was stored so, else F16.

    Raises:
        UserError: the type is written by llama.cpp's quantiser, which is not installed.
    """
    if not dtype or dtype == "auto":
        return "BF16" if stored == torch.bfloat16 else "F16"
    kind = SAME.get(dtype, dtype.upper())
    if kind not in KINDS and shutil.which(QUANTISER) is None:
        known = ", ".join(name.lower() for name in KINDS)
        raise UserError(
            f"sftx export: dtype={dtype}: sftx itself writes {known}; other types need "
            f"{QUANTISER} of llama.cpp, which is not on the PATH"
        )
    return kind


@dataclass(frozen=True, slots=True)
class Back:
    """A GGUF file as others read it; `folder` is what sftx makes of it, `llama_cpp` is None where no
    llama.cpp is installed.
    """

    file: Path
    folder: Path
    readers: list[str]
    llama_cpp: LlamaCpp | None

    def model(self) -> PreTrainedModel:
        """The model as sftx reads it."""
        return load_model(Model(path=str(self.folder)), torch.device("cpu"))

    def by_transformers(self) -> PreTrainedModel | None:
        """The model as transformers' own loader reads the tensors, with the config that sftx read:
        its own reading of the config leaves things out. None for a family that it does not read.
        """
        config = cast("PreTrainedConfig", AutoConfig.from_pretrained(self.folder))
        if config.model_type in _UNREAD:
            return None
        with redirect_stderr(StringIO()):  # it shows a bar that cannot be switched off
            return AutoModelForCausalLM.from_pretrained(
                self.file.parent, gguf_file=self.file.name, config=config, dtype=torch.float32
            ).eval()


def write(folder: Path, scratch: Path, trained: Trained, model: PreTrainedModel, kind: str) -> Path:
    """Write the GGUF file and the Modelfile into `folder`; `scratch` gets the tokenizer."""
    stops = sorted(trained.encoder.stop_ids)
    trained.served.save_pretrained(str(scratch))
    generation = serving_config(model, trained.served, stops)
    generation.save_pretrained(str(scratch))
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    first = kind if kind in KINDS else "F32"
    file = folder / FILE if first == kind else scratch / FILE
    config: dict[str, Json] = model.config.to_dict()
    layout_of(config)  # a family that is not covered is refused before anything is written
    with boundary("sftx export: format=gguf"):
        write_gguf(
            file,
            first,
            config,
            scratch,
            shapes,
            lambda name: state[name].float().numpy(),
            trained.source.path.rstrip("/").rpartition("/")[2],
        )
    if first != kind:
        _quantise(file, folder / FILE, kind)
    tokenizer = trained.served
    texts = tokenizer.convert_ids_to_tokens(generation.eos_token_id or [])
    lines = modelfile(FILE, _pieces(tokenizer), texts)
    (folder / "Modelfile").write_text(lines, encoding="utf-8")
    return folder / FILE


def _quantise(source: Path, target: Path, kind: str) -> None:
    """Call llama.cpp's quantiser."""
    command = [QUANTISER, str(source), str(target), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"sftx export: {QUANTISER} cannot write {kind}: {' '.join(said)}")


def _pieces(tokenizer: Any) -> Pieces | None:
    """The chat template in pieces; None where there is none, or it cannot be told so."""
    if not tokenizer.chat_template:
        return None

    def render(messages: list[dict[str, str]]) -> str:
        said: list[Message] = [
            {"role": each["role"], "content": each["content"]} for each in messages
        ]
        try:
            return rendered(tokenizer, Question([], "", tuple(said)))
        except TemplateError as error:
            raise ValueError(cause(error)) from error

    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return pieces_of(render, tokenizer.bos_token if adds_bos else "")


def read_back(
    file: Path, scratch: Path, questions: Sequence[Question], config: PreTrainedConfig
) -> Back:
    """Read the file by every reader there is, and check the ids of each.

    Raises:
        UserError: a reader sends other ids, or the file cannot hold what the config says.
    """
    folder = scratch / "back"
    folder.mkdir()
    write_folder(read_header(file), folder)
    _check_config(config, folder)
    tokenizer = load_tokenizer(Model(path=str(folder)))
    readings: dict[str, Reading] = {"the GGUF file": reading_of(tokenizer)}
    with boundary(f"sftx export: {file.name} cannot be read back"):
        readings |= _independent(file, tokenizer)
        llama_cpp = open_llama_cpp(file, config.get_text_config().vocab_size, LONGEST + NEW_TOKENS)
    if llama_cpp is not None:
        cut = llama_cpp.cut
        readings["llama.cpp"] = lambda question: cut(rendered(tokenizer, question))
    for name, reading in readings.items():
        check_ids(name, reading, questions)
    return Back(file, folder, list(readings), llama_cpp)


def _independent(file: Path, tokenizer: Any) -> dict[str, Reading]:
    """A reading of the vocabulary that shares no code with sftx's own: that of transformers. Of
    SentencePiece it does not put spaces as llama.cpp does; there the scores are read as they are.
    """
    vocabulary = read_vocabulary(read_header(file))
    if vocabulary.model == "gpt2":
        theirs = cast(
            "object", PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
        )
        return {"the GGUF file as transformers reads it": reading_of(theirs)}

    def ids(question: Question) -> list[int]:
        return ids_of_pieces(vocabulary, rendered(tokenizer, question))

    return {"the scores of the GGUF file": ids}


def _check_config(config: PreTrainedConfig, folder: Path) -> None:
    """UserError where what the file says of the model is not what the model is."""
    told: dict[str, object] = {**config.to_dict()}
    found: dict[str, object] = cast(Any, AutoConfig).from_pretrained(folder).to_dict()
    if told.get("model_type") == "mistral":
        told["sliding_window"] = None  # written as a shorter context
    odd = [
        f"{name}: {told[name]!r}, read back as {found[name]!r}"
        for name in sorted(found.keys() & told.keys() - _NOT_COMPUTED)
        if not _same(told[name], found[name])
    ]
    if odd:
        raise UserError(
            f"sftx export: format=gguf: GGUF cannot hold this model as it is: {'; '.join(odd)}"
        )


def _same(one: object, other: object) -> bool:
    """Whether two values of configs mean the same; GGUF holds numbers in float32."""
    if isinstance(one, dict) and isinstance(other, dict):
        ours = cast("dict[str, object]", one)
        theirs = cast("dict[str, object]", other)
        return all(_same(ours.get(name), value) for name, value in theirs.items())
    if isinstance(one, float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-6 * abs(one)
    return one == other


def round_as_gguf(model: PreTrainedModel, kind: str) -> bool:
    """Round the weights (in place) as a file of that type does; False for a type that llama.cpp's
    quantiser writes.
    """
    if kind not in KINDS:
        return False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rounded(kind, parameter.numpy())))
    return True
