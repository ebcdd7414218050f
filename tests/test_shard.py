"""What a rank holds, asked of one process that is told it is one of several (torch's fake group:
nothing is sent).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sftx import distributed
from sftx.model import shard as shard_module
from sftx.model.adapter import attach, cast_frozen_weights
from sftx.model.pack_loss import PackLoss
from sftx.model.shard import build_mesh, check_replicas, local_shard, shard
from sftx.settings.schema import Adapter
from sftx.types import UserError

CPU = torch.device("cpu")


@pytest.fixture
def third_of_eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is rank 2 of 8, on hosts of 2 processes each."""
    for name, value in {"RANK": 2, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    torch_dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=8)
    yield
    torch_dist.destroy_process_group()


@pytest.mark.usefixtures("third_of_eight")
def test_layouts_replicate_over_hosts_and_shard_inside_one() -> None:
    shapes = {name: build_mesh(name, CPU, 60.0).shape for name in ("replicate", "fsdp", "hsdp")}
    assert shapes == {"replicate": (8, 1), "fsdp": (1, 8), "hsdp": (4, 2)}
    assert build_mesh("hsdp", CPU, 60.0).mesh.tolist() == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]  # a shard stays on its host


@pytest.mark.usefixtures("third_of_eight")
def test_a_rank_knows_where_its_part_begins() -> None:
    """Rank 2 of 8 holds rows 4 and 5 of 16: its first element is number 4 * 3 of the whole."""
    mesh = init_device_mesh("cpu", (1, 8), mesh_dim_names=("replicate", "shard"))
    local = torch.arange(12.0, 18.0).view(2, 3)
    tensor = DTensor.from_local(
        local, mesh["shard"], [Shard(0)], shape=torch.Size((16, 3)), stride=(3, 1)
    )
    held, first = local_shard(tensor)
    assert first == 12
    assert held.flatten().tolist() == [12.0, 13.0, 14.0, 15.0, 16.0, 17.0]
    assert local_shard(local) == (local, 0)


def test_every_group_of_a_mesh_waits_as_long_as_the_run_says() -> None:
    """torch gives the groups of a mesh half an hour, whatever the process group was told."""
    torch_dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        groups = build_mesh("fsdp", CPU, 7.0).get_all_groups()
        waits = {group._get_backend(CPU).options._timeout for group in groups}
    finally:
        torch_dist.destroy_process_group()
    assert len(groups) == 2
    assert waits == {timedelta(seconds=7)}


@pytest.mark.usefixtures("third_of_eight")
def test_a_replica_that_differs_in_a_bit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (8, 1), mesh_dim_names=("replicate", "shard"))
    weight = DTensor.from_local(torch.ones(3), mesh, [Replicate(), Shard(0)])

    def gathered(mine: tuple[int, list[int]], odd: int | None) -> list[tuple[int, list[int]]]:
        shard, sums = mine
        return [(shard, [total + (rank == odd) for total in sums]) for rank in range(8)]

    monkeypatch.setattr(distributed, "all_gather", lambda mine: gathered(mine, None))
    check_replicas({"weight": weight})
    monkeypatch.setattr(distributed, "all_gather", lambda mine: gathered(mine, 5))
    with pytest.raises(UserError, match="the weights of rank 5 are no longer those of its peers"):
        check_replicas({"weight": weight})


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_are_summed_in_float32_whatever_layers_compute_in(
    precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[MixedPrecisionPolicy] = []
    monkeypatch.setattr(
        shard_module, "fully_shard", lambda module, mp_policy, **_: policies.append(mp_policy)
    )
    shard(PackLoss(tiny.model()), Mock(), precision)
    assert len(policies) == 3  # two layers, and the rest
    assert {policy.reduce_dtype for policy in policies} == {torch.float32}


class TwoRanks:
    """Stands for torch.distributed: this process is rank 1, and rank 0 says 5 and "from 0"."""

    ReduceOp = torch_dist.ReduceOp

    def __init__(self) -> None:
        self.calls: list[str] = []

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = torch_dist.ReduceOp.SUM, group: Any = None
    ) -> None:
        self.calls.append("all_reduce")
        other = torch.full_like(tensor, 5)
        if op == torch_dist.ReduceOp.SUM:
            tensor += other
        elif op == torch_dist.ReduceOp.MAX:
            tensor.copy_(torch.maximum(tensor, other))
        else:
            tensor.copy_(torch.minimum(tensor, other))

    def broadcast_object_list(self, holder: list[Any], **_: Any) -> None:
        holder[0] = "from 0"


def test_what_ranks_tell_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    both = TwoRanks()
    monkeypatch.setattr(distributed, "torch_dist", both)
    monkeypatch.setattr(distributed, "is_joined", lambda: True)
    assert [distributed.all_reduce_max(3), distributed.all_reduce_max(9)] == [5, 9]
    assert distributed.broadcast("from 1") == "from 0"
    assert distributed.all_reduce_sum(torch.tensor(2.0)) == 7
    both.calls.clear()
    distributed.barrier()
    distributed.barrier(saving=True)
    assert both.calls == ["all_reduce"] * 2


def test_a_rank_that_gives_no_sign_of_life_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "GRACE", 0.2)
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its stacks
        distributed._Watch(HashStore(), 0.1)
        time.sleep(20)
        os._exit(7)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 1


@pytest.mark.usefixtures("third_of_eight")
@pytest.mark.parametrize("unread", [False, True])
def test_frozen_matrices_stay_in_shards_in_the_precision_of_products(unread: bool) -> None:
    model = tiny.model()
    attach(model, Adapter(method="lora", rank=4), 0)
    cast_frozen_weights(model, torch.bfloat16, unread)
    loss = PackLoss(model)
    shard(loss, build_mesh("fsdp", CPU, 60.0), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in loss.named_parameters() if "_proj" in name}
    assert dtypes
    for name, dtype in dtypes.items():
        frozen = "base_layer" in name
        assert dtype == (torch.bfloat16 if frozen else torch.float32), name
