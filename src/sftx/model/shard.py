"""One model on several processes: whole on each, or in shards, by PyTorch's `fully_shard` on a mesh
of two dimensions.

The first dimension replicates, the second shards: `replicate` is a mesh of N x 1, `fsdp` of 1 x N,
`hsdp` of nodes x processes per node. Gradients are summed, never averaged: the loss is divided by
the weight of the whole step already.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from sftx import distributed
from sftx.boundary import boundary
from sftx.model.architecture import auto_class
from sftx.model.checkpointing import decoder_layers
from sftx.model.folder import check_weights, load_config
from sftx.model.pack_loss import PackLoss
from sftx.model_config import model_folder
from sftx.settings.schema import Model, Runtime
from sftx.types import UserError


def choose_layout(runtime: Runtime, device: torch.device, weights: int, trainable: int) -> str:
    """`runtime.parallel`, or what `auto` means for a model of so many weights, of which so many
    train.
    """
    if runtime.parallel != "auto":
        return runtime.parallel
    if device.type != "cuda":
        return "replicate"
    needed = 4 * weights + 12 * trainable  # float32: weights; gradients and AdamW's two moments
    if needed <= torch.cuda.get_device_properties(device).total_memory / 2:
        return "replicate"
    return "fsdp"


def build_mesh(parallel: str, device: torch.device, timeout: float) -> DeviceMesh:
    """The mesh (replicas, shards) of a layout, every group of it with the run's timeout in seconds."""
    size = distributed.world_size()
    per_node = distributed.local_size()
    if parallel == "hsdp" and size % per_node:
        raise UserError(
            f"runtime.parallel: hsdp needs nodes of equal size, but {size} is not a multiple of "
            f"{per_node}"
        )
    shards = {"replicate": 1, "fsdp": size, "hsdp": per_node}[parallel]
    mesh = init_device_mesh(
        device.type, (size // shards, shards), mesh_dim_names=("replicate", "shard")
    )
    # Torch gives the groups of a mesh its own default, half an hour.
    for group in mesh.get_all_groups():
        torch_dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
    return mesh


def shard(loss: PackLoss, mesh: DeviceMesh, precision: torch.dtype) -> None:
    """Make every decoder layer of the model, and then all that is left, a unit of `fully_shard`, in
    place.

    Layers are gathered and computed in `precision`; embeddings, final norm and head stay in their
    own dtype, as they do under autocast. Gradients are summed in float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == torch.float32 else precision,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast decides, as in one process
    )
    quantised = {
        p for p in loss.parameters() if not p.is_floating_point()
    }  # frozen and small: whole on every rank
    for layer in decoder_layers(loss.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=quantised)
    outer = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fully_shard(loss, mesh=mesh, mp_policy=outer, ignored_params=quantised)
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def keep_gathered(loss: nn.Module, until_backward: bool, until_next: bool) -> None:
    """Whether the layers of a sharded model stay whole from the forward pass to the backward pass
    (its other weights do anyway), and all of it until the next pack.
    """
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(not until_next, recurse=False)
            if module is not loss:
                module.set_reshard_after_forward(not until_backward, recurse=False)


@dataclass(frozen=True)
class Unread:
    """A model whose weights are still in their files; its parameters are address space that nothing
    was written to.
    """

    model: PreTrainedModel
    folder: Path
    places: list[tuple[str, nn.Module, str]]  # name in the files, module, attribute
    complete: bool  # whether the files hold every weight under its name in the model

    def read(self) -> None:
        """Fill what `shard` has made of the parameters: each rank reads its own slices of the
        files.
        """
        load_tensors(
            self.folder,
            {name: getattr(module, attribute).detach() for name, module, attribute in self.places},
        )


def unread_model(
    settings: Model, dtype: torch.dtype, config: PreTrainedConfig | None = None
) -> Unread:
    """The model without its weights."""
    folder = Path(model_folder(settings.path))
    if not folder.is_dir():
        folder = Path(snapshot_download(settings.path, allow_patterns=["*.safetensors", "*.json"]))
    config = copy.deepcopy(config or load_config(settings))
    check_weights(str(folder))
    with boundary(f"model.path: {settings.path} cannot be built from its files"):
        # Parameters on the meta device; buffers are computed as always.
        with init_empty_weights(include_buffers=False):
            model: Any = auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=settings.trust_remote_code
            )
        model.tie_weights()
        model.config.use_cache = False
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        stored = tensor_facts(folder).keys() if any(folder.glob("*.safetensors")) else set()
    places = []
    filled = dict[int, nn.Parameter]()
    for name in model.state_dict():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = getattr(module, attribute)
        # An adapter is put beside real tensors only; untouched, they take no memory.
        if tensor.is_meta:
            real = filled.setdefault(
                id(tensor), nn.Parameter(torch.empty_like(tensor, device="cpu"))
            )
            setattr(module, attribute, real)
        if name in stored:
            places.append((name, module, attribute))
    read = {id(getattr(module, attribute)) for _, module, attribute in places}
    return Unread(model, folder, places, all(id(p) in read for p in model.parameters()))


def whole_state(
    model: nn.Module, dtype: torch.dtype | None, trained_only: bool
) -> dict[str, Tensor]:
    """The state of a sharded model on the CPU of rank 0, one tensor after the other; {} on the
    other ranks.

    Floating-point tensors come in `dtype`, if it is given; tied weights stay one tensor.
    """
    state: dict[str, Tensor] = {}
    tied: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained_only and not parameter.requires_grad:
            continue
        if id(parameter) not in tied:
            tensor = full_tensor(parameter.detach())  # all take part; rank 0 keeps it
            cast = dtype if tensor.is_floating_point() else None
            tied[id(parameter)] = (
                tensor.to("cpu", cast) if distributed.is_main() else torch.empty(0)
            )
        state[name] = tied[id(parameter)]
    if not distributed.is_main():
        return {}
    if trained_only:
        return state
    return state | {n: t for n, t in model.state_dict().items() if n not in state}


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, sharded or not, as safetensors: each rank the parts that are its own, nothing
    twice.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        state_dict_saver.save(
            tensors, storage_writer=writer, process_group=distributed.saving_group()
        )
    except CheckpointException as error:  # on every rank, with what went wrong on each
        raise OSError(str(error)) from error


def check_replicas(tensors: Mapping[str, Tensor]) -> None:
    """UserError that names the rank where weights that several ranks hold are not the same on all,
    to the bit.
    """
    sharded = [tensor for tensor in tensors.values() if isinstance(tensor, DTensor)]
    if not sharded or sharded[0].device_mesh.size(0) == 1:
        return
    bits = {4: torch.int32, 2: torch.int16}  # sums of whole numbers: exact, in any order
    sums = [
        int(t.to_local().contiguous().view(bits[t.dtype.itemsize]).sum())
        for t in sharded
        if t.to_local().numel()
    ]
    gathered = distributed.all_gather((sharded[0].device_mesh.get_local_rank("shard"), sums))
    for rank, (place, found) in enumerate(gathered):
        if found != next(other for shard, other in gathered if shard == place):
            more = (
                "its processor or memory may be at fault. Run the same command to continue "
                "from the last checkpoint"
            )
            raise UserError(
                f"the weights of rank {rank} are no longer those of its peers, and are not saved; "
                f"{more}"
            )


def tensor_facts(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in the safetensors files of a folder, whoever wrote them."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (tensor.size, tensor.properties.dtype)
        for name, tensor in found.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, sharded or not, from the safetensors files of a folder: each rank reads what
    it holds.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
        state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def local_shard(tensor: Tensor) -> tuple[Tensor, int]:
    """The part of a tensor that is on this rank, sharing its memory, and the number of its first element in
    the whole.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    local = tensor.to_local()
    if not offset:
        return local, 0
    row = tensor.numel() // max(len(tensor), 1)
    return local, offset[0] * row


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank must ask for it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor
