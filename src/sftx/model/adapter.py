"""Low-rank adapters through peft: attach, continue, count."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from peft.utils.save_and_load import load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor
from transformers import PreTrainedModel

from sftx.boundary import boundary
from sftx.hub import ask_hub
from sftx.model import lora, mixture
from sftx.model.architecture import beside_text
from sftx.model.checkpointing import decoder_layers
from sftx.model.patterns import check_patterns
from sftx.model_config import check_links, read_json
from sftx.settings.schema import Adapter
from sftx.types import UserError

# What of an adapter_config.json is read, or only says where the adapter comes from.
# `base_model_name_or_path`, `revision` and `auto_mapping` name models and code: neither sftx nor
# peft, as sftx calls it, follows them.
READ = frozenset([
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "trainable_token_indices",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "bias", "modules_to_save", "init_lora_weights", "target_parameters",
])  # fmt: skip


def attach(
    model: PreTrainedModel, adapter: Adapter, seed: int, tokens: Sequence[int] = ()
) -> PeftModel | None:
    """Put the adapter into `model` (in place) and freeze the rest; None when all weights train.

    `seed` decides the adapter's first weights. The embedding rows of `tokens` (in an untied head
    too) train with it. Raises UserError when `targets` names no module of the model, or `path`
    holds an adapter that does not fit.
    """
    if adapter.method == "none":
        return None
    rows = _token_rows(model, tokens) if tokens else None
    path = adapter.path
    wrapped = (
        _new(model, adapter, seed, rows) if path is None else _continued(model, adapter, path, rows)
    )
    lora.fuse(wrapped)
    return wrapped


def _new(
    model: PreTrainedModel, adapter: Adapter, seed: int, rows: dict[str, list[int]] | None
) -> PeftModel:
    torch.manual_seed(seed)
    if adapter.targets != "all-linear":
        names = [name for name, _ in model.named_modules()]
        check_patterns("adapter.targets", {"target_modules": adapter.targets}, names)
    config = _config(model, adapter, rows)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # Of experts, whose ranks are set all the same.
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys did not match"
            )
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise _unfit(model, adapter, error) from error
    assert isinstance(wrapped, PeftModel)
    shared = mixture.shared_adapters(wrapped)
    if adapter.merge and shared:
        raise UserError(
            f"adapter.merge: {type(model).__name__} uses the weight of {shared[0]} in several "
            "places; merged, the adapter "
            "would be added in all of them. Leave adapter.merge out: the adapter is "
            "saved beside the model"
        )
    return wrapped


def _config(
    model: PreTrainedModel, adapter: Adapter, rows: dict[str, list[int]] | None
) -> LoraConfig:
    """The settings of an adapter as peft has them."""
    # Who wants routers adapted names them.
    routers = mixture.routers(model) if adapter.targets == "all-linear" else []
    linear = [name for name in routers if isinstance(model.get_submodule(name), torch.nn.Linear)]
    linear += {name.rpartition(".")[0] for name in beside_text(model)}  # never the part that sees
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType] - a float is fine
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        exclude_modules=linear or None,
        use_rslora=adapter.method == "rslora",
        use_dora=adapter.method == "dora",
        trainable_token_indices=rows,
    )
    if routers:  # peft names those that are parameters itself, among the experts
        convert_peft_config_for_transformers(config, model, None)
        named = config.target_parameters or []
        kept = [name for name in named if name.split(".")[0] not in mixture.ROUTERS]
        config.target_parameters = kept or None
    return config


def _unfit(model: PreTrainedModel, adapter: Adapter, error: ValueError) -> UserError:
    """What to say where peft cannot adapt a model as it is asked to."""
    name = type(model).__name__
    if adapter.method == "dora" and mixture.has_joint_experts(model):
        return UserError(
            f"adapter.method: dora cannot adapt the experts of {name}, whose weights are one "
            "tensor; use lora, or name others, such as adapter.targets: [q_proj, k_proj, "
            "v_proj, o_proj]"
        )
    return UserError(f"adapter.targets: {adapter.targets!r} does not fit {name}: {error}")


def cast_frozen_weights(
    model: torch.nn.Module, precision: torch.dtype, unread: bool = False
) -> None:
    """Keep the frozen matrices beneath the adapters of the decoder layers in `precision` (in
    place): autocast would cast them to it at every product, so that no number changes, and bf16
    takes half the memory.

    On a CPU the rest is copied: any tensor that is read from the file's mapping keeps all of it,
    and what was read of it, in memory. `unread` weights are still to be read from their files, and
    are not touched.
    """
    modules = decoder_layers(model).modules()
    adapted = [module for module in modules if isinstance(module, lora.LoraLinear)]
    for module in adapted:
        for p in module.base_layer.parameters():
            p.data = torch.empty_like(p, dtype=precision) if unread else p.data.to(precision)
    if unread or not adapted or precision == torch.float32:
        return
    for p in model.parameters():
        if p.device.type == "cpu":
            p.data = p.data.clone()


def _token_rows(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Which rows train, by the name of the matrix: the embeddings, and the head where it is another
    matrix.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:  # peft would drop it
        raise UserError(
            f"model.add_tokens: the head of {type(model).__name__} has a bias; train all weights "
            "instead"
        )
    modules = [embeddings] if head.weight is embeddings.weight else [embeddings, head]
    return {name: list(tokens) for name, module in model.named_modules() if module in modules}


def _continued(
    model: PreTrainedModel, adapter: Adapter, path: str, rows: dict[str, list[int]] | None
) -> PeftModel:
    """The saved adapter in `path`, trainable. What the settings say of it must be so."""
    with boundary(f"adapter.path: {path} cannot be continued"):
        wrapped = load_adapter(model, path)
    config: Any = wrapped.peft_config["default"]
    used = (("dora", config.use_dora), ("rslora", config.use_rslora))
    method = " and ".join(name for name, is_used in used if is_used) or "lora"
    found = {
        "method": method,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
    }
    found["targets"] = config.target_modules
    for name in sorted(adapter.model_fields_set & found.keys()):
        given = getattr(adapter, name)
        if (set(given) if isinstance(given, list) else given) != found[name]:
            raise UserError(
                f"adapter.{name}: {given}, but the adapter in {path} has {found[name]}; leave it "
                "out"
            )
    has = config.trainable_token_indices
    if has != rows:
        raise UserError(
            f"model.add_tokens: {path} trains the rows {has}, this run {rows}; list the same"
        )
    return wrapped


def load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """Put the saved adapter in the folder `path`, or of that name on the hub, into `model`.

    Raises:
        UserError: its files are not an adapter, could run code, or do not fit the model.
    """
    folder = path
    if not Path(path).is_dir():
        ask_hub(path, "adapter.path: ")
        folder = snapshot_download(path, allow_patterns=["*.safetensors", "*.json"])
    _check_folder(Path(folder))
    names = [name for name, _ in model.named_modules()]
    file = Path(folder) / "adapter_config.json"
    check_patterns(f"adapter.path: {file}", read_json(file), names)
    kind = PeftConfig.from_pretrained(folder).peft_type
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Of a model that is only to be measured.
        warnings.filterwarnings("ignore", ".* to a meta parameter")
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True)
    needed = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    stored = load_peft_weights(folder, device="cpu")
    odd = sorted(name for name in {*stored} ^ {*needed} if "lora_" in name)
    if kind != "LORA" or odd:  # peft itself only warns of weights that are missing
        raise UserError(
            f"adapter.path: {path} ({kind}) does not fit this model; odd weights: {odd[:3]}"
        )
    return wrapped


def _check_folder(folder: Path) -> None:
    """Refuse an adapter whose files could run code, are not safetensors, or ask for what sftx does
    not do.
    """
    if not (folder / "adapter_model.safetensors").exists():  # peft would read a pickle too
        raise UserError(
            f"adapter.path: {folder} has no adapter_model.safetensors; pickled weights are not read"
        )
    check_links(folder)
    file = folder / "adapter_config.json"
    if not file.exists():
        raise UserError(f"adapter.path: {folder} has no adapter_config.json")
    config = read_json(file)
    default = LoraConfig().to_dict()
    for name in sorted(config.keys() - READ):
        value = config[name]
        if value and value != default.get(name):
            raise UserError(
                f"adapter.path: {file}: {name}={str(value)[:60]!r} is not understood; sftx does "
                "without it"
            )


def bare(module: Any) -> Any:
    """The embeddings or the head without trained rows; with them, a weight in shards cannot be
    looked at.
    """
    if isinstance(module, TrainableTokensWrapper):
        return module.original_module
    return module


def head_weights(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Matrix [V, h] and bias of the head, with the rows that an adapter trains in their places."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        layer: Any = head.token_adapter
        return layer.get_merged_weights(layer.active_adapters), None
    return head.weight, head.bias


def trainable(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    # Two 4-bit weights are one element.
    whole = [(p, getattr(p, "quant_state", p)) for p in model.parameters()]
    sizes = [(p, math.prod(q.shape)) for p, q in whole]
    trained = sum(size for p, size in sizes if p.requires_grad)
    return trained, sum(size for _, size in sizes)
