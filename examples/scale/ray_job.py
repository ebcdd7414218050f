"""Two nodes of a Ray cluster run the same torchrun command: `ray job submit -- python ray_job.py
run.yaml`.
"""

import subprocess
import sys

NODES, GPUS = 2, 8


def command(endpoint: str, arguments: list[str]) -> list[str]:
    """What every node runs; the first node answers at `endpoint`."""
    return [
        "torchrun",
        f"--nnodes={NODES}",
        f"--nproc-per-node={GPUS}",
        "--rdzv-backend=c10d",
        "--rdzv-id=sftx",
        f"--rdzv-endpoint={endpoint}",
        "-m",
        "sftx",
        "train",
        *arguments,
    ]


def main(arguments: list[str]) -> None:
    """One launcher on each node, all of them at once or none."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init()
    group = placement_group([{"CPU": 1, "GPU": GPUS}] * NODES, strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def on(node: int) -> dict:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        return {"num_cpus": 1, "num_gpus": GPUS, "scheduling_strategy": strategy}

    address = ray.get(ray.remote(ray.util.get_node_ip_address).options(**on(0)).remote())
    launch = ray.remote(subprocess.check_call)
    ray.get(
        [
            launch.options(**on(node)).remote(command(f"{address}:29400", arguments))
            for node in range(NODES)
        ]
    )


if __name__ == "__main__":
    main(sys.argv[1:])
