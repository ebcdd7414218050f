"""What `gpu.py` measures before it times anything: that this device computes the right numbers, and
without stalls.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 2,
}
LENGTHS = [5, 700, 2, 23, 300, 64, 129, 31]


def device() -> dict[str, Any]:
    """The device and the versions of what takes part."""
    import importlib.metadata as metadata

    import torch

    found: dict[str, Any] = {"cuda": torch.cuda.is_available(), "torch": torch.__version__}
    if found["cuda"]:
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    for package in (
        "transformers",
        "peft",
        "trl",
        "flash-attn",
        "liger-kernel",
        "kernels",
        "triton",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def checks(scratch: Path, smoke: bool) -> dict[str, Any]:
    """Every check's figure, or what went wrong with it; each is tried whatever became of the
    others.

    Prints what is found so far after each, in case time runs out. `smoke` leaves out what takes
    minutes on a CPU.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read at the first product; see `deterministic`
    found: dict[str, Any] = {}
    work: dict[str, Callable[[], Any]] = {
        "attention_fp32": lambda: attention("float32", 0),
        "attention_bf16": lambda: attention("bfloat16", 0),
        "attention_bf16_window": lambda: attention("bfloat16", 50),
        "attention_bf16_unrepeated": unrepeated,
        "attention_bf16_softcap": lambda: attention("bfloat16", 0, softcap=20.0),
        "attention_bf16_shared": lambda: shared_attention("bfloat16"),
        "attention_fp32_shared": lambda: shared_attention("float32"),
        "attention_bf16_shared_window": lambda: shared_attention("bfloat16", window=50),
        "attention_bf16_shared_softcap": lambda: shared_attention("bfloat16", softcap=20.0),
        "shared_prefixes_llama_bf16": lambda: shared_prefixes("Llama"),
        "shared_prefixes_qwen3_bf16": lambda: shared_prefixes("Qwen3"),
        "shared_prefixes_gemma2_bf16": lambda: shared_prefixes("Gemma2"),
        "gradient_llama_fp32": lambda: gradient("Llama", "float32"),
        "gradient_llama_bf16": lambda: gradient("Llama", "bfloat16"),
        "gradient_qwen3_bf16": lambda: gradient("Qwen3", "bfloat16"),
        "gradient_gemma2_bf16": lambda: gradient("Gemma2", "bfloat16"),
        "no_host_sync": no_sync,
        "resume_is_bitwise": lambda: resume(scratch),
        "resume_is_bitwise_deterministic": lambda: deterministic(lambda: resume(scratch)),
        "compiled_gradient_fp32": lambda: gradient("Llama", "float32", compiled=True),
        "compiled_gradient_bf16": lambda: gradient("Qwen3", "bfloat16", compiled=True),
    }
    for name, check in work.items():
        if smoke and name.startswith(("compiled", "resume_is_bitwise_det")):
            continue
        began = time.perf_counter()
        try:
            found[name] = check()
        except Exception as error:  # each must leave its word, whatever it is
            found[name] = f"FAILED {type(error).__name__}: {str(error)[:400]}"
        found[f"{name}_seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps(found), flush=True)
    return found


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention(dtype: str, window: int, softcap: float | None = None) -> dict[str, float]:
    """Largest relative error (L2) of output and gradients of segment attention against float64 on
    the CPU.
    """
    import torch

    from sftx.model.attention import segment_attention
    from sftx.model.cpu_attention import by_segment

    torch.manual_seed(0)
    where, tokens = _device(), sum(LENGTHS)
    cu_seqlens_cpu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    exact = [
        torch.randn(1, heads, tokens, 64).to(getattr(torch, dtype)).double() for heads in (4, 2, 2)
    ]
    grad = torch.randn(1, tokens, 4, 64).to(getattr(torch, dtype)).double()
    for x in exact:
        x.requires_grad_()
    ours = [x.detach().to(where, getattr(torch, dtype)).requires_grad_() for x in exact]
    out, _ = segment_attention(
        torch.nn.Module(),
        ours[0],
        ours[1],
        ours[2],
        None,
        scaling=0.1,
        sliding_window=window or None,
        softcap=softcap,
        cu_seq_lens_q=cu_seqlens_cpu.to(where),
        max_length_q=1024,
        cu_seqlens_cpu=cu_seqlens_cpu,
    )
    q, k, v = exact
    repeated = (k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    expected = by_segment(
        q, *repeated, None, cu_seqlens_cpu, 0.1, window, softcap or 0.0, 0.0
    ).transpose(1, 2)
    found = torch.autograd.grad(out, ours, grad.to(where, out.dtype))
    wanted = torch.autograd.grad(expected, exact, grad)
    pairs = zip(("out", "dq", "dk", "dv"), (out, *found), (expected, *wanted), strict=True)
    return {name: float((a.detach().cpu().double() - b).norm() / b.norm()) for name, a, b in pairs}


def _tree() -> Any:
    """A pack of two trees, 3 deep; every token that has one before it is a target."""
    import numpy as np

    from sftx.model.checks.sharing import tree_pack

    rng = np.random.RandomState(1)
    lengths = [700, 64, 1, 300, 129, 23, 31, 200]
    tokens = [rng.randint(3, 1024, length).astype(np.int32) for length in lengths]
    weights = [np.ones(length, np.float32) for length in lengths]
    weights[0][0] = weights[6][0] = 0.0
    return tree_pack(tokens, weights, [-1, 0, 0, 1, 3, 0, -1, 6])


def shared_attention(dtype: str, window: int = 0, softcap: float | None = None) -> dict[str, float]:
    """Largest relative error (L2) of output and gradients of attention over shared prefixes against
    blocks in float64 on the CPU; and milliseconds of a forward and backward pass on a device.
    """
    import torch

    from sftx.model.attention import segment_attention
    from sftx.model.pack_loss import to_tensors

    torch.manual_seed(0)
    where, half = _device(), getattr(torch, dtype)
    tokens = len(_tree().ids)
    drawn = [torch.randn(1, heads, tokens, 64).to(half) for heads in (4, 2, 2)]
    grad = torch.randn(1, tokens, 4, 64).to(half)
    results, seconds = [], 0.0
    out, found = grad, ()
    for device, kind in ((where, half), (torch.device("cpu"), torch.float64)):
        given = [x.to(device, kind).requires_grad_() for x in drawn]
        pack = to_tensors(_tree(), device)
        segments = pack.segments()
        for _ in range(3 if device.type == "cuda" else 1):  # the last one is timed
            began = time.perf_counter()
            out, _ = segment_attention(
                torch.nn.Module(),
                given[0],
                given[1],
                given[2],
                None,
                scaling=0.1,
                sliding_window=window or None,
                softcap=softcap,
                cu_seq_lens_q=segments["cu_seq_lens_q"],
                max_length_q=pack.longest,
                cu_seqlens_cpu=pack.cu_seqlens_cpu,
                prefix_index=segments["prefix_index"],
            )
            found = torch.autograd.grad(out, given, grad.to(device, out.dtype))
            if device.type == "cuda":
                torch.cuda.synchronize()
                seconds = time.perf_counter() - began
        results.append([out.detach(), *found])
    pairs = zip(("out", "dq", "dk", "dv"), *results, strict=True)
    errors = {name: float((a.cpu().double() - b).norm() / b.norm()) for name, a, b in pairs}
    return {**errors, "milliseconds": 1000 * seconds}


def shared_prefixes(family: str) -> dict[str, Any]:
    """Whether the start-up check lets the model share; and the relative L2 error of the gradient of a
    pack with shared prefixes against float64 on the CPU.
    """
    import torch

    from sftx.data.pack import probe_pack
    from sftx.model.checks.start import check_paths
    from sftx.model.pack_loss import PackLoss, Paths, to_tensors

    where = _device()
    model = _model(family)
    exact = PackLoss(copy.deepcopy(model).double())
    exact.take(Paths(shares_prefixes=True))
    reference = exact(to_tensors(_tree(), torch.device("cpu")))
    reference.backward()
    loss = PackLoss(model.to(where)).train()
    notes = check_paths(loss, probe_pack(_examples()), torch.bfloat16, 1400, 4096, share=True)
    if not loss.paths.shares_prefixes:
        return {"shares": False, "notes": notes}
    with torch.autocast(where.type, torch.bfloat16):
        value = loss(to_tensors(_tree(), where))
    value.backward()
    difference = norm = 0.0
    for ours, theirs in zip(loss.parameters(), exact.parameters(), strict=True):
        if theirs.grad is not None and ours.grad is not None:
            difference += float(((ours.grad.cpu().double() - theirs.grad) ** 2).sum())
            norm += float((theirs.grad**2).sum())
    return {
        "shares": True,
        "loss": abs(float(value.detach()) / float(reference.detach()) - 1),
        "gradient": math.sqrt(difference / norm),
    }


def unrepeated() -> dict[str, float]:
    """The same with fewer key heads as they are: torch 2.11 has no argument for them, but its
    kernel may take them.
    """
    from sftx.model import attention as ours

    repeat, ours._repeat_heads = ours._repeat_heads, lambda states, heads: states
    try:
        return attention("bfloat16", 0)
    finally:
        ours._repeat_heads = repeat


def _model(family: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    changes = {"sliding_window": 100} if family == "Gemma2" else {}
    config = getattr(transformers, f"{family}Config")(**SETTINGS, **changes)
    return transformers.AutoModelForCausalLM.from_config(config)


def _examples() -> list[Any]:
    import numpy as np

    from sftx.types import Example

    rng = np.random.RandomState(0)
    made = []
    for length in LENGTHS:
        weights = (rng.rand(length) < 0.5).astype(np.float32)
        weights[-1], weights[0] = 1.0, 0.0
        made.append(Example(rng.randint(3, 1024, length).astype(np.int32), weights))
    return made


def gradient(family: str, dtype: str, compiled: bool = False) -> dict[str, float]:
    """Relative L2 error of the packed gradient against float64 on the CPU, one example at a time,
    and of the loss.
    """
    import torch

    from sftx.data.pack import build_pack
    from sftx.model.compile import compile_layers
    from sftx.model.pack_loss import PackLoss, to_tensors
    from sftx.model.runtime import Machine

    where, data = _device(), _examples()
    model = _model(family)
    twin = copy.deepcopy(model).double()
    reference = torch.zeros((), dtype=torch.float64)
    for example in data:
        ids = torch.as_tensor(example.ids, dtype=torch.int64)[None]
        logits = twin(input_ids=ids, use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        reference = reference + (nll * torch.as_tensor(example.weights[1:]).double()).sum()
    reference.backward()
    loss = PackLoss(model.to(where)).train()
    pack, machine = build_pack(data), Machine(where, getattr(torch, dtype))
    if compiled:
        compile_layers(loss, pack, machine, "on")
    with machine.autocast():
        value = loss(to_tensors(pack, where))
    value.backward()
    difference = norm = 0.0
    for ours, theirs in zip(loss.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None and ours.grad is not None:
            difference += float(((ours.grad.cpu().double() - theirs.grad) ** 2).sum())
            norm += float((theirs.grad**2).sum())
    return {
        "loss": abs(float(value.detach()) / float(reference) - 1),
        "gradient": math.sqrt(difference / norm),
    }


def no_sync() -> str:
    """One ordinary step under CUDA's debug mode, which raises where the host would wait for the
    device.
    """
    import torch

    from sftx.data.pack import build_pack
    from sftx.model.pack_loss import PackLoss, to_tensors
    from sftx.training.step import train_step

    where = _device()
    loss = PackLoss(_model("Llama").to(where)).train()
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0, fused=True)
    half = (lambda: torch.autocast("cuda", torch.bfloat16)) if where.type == "cuda" else nullcontext
    packs = [to_tensors(build_pack(_examples()), where)]
    train_step(
        loss, optimizer, packs, 100.0, 1e-4, 1.0, half
    )  # the first step makes the optimizer's state
    if where.type != "cuda":
        return "not on CUDA: nothing to see"
    torch.cuda.set_sync_debug_mode("error")
    try:
        packs = [to_tensors(build_pack(_examples()), where)]
        result = train_step(loss, optimizer, packs, 100.0, 1e-4, 1.0, half)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none" if math.isfinite(result.read()[0]) else "the loss is not finite"


def resume(scratch: Path) -> str:
    """Six steps at once against three, a stop and three more: the weights' bytes.

    Where they differ, six steps once more tell whether it is the stop: flash attention adds up the
    gradients of its queries in any order, unless PyTorch is told to be deterministic.
    """
    import hashlib
    import shutil
    import signal

    import peers

    import sftx

    home = scratch / "resume"
    shutil.rmtree(home, ignore_errors=True)
    model = peers.folder("smoke", home / "models")
    data = peers.rows(24, peers.SHAPES["smoke"]["vocab_size"])

    def steps(name: str, stop_after: int) -> str:
        try:
            for record in sftx.steps(
                model=model,
                output=str(home / name),
                data={"rows": data, "cache": str(home / "cache")},
                batch={"examples_per_step": 8, "steps": 6},
                runtime={"progress": False, "tokens_per_pack": 1024},
            ):
                if record.step == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            return ""
        digest = hashlib.sha256()
        for file in sorted((home / name).glob("*.safetensors")):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    once = steps("once", 0)
    steps("twice", 3)
    again = steps("twice", 0)
    if once and once == again:
        return "equal"
    without = "equal" if steps("once more", 0) == once else "DIFFERENT too"
    return f"DIFFERENT: {once[:12]} and {again[:12]}; two runs without a stop are {without}"


def deterministic(check: Callable[[], str]) -> str:
    """The same where every kernel adds up in one order."""
    import torch

    torch.use_deterministic_algorithms(True)
    try:
        return check()
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    checks(Path(sys.argv[1]), smoke=False)
