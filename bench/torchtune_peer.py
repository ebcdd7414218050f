"""torchtune as a peer: like `peers.py`, a process that takes a job as JSON and prints a JSON line;
of another Python.

It runs torchtune's own recipe, `full_finetune_single_device` or `lora_finetune_single_device`, as
the wheel brings it, on what its configurations choose as a rule: rows padded to the longest of a
step, the chunked loss over every position, nothing recomputed or compiled. Examples per step, AdamW
(fused) and clipping are those of the other systems; rows come as token ids, and no model is saved
at the end. A step lasts from one report of the recipe to the next.

**Its bf16 is not that of the others**: weights, gradients and moments are all bf16, while the
others keep the weights that they train, and their moments, in fp32. That takes less memory, and
small updates are lost to rounding.
"""

from __future__ import annotations

import json
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

from peers import Clock, main

RECIPES = {
    "full": ("full_finetune_single_device.py", "FullFinetuneRecipeSingleDevice"),
    "lora": ("lora_finetune_single_device.py", "LoRAFinetuneRecipeSingleDevice"),
}


def run_torchtune(
    job: dict[str, Any], data: list[dict[str, list[int]]], clock: Clock
) -> dict[str, Any]:
    """The recipe of the job's method, over `data` once."""
    import torch

    torchtune: Any = import_module("torchtune")
    omegaconf: Any = import_module("omegaconf")
    torch.set_num_threads(job["threads"])
    file, name = RECIPES[job["method"]]
    settings = omegaconf.OmegaConf.create(configuration(job, data))
    # The folder of recipes is no package: torchtune itself starts them by path.
    recipe = runpy.run_path(str(Path(torchtune.__file__).parents[1] / "recipes" / file))[name](
        cfg=settings
    )
    recipe.setup(cfg=settings)
    recipe.save_checkpoint = lambda epoch: None  # only steps are measured
    recipe.train()
    log: Log = recipe._metric_logger
    clock.wall, clock.cpu = log.clock.wall, log.clock.cpu
    return {"loss": float(log.steps[0]["loss"]), "grad_norm": float(log.steps[0]["grad_norm"])}


def configuration(job: dict[str, Any], data: list[dict[str, list[int]]]) -> dict[str, Any]:
    """What the recipe is told, with the model in the job's folder.

    Raises ValueError for a family that torchtune 0.6.1 cannot build.
    """
    folder = Path(job["model"])
    model = json.loads((folder / "config.json").read_text())
    if model["model_type"] != "llama":
        raise ValueError(
            f"{folder}: torchtune 0.6.1 has no builder for {model['model_type']}; choose a Llama "
            "shape"
        )
    builder: dict[str, Any] = {"_component_": "torchtune.models.llama3_2.llama3_2"}
    if job["method"] == "lora":
        builder = {
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
        }
    builder |= {
        "vocab_size": model["vocab_size"],
        "num_layers": model["num_hidden_layers"],
        "num_heads": model["num_attention_heads"],
        "num_kv_heads": model["num_key_value_heads"],
        "embed_dim": model["hidden_size"],
        "intermediate_dim": model["intermediate_size"],
        "max_seq_len": model["max_position_embeddings"],
        "norm_eps": model["rms_norm_eps"],
        # 1: positions as they are
        "rope_base": model["rope_parameters"]["rope_theta"],
        "scale_factor": 1,
        "tie_word_embeddings": model["tie_word_embeddings"],
    }
    return {
        "model": builder,
        "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": model["pad_token_id"]},
        # One string: each id would be a node of the configuration otherwise.
        "dataset": {"_component_": "torchtune_peer.dataset", "rows": json.dumps(data)},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(folder),
            "checkpoint_files": sorted(path.name for path in folder.glob("*.safetensors")),
            "output_dir": job["output"],
            "model_type": "LLAMA3_2",
        },
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "weight_decay": 0.0,
            "lr": 1e-5,
        },
        "lr_scheduler": {"_component_": "torchtune_peer.constant"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {"_component_": "torchtune_peer.Log"},
        "batch_size": job["batch"],
        "gradient_accumulation_steps": 1,
        "shuffle": False,
        "clip_grad_norm": 1.0,
        "epochs": 1,
        "max_steps_per_epoch": None,
        "seed": 0,
        "device": "cpu",
        "dtype": job["precision"],
        "compile": False,
        "optimizer_in_bwd": False,
        "resume_from_checkpoint": False,
        "output_dir": job["output"],
    }


class Log:
    """Keeps what the recipe reports after each step, and the times between the reports."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.steps: list[dict[str, Any]] = []

    def log_config(self, config: Any) -> None:
        """Nothing to keep: the configuration is ours."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        """A step has ended."""
        self.clock.step()
        self.steps.append(payload)


def dataset(tokenizer: object, rows: str) -> list[dict[str, list[int]]]:
    """Rows, given as JSON, under torchtune's names."""
    return [{"tokens": row["input_ids"], "labels": row["labels"]} for row in json.loads(rows)]


def constant(optimizer: Any, num_training_steps: int, last_epoch: int) -> Any:
    """A learning rate that stays as it is; the LoRA recipe insists on a schedule."""
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, lambda step: 1.0, last_epoch)


if __name__ == "__main__":
    main(run_torchtune)
