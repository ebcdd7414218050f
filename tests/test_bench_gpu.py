"""`bench/gpu.py` in smoke mode: every part of it runs, on a CPU and a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.slow
def test_smoke_run(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), "--smoke", "--minutes", "4", "--only", "sftx"]
    command += ["--json", str(tmp_path / "gpu.json"), "--scratch", str(tmp_path / "scratch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    checks = figures["checks"]
    assert not [value for value in checks.values() if "FAILED" in str(value)]
    assert checks["resume_is_bitwise"] == "equal"
    assert checks["gradient_llama_fp32"]["gradient"] < 1e-6
    assert max(checks["attention_fp32"].values()) < 1e-6
    cells = {cell["name"]: cell for cell in figures["cells"]}
    if find_spec("bitsandbytes") is None:
        assert "needs bitsandbytes" in cells.pop("smoke/qlora/512/sftx-fsdp")["failed"][0]["error"]
    assert {
        "smoke/full/512/sftx",
        "smoke/lora/512/sftx",
        "smoke/lora/512/sftx-fsdp",
        "smoke/dora/512/sftx-fsdp",
    } <= {*cells}
    assert not [cell["failed"] for cell in cells.values() if cell["failed"]]
    assert all(cell["tokens_per_second"] > 0 < cell["predicted"] for cell in cells.values())
    losses = [cells[f"smoke/lora/512/{system}"]["loss"] for system in ("sftx", "sftx-fsdp")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert done.stdout.strip().split("\n")[-1].startswith("gpu smoke=")


def test_flops_follow_the_formula() -> None:
    """6 per weight and token, less for LoRA, and half of the square of every segment's length in
    attention.
    """
    code = (
        "import gpu, json; base = dict(shape='smoke', tokens=100, targets=40, squares=3000)\n"
        "print(json.dumps([gpu.flops({**base, 'method': m}) for m in ('full', 'lora')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCH, check=True
    )
    body, head = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 64 * 1024
    rank16 = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    attention = 6 * 2 * 64 * 3000
    full = 6 * body * 100 + 6 * head * 40 + attention
    lora = 4 * body * 100 + 4 * head * 40 + attention + 6 * rank16 * 100
    assert json.loads(done.stdout) == [full, lora]
