"""A model from its folder, as it is served: checked, with its adapter and its generation config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from sftx.boundary import boundary
from sftx.data.pack import probe_pack
from sftx.data.store.corpus import Corpus
from sftx.hub import ask_hub
from sftx.model.adapter import load_adapter
from sftx.model.checks.start import check_paths, check_sizes
from sftx.model.load import load_model
from sftx.model.on_disk import on_disk
from sftx.model.pack_loss import PackLoss
from sftx.model.runtime import Machine
from sftx.model_config import read_json
from sftx.settings.schema import Model
from sftx.types import UserError

TOKENS_PER_PACK = 2048


@dataclass(frozen=True, slots=True)
class Adapter:
    """The folder of an adapter, and the base that its adapter_config.json names."""

    folder: Path
    names: str


def adapter_in(path: str) -> Adapter | None:
    """The adapter in the folder `path`, or of that name on the hub; None where it is a whole model.

    Raises:
        UserError: adapter_config.json names no base.
    """
    if Path(path).is_file():  # of GGUF: a whole model
        return None
    if not Path(path).is_dir():
        ask_hub(path)
    with boundary(f"model.path: {path} cannot be looked at"):
        found = find_adapter_config_file(path)  # the name is the caller's own: it may be fetched
    if found is None:
        return None
    file = Path(found)
    name = read_json(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file}: base_model_name_or_path names no model; name it with base=")
    return Adapter(file.parent if Path(path).is_dir() else Path(path), name)


def base_of(adapter: Adapter) -> str:
    """The folder of the base that an adapter names; a name on the hub only where its files have been
    fetched before: the caller did not ask for it.
    """
    hint = "; if you want it, name it yourself: base=... (in `chat` and `serve`: under=...)"
    place = f"the base {adapter.names!r}, which {adapter.folder} names, is not on this disk"
    return on_disk(adapter.names, place, hint)


def on_base(model: Model, adapter: Adapter, base: str = "") -> Model:
    """`model` with the base of its adapter for the path (`base` where the caller names one), and
    with the adapter's own tokenizer: it has the template and the stop tokens of the training.
    """
    changed: dict[str, object] = {"path": base or base_of(adapter)}
    if model.tokenizer is None and (adapter.folder / "tokenizer.json").is_file():
        changed["tokenizer"] = str(adapter.folder)
    return model.model_copy(update=changed)


def put_adapter(loaded: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Put the adapter into its base; from then on its own generation config holds, if it has one.

    Raises:
        UserError: its files are damaged or do not fit the base.
    """
    with boundary(f"the adapter in {adapter.folder} cannot be loaded"):
        wrapped = load_adapter(loaded, str(adapter.folder))
        if (adapter.folder / "generation_config.json").is_file():
            loaded.generation_config = GenerationConfig.from_pretrained(adapter.folder)
    return wrapped


@dataclass(frozen=True, slots=True)
class Served:
    """A model on its device; `adapter` is the same with the adapter of its folder."""

    loss: PackLoss
    adapter: PeftModel | None


def load_served(model: Model, adapter: Adapter | None, corpus: Corpus, machine: Machine) -> Served:
    """`model`, with `adapter` in it, and the checks of its loss behind it.

    Raises:
        UserError: the files are damaged or do not fit each other, or the data does not fit them.
    """
    loaded = load_model(model, machine.device)
    wrapped = None if adapter is None else put_adapter(loaded, adapter)
    loss = PackLoss(loaded).eval()
    longest = int(corpus.lengths.max(initial=1))
    check_sizes(loss, longest, corpus.largest_id)
    probe = probe_pack([corpus.example(i) for i in range(min(len(corpus), 3))])
    check_paths(loss, probe, machine.precision, longest, TOKENS_PER_PACK)
    return Served(loss, wrapped)
