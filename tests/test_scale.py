"""The recipes for clusters: as far as they can be checked without one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[1] / "examples" / "scale"
MODULE = "-m sftx train"


def test_slurm_starts_one_launcher_per_node_and_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sbatch")], check=True)
    text = (FOLDER / "slurm.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --ntasks-per-node=1" in text
    assert MODULE in text


def test_kubernetes_pods_find_the_first_of_them() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    words = " ".join(container["command"])
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["metadata"]["name"] == pod["subdomain"] == job["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert f"--nnodes={job['spec']['completions']} " in words
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']} " in words
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:" in words
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert MODULE in words


def test_skypilot_task_has_known_keys_and_valid_shell() -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yml").read_text(encoding="utf-8"))
    assert task.keys() <= {
        "name",
        "num_nodes",
        "resources",
        "file_mounts",
        "setup",
        "run",
        "envs",
        "workdir",
    }
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert MODULE in task["run"]


def test_ray_launches_the_same_command() -> None:
    made: dict = {"__name__": "ray_job"}
    exec(compile((FOLDER / "ray_job.py").read_text(encoding="utf-8"), "ray_job.py", "exec"), made)
    words = made["command"]("10.0.0.1:29400", ["run.yaml", "seed=1"])
    assert words[0] == "torchrun"
    assert "--rdzv-endpoint=10.0.0.1:29400" in words
    assert f"{MODULE} run.yaml seed=1" in " ".join(words)
