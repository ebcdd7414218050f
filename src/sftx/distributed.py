"""The processes of a run: who this one is, and what they tell each other.

torchrun starts them and names them in the environment; one process alone needs nothing of this, and
every function here then answers at once. Collectives run over gloo on the CPU and over NCCL between
GPUs.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sftx.types import UserError

Value = TypeVar("Value")
GRACE = 5.0
"""Seconds after `runtime.rank_timeout` until a rank ends itself: those that wait for it get to
speak first.
"""
_PR_SET_PDEATHSIG = 1  # prctl(2)


def rank() -> int:
    """Number of this process among all of the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, which alone prints, writes and asks."""
    return rank() == 0


def is_joined() -> bool:
    """Whether this process is in a group, be it a group of one."""
    return torch_dist.is_available() and torch_dist.is_initialized()


class _Watch:
    """Where every rank is, so that the survivors of a lost one can name it."""

    def __init__(self, store: Store, timeout: float) -> None:
        self.store = PrefixStore("alive", store)
        self.store.set_timeout(timedelta(seconds=GRACE))
        self.timeout, self.place = timeout, "the start"
        self.heartbeat("")

    def heartbeat(self, place: str) -> None:
        """Tell the others, and begin anew the time until this process shows its stacks and ends."""
        self.place = place or self.place
        # The store is gone with the launcher; what that means, a signal says.
        with suppress(RuntimeError):
            self.store.set(f"place {rank()}", self.place)
        faulthandler.dump_traceback_later(self.timeout + GRACE, exit=True)

    def silent(self) -> str:
        """The ranks that do not report a loss as this one does, in words; called once, by every
        survivor.
        """
        self.store.set(f"lost {rank()}", "")
        time.sleep(GRACE / 2)  # until the others have said so too
        silent = [other for other in range(world_size()) if not self.store.check([f"lost {other}"])]
        places = [self.store.get(f"place {other}").decode() for other in silent]
        named = (
            f"rank {other} was last heard of at {place}"
            for other, place in zip(silent, places, strict=True)
        )
        return "; ".join(named) or "no rank is silent"


_watch: _Watch | None = None
_saving: Any = None  # a ProcessGroup, once joined
_groups = count()


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; without torchrun nothing happens.

    A rank that waits longer than `timeout` seconds for another fails, naming who was heard of
    least; a rank that gives no sign of life for so long prints the stacks of its threads and ends.
    The launcher then ends the rest.
    """
    global _saving, _watch
    missing = sorted({"MASTER_ADDR", "RANK", "WORLD_SIZE"} - os.environ.keys())
    # Or each would train its share, and no more.
    if missing and not is_joined() and (rank() or world_size() > 1):
        raise UserError(
            f"the environment speaks of several processes (RANK={rank()}, "
            f"WORLD_SIZE={world_size()}), but not of "
            f"{missing[0]}: start them with torchrun, or unset what is left of another program"
        )
    if missing or is_joined():
        yield
        return
    _die_with_launcher()
    on_gpu = device.type == "cuda"
    server = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]
    # The launcher's store outlives a group, with all its keys.
    store = PrefixStore(f"sftx {next(_groups)}", server)
    torch_dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(seconds=timeout),
        device_id=device if on_gpu else None,
    )
    _saving = torch_dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    _watch = _Watch(store, timeout)
    try:
        yield
        torch_dist.barrier()  # nobody leaves while another still needs its store or its sockets
        torch_dist.destroy_process_group()
    # What torch raises for a peer that is gone, silent, or out of step.
    except RuntimeError as error:
        print(f"rank {rank()}: {_watch.place}: {error}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):  # the store may be gone too
            print(f"rank {rank()}: {_watch.silent()}", file=sys.stderr, flush=True)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        _watch = _saving = None  # its threads end here, not while the interpreter is taken apart


def heartbeat(place: str = "") -> None:
    """A sign of life, with where in the run this rank is ("step 12"); due once per
    `runtime.rank_timeout`.
    """
    if _watch is not None:
        _watch.heartbeat(place)


def saving_group() -> torch_dist.ProcessGroup | None:
    """The ranks once more, for what goes on beside training: a checkpoint is written on a thread of
    its own.
    """
    return _saving


def group_of(size: int, timeout: float) -> torch_dist.ProcessGroup:
    """The group of `size` ranks that follow each other, of which this is one."""
    own, _ = torch_dist.new_subgroups(size, timeout=timedelta(seconds=timeout))
    assert isinstance(own, torch_dist.ProcessGroup)
    return own


def all_reduce_max(number: int) -> int:
    """The largest `number` of any rank, on every rank; a sign of life too."""
    if not is_joined():
        return number
    heartbeat()
    tensor = torch.tensor(number)
    torch_dist.all_reduce(tensor, torch_dist.ReduceOp.MAX)
    return int(tensor)


def broadcast(value: Value, saving: bool = False) -> Value:
    """The value of rank 0, on every rank; `saving` = in the group for it."""
    if not is_joined():
        return value
    holder: list[Any] = [value]
    torch_dist.broadcast_object_list(
        holder, group=_saving if saving else None, device=torch.device("cpu")
    )
    return holder[0]


def all_gather(value: Value) -> list[Value]:
    """The values of all ranks, by rank; in the group for saving, so not while something is saved."""
    values = [value] * world_size()
    if is_joined():
        torch_dist.all_gather_object(values, value, group=_saving)
    return values


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place."""
    if is_joined():
        torch_dist.all_reduce(tensor)
    return tensor


def barrier(saving: bool = False) -> None:
    """Wait until every rank is here; `saving` = in the group for it."""
    if is_joined():
        torch_dist.all_reduce(torch.zeros(()), group=_saving if saving else None)


def _die_with_launcher() -> None:
    """Ask Linux for SIGTERM when the launcher dies: a killed torchrun must not leave ranks behind."""
    if sys.platform != "linux" or not torch_dist.is_torchelastic_launched():
        return
    launcher = os.getppid()
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) == 0 and os.getppid() != launcher:
        sys.exit("the launcher ended before this rank began")
