"""One job on two hosts: two network namespaces that see each other through a pair of virtual
Ethernet devices only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ranks

NET = "10.213.47"


def sh(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command.split(), capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces with the addresses .1 and .2."""
    names = [f"sftx-{os.getpid()}-{i}" for i in (1, 2)]
    if shutil.which("ip") is None or sh(f"ip netns add {names[0]}").returncode:
        pytest.skip("needs iproute2 and the right to make network namespaces")
    try:
        ends = [f"sf{os.getpid()}-{i}" for i in (1, 2)]
        steps = [f"ip netns add {names[1]}", f"ip link add {ends[0]} type veth peer name {ends[1]}"]
        for i in (0, 1):
            inside = f"ip -n {names[i]}"
            steps += [
                f"ip link set {ends[i]} netns {names[i]}",
                f"{inside} link set {ends[i]} name eth0",
            ]
            steps += [
                f"{inside} addr add {NET}.{i + 1}/24 dev eth0",
                f"{inside} link set eth0 up",
                f"{inside} link set lo up",
            ]
        for step in steps:
            done = sh(step)
            if done.returncode:
                pytest.skip(f"{step}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            sh(f"ip netns del {name}")


def start(host: str, number: int, path: Path) -> subprocess.Popen[str]:
    """torchrun on one host: one rank there, the rendezvous on the first host."""
    command = [
        "ip",
        "netns",
        "exec",
        host,
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
    ]
    command += [
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={NET}.1:29411",
        "--rdzv-id=job",
    ]
    # Which host keeps the rendezvous is said, for names of hosts tell nothing inside a namespace.
    command += [
        f"--rdzv-conf=is_host={int(number == 1)}",
        f"--local-addr={NET}.{number}",
        "-m",
        "sftx",
        "train",
        str(path),
    ]
    environment = {
        **ranks.ENVIRONMENT,
        "GLOO_SOCKET_IFNAME": "eth0",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15",
    }
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_job_on_two_hosts_survives_the_loss_of_one(hosts: list[str], tmp_path: Path) -> None:
    model = ranks.model(tmp_path / "model")
    changes = {"checkpoint": {"every": 5}, "runtime": {"parallel": "fsdp", "rank_timeout": 20}}
    ranks.run(ranks.write_run(tmp_path, model, "one"), 0)
    path = ranks.write_run(tmp_path, model, "two", **changes)

    jobs = [start(host, i, path) for i, host in enumerate(hosts, 1)]
    deadline = time.monotonic() + 150
    while not list((tmp_path / "two" / "checkpoints").glob("step-*/MANIFEST.json")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert jobs[0].poll() is None, jobs[0].communicate()[0]
        time.sleep(0.05)
    os.killpg(jobs[1].pid, signal.SIGKILL)  # the second host is gone
    assert jobs[0].wait(timeout=120) != 0, (
        "the first host must not wait for ever, nor call this a success"
    )
    assert ranks.facts(tmp_path / "two")["status"] != "finished"

    jobs = [start(host, i, path) for i, host in enumerate(hosts, 1)]
    outputs = [job.communicate(timeout=150)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert "resume   after step" in outputs[0], outputs[0]
    assert ranks.facts(tmp_path / "two")["status"] == "finished"
    assert [record["step"] for record in ranks.records(tmp_path / "two")] == list(range(1, 21))
    assert ranks.difference(tmp_path / "two", tmp_path / "one") < 1e-6
