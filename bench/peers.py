"""One trainer, one shape, a few optimiser steps: the process that `cpu.py` and `gpu.py` start and
measure.

Reads a job as JSON from its first argument and prints one JSON line. Every system gets the same
random weights, the same token ids, the same examples in every step and the same AdamW settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "stories260K": {
        "family": "Llama",
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 512,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "family": "Llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "family": "Qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "family": "Llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "family": "Llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "smoke": {
        "family": "Llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


RUNTIME = ("compile", "recompute", "parallel", "deterministic")
"""What a job says of `runtime`, where it says anything."""

# Logarithms of gpt2 token counts, mean and deviation: of the prompt (weight 0) and of the answer.
# Those of sft_mix are of 4,000 rows of a mixture of fourteen instruction sets, all turns of a row
# together.
LENGTHS = {"gsm8k": ((4.02, 0.38), (4.55, 0.42)), "sft_mix": ((4.08, 0.87), (3.39, 1.22))}


def rows(
    count: int, vocab_size: int, seed: int = 0, longest: int = 8192, kind: str = "gsm8k"
) -> list[dict[str, list[int]]]:
    """Token ids with labels (prompt masked), in lengths drawn from the log-normal fits of
    `LENGTHS[kind]`.
    """
    rng = np.random.RandomState(seed)
    made = []
    for _ in range(count):
        prompt, answer = (
            int(np.clip(np.exp(rng.normal(*fit)), 4, longest // 2)) for fit in LENGTHS[kind]
        )
        # A Zipf-like draw, so that ids repeat as they do in text.
        ids = [*(rng.zipf(1.3, prompt + answer - 1) % (vocab_size - 3) + 3).tolist(), 1]
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def folder(shape: str, where: Path, dtype: str = "float32") -> str:
    """A random model of that shape on disk, with a tokenizer of one word per id; made once."""
    target = where / shape
    if not (target / "done").exists():
        import torch
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        settings = dict(SHAPES[shape])
        family, size = settings.pop("family"), settings["vocab_size"]
        config = getattr(transformers, f"{family}Config")(
            **settings, dtype=dtype, eos_token_id=1, bos_token_id=0, pad_token_id=2
        )
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="t0", eos_token="t1", pad_token="t2"
        ).save_pretrained(target)
        (target / "done").touch()
    return str(target)


class Clock:
    """Wall and CPU seconds of every step, whatever runs the steps.

    With `syncs`, a step is only looked at where its number is in it, so that the device is not kept
    waiting in between: then there is one figure for each stretch, the mean of its steps.
    """

    def __init__(self, syncs: tuple[int, ...] = ()) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.syncs, self.count, self.before = syncs, 0, 0
        self._start()

    def mark(self) -> None:
        """A step begins."""
        if not self.syncs:
            self._start()

    def _start(self) -> None:
        _synchronize()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def step(self) -> None:
        """A step ends."""
        self.count += 1
        if self.syncs and self.count not in self.syncs:
            return
        _synchronize()
        steps, self.before = self.count - self.before, self.count
        self.wall.append((time.perf_counter() - self._wall) / steps)
        self.cpu.append((time.process_time() - self._cpu) / steps)
        self._start()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_sftx(
    job: dict[str, Any],
    data: list[dict[str, list[int]]],
    clock: Clock,
    profile: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """sftx as its users run it; `profile` gets that of the last step."""
    from gpu_profile import step_profile

    method = {"qlora": "lora"}.get(job["method"], job["method"])
    lora: dict[str, Any] = {}
    optim: dict[str, Any] = {"learning_rate": 1e-5, "schedule": "constant", "warmup": 0}
    if method == "bf16_stochastic":
        optim["weights"] = method
    elif method != "full":
        lora = {"adapter": {"method": method, "rank": 16, "alpha": 32}}
    if job["method"] == "qlora":
        lora["adapter"]["quantize"] = "nf4"
    runtime: dict[str, Any] = {
        "progress": False,
        "precision": job["precision"],
        "threads": job["threads"],
    }
    if job.get("tokens_per_pack"):
        runtime["tokens_per_pack"] = job["tokens_per_pack"]
    runtime |= {name: job[name] for name in RUNTIME if job.get(name)}
    lora["runtime"] = runtime
    records, stamps = [], []
    steps = _records(
        model=job["model"], output=job["output"],
        data={"rows": data, "cache": job["cache"], "max_length": job["length"]},
        batch={"examples_per_step": job["batch"], "steps": job["steps"], "shuffle": False},
        optim=optim, checkpoint={"resume": "never"}, **lora,
    )  # fmt: skip
    with nullcontext() if profile is None else step_profile(job["steps"], profile):
        for record in steps:
            records.append(record)
            stamps.append(time.process_time())
            if len(records) == job["steps"]:
                break  # the model is not saved: only steps are measured
    clock.wall = [record.seconds for record in records]
    # Records come one step late: between two of them lies the computation of the step after.
    clock.cpu = [stamps[1] - stamps[0], *np.diff(stamps[:-1]).tolist()] if len(stamps) > 2 else []
    facts = json.loads(Path(job["output"], "run.json").read_text())
    predicted = facts["predicted"]["memory"].get("peak")
    return {
        "loss": records[0].loss,
        "grad_norm": records[0].grad_norm,
        "predicted": predicted,
        "notes": facts["notes"],
    }


def _records(**sections: Any) -> Any:
    """The records of a run: on a GPU as `sftx.train` takes its steps, each read while the next one
    computes.
    """
    import torch

    import sftx

    if not torch.cuda.is_available():
        return sftx.steps(**sections)
    from sftx.settings.make import make_config
    from sftx.training import loop
    from sftx.training.control import Control, Steps

    config, control = make_config(**sections), Control(exact=False)
    return Steps(config, control, loop._run(config, None, control))


def _profiled(profile: dict[str, Any], last: int) -> Any:
    """A callback of transformers' Trainer that profiles step `last`."""
    from gpu_profile import profile as watched
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        stack = ExitStack()

        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == last - 1:
                self.stack.enter_context(watched(profile))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.stack.close()

    return Profile()


def run_hf(
    job: dict[str, Any],
    data: list[dict[str, list[int]]],
    clock: Clock,
    profile: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """TRL's SFTTrainer (padded, or with packing; with Unsloth's model too) or transformers' Trainer,
    gradient checkpointing off, fused AdamW; `profile` gets that of the last step.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    datasets = import_module("datasets")
    datasets.disable_progress_bars()
    cuda = torch.cuda.is_available()
    micro = job.get("micro_batch") or job["batch"]
    common: dict[str, Any] = {
        "output_dir": job["output"],
        "max_steps": job["steps"],
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job["batch"] // micro,
        "bf16": job["precision"] == "bf16",
        "use_cpu": not cuda,
        "report_to": "none",
        # A logged step waits for the device
        "logging_steps": 10**6 if clock.syncs else 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "gradient_checkpointing": bool(job.get("checkpointing")),
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        "torch_compile": job.get("compile") == "on",
        "use_liger_kernel": bool(job.get("liger")),
    }
    torch.set_num_threads(job["threads"])
    if job["system"] == "unsloth":
        model, tokenizer = _of_unsloth(job)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            job["model"],
            dtype=getattr(torch, job.get("dtype", "float32")),
            attn_implementation=job.get("attention", "sdpa"),
        )
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dataset = datasets.Dataset.from_list(data)
    peft_config = None
    if job["method"] == "lora" and job["system"] != "unsloth":
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    packing = job["system"] in ("trl-packing", "unsloth")
    if packing or job["system"].startswith("trl"):
        trl = import_module("trl")
        if (
            packing
        ):  # a pack holds several examples; as many packs per step as hold one step of the others
            common["per_device_train_batch_size"] = job.get("packs_per_batch", 1)
            common["gradient_accumulation_steps"] = job.get("pack_steps", 1)
        settings = trl.SFTConfig(
            **common,
            max_length=job["length"] if not packing else job["pack_length"],
            packing=packing,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=settings,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    else:
        from transformers import DataCollatorForSeq2Seq

        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        trainer = Trainer(
            model=model, args=TrainingArguments(**common), train_dataset=dataset,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )  # fmt: skip
    trainer.add_callback(Watch())
    if profile is not None:
        trainer.add_callback(_profiled(profile, job["steps"]))
    trainer.train()
    first = trainer.state.log_history[0]
    facts: dict[str, Any] = {"loss": first["loss"], "grad_norm": float(first["grad_norm"])}
    if packing:  # its steps hold packs, not the rows of the others' steps
        packed: Any = trainer.train_dataset
        packs = packed[: job["steps"] * common["gradient_accumulation_steps"]]
        facts["tokens"] = sum(map(len, packs["input_ids"])) / job["steps"]
        facts["targets"] = (
            sum(label >= 0 for labels in packs["labels"] for label in labels) / job["steps"]
        )
    return facts


def _of_unsloth(job: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer as Unsloth loads them, with its adapter; written from its documentation, not
    run where this was written: it takes a GPU.
    """
    import torch

    loader = import_module("unsloth").FastLanguageModel
    model, tokenizer = loader.from_pretrained(
        model_name=job["model"],
        max_seq_length=job["pack_length"],
        dtype=torch.bfloat16,
        load_in_4bit=False,
        full_finetuning=job["method"] == "full",
    )
    if job["method"] == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = loader.get_peft_model(
            model,
            r=16,
            lora_alpha=32,
            lora_dropout=0,
            target_modules=names,
            use_gradient_checkpointing="unsloth" if job.get("checkpointing") else False,
        )
    return model, tokenizer


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    run: Callable[..., dict[str, Any]] | None = None,
) -> None:
    """Run the job given as JSON, with `run` or what this file has for the job's system."""
    job = json.loads(sys.argv[1])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    vocab_size = SHAPES[job["shape"]]["vocab_size"]
    kind = job.get("rows", "gsm8k")
    data = (
        rows(job["batch"], vocab_size, longest=job["length"], kind=kind) * job["steps"]
    )  # the same in every step
    clock = Clock()
    facts = (run or (run_sftx if job["system"] == "sftx" else run_hf))(job, data, clock)
    peak = peak_memory()
    step = data[: job["batch"]]
    counts = {
        "tokens": sum(len(row["input_ids"]) for row in step),
        "targets": sum(label >= 0 for row in step for label in row["labels"]),
    }
    print(json.dumps({**counts, **facts, "wall": clock.wall, "cpu": clock.cpu, "peak": peak}))


if __name__ == "__main__":
    main()
