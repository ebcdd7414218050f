"""What a rank holds, asked of one process that is told it is one of several (torch's fake group: nothing is sent)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sftx.model.shard import build_mesh, own_part

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
    assert build_mesh("hsdp", CPU, 60.0).mesh.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]  # a shard stays on its host


@pytest.mark.usefixtures("third_of_eight")
def test_a_rank_knows_where_its_part_begins() -> None:
    """Rank 2 of 8 holds rows 4 and 5 of 16: its first element is number 4 * 3 of the whole."""
    mesh = init_device_mesh("cpu", (1, 8), mesh_dim_names=("replicate", "shard"))
    local = torch.arange(12.0, 18.0).view(2, 3)
    tensor = DTensor.from_local(local, mesh["shard"], [Shard(0)], shape=torch.Size((16, 3)), stride=(3, 1))
    held, first = own_part(tensor)
    assert first == 12
    assert held.flatten().tolist() == [12.0, 13.0, 14.0, 15.0, 16.0, 17.0]
    assert own_part(local) == (local, 0)


def test_every_group_of_a_mesh_waits_as_long_as_the_run_says() -> None:
    """torch gives the groups of a mesh half an hour, whatever the process group was told."""
    torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1)
    try:
        groups = build_mesh("fsdp", CPU, 7.0).get_all_groups()
        waits = {group._get_backend(CPU).options._timeout for group in groups}
    finally:
        torch_dist.destroy_process_group()
    assert len(groups) == 2
    assert waits == {timedelta(seconds=7)}
