"""Ranks that are forked from a process which has imported everything, as torchrun would start them.

`python rank_pool.py` reads jobs from its input and answers each with an exit code. A process of its
own imports for five seconds before it begins; one that is forked here begins at once. Tests of what
torchrun itself does (`ranks.start`) do without.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time

import torch
from torch._C._distributed_c10d import TCPStore

import sftx.cli.train
import sftx.training.loop  # noqa: F401

TIMEOUT = 150
"""Seconds after which a job is killed."""


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(words: list[str], count: int, log: str) -> int | None:
    """Run `words` (as after `python`) on `count` ranks, whose lines go to `log`.

    The exit code of the first rank that failed, or 0. In a rank: None.
    """
    port = free_port()
    living: set[int] = set()
    for rank in range(count):
        pid = os.fork()
        if not pid:
            become(rank, count, port, log)
            work(words)
            return None
        living.add(pid)
    # As torchrun does, after the ranks were forked: its thread must not be among them.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    code = wait(living)
    del store
    return code


def become(rank: int, count: int, port: int, log: str) -> None:
    """Make this process a rank, with the environment that torchrun gives."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "pool",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    into = os.open(log, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(into, 1)
    os.dup2(into, 2)
    os.dup2(nothing, 0)


def work(words: list[str]) -> None:
    """Do what `python WORDS` does."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def wait(living: set[int]) -> int:
    """Wait for all ranks; when one has failed, or the time is over, the others are ended."""
    code = 0
    end = time.monotonic() + TIMEOUT
    while living:
        for pid in [*living]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                living.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        if code or time.monotonic() > end:
            code = code or signal.SIGALRM
            for pid in living:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return code


def main() -> None:
    """Do one job after the other, until there is no input."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        code = run(**json.loads(line))
        if code is None:
            return
        print(code, flush=True)


if __name__ == "__main__":
    main()
