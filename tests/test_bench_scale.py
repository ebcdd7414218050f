"""`bench/scale.py` on rows of its own: what it counts is what the layouts must send."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.long
def test_counts_of_two_ranks(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [json.dumps([f"What is {i}?", "It is " + "!" * (7 * i % 50)]) for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    command = [
        sys.executable,
        str(BENCH / "scale.py"),
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "tokenizer"),
    ]
    command += [
        "--ranks",
        "2",
        "--examples-per-step",
        "32",
        "--traffic",
        "2",
        "--json",
        str(tmp_path / "scale.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "scale.json").read_text())
    strong, weak = figures["balance"]
    assert (strong["examples"], weak["examples"], len(strong["work"])) == (32, 32, 2)
    assert max(strong["work"]) < 0.05
    assert done.stdout.strip().split("\n")[-1] == f"scale imbalance={sum(strong['work']) / 2:.4f}"
    cells = {(c["layout"], c["method"], c["kind"]): c for c in figures["traffic"]}
    assert len(cells) == 8
    for (layout, method, _), cell in cells.items():
        if layout == "replicate":  # gradients once; loss and accuracy in float64
            assert cell["bytes"] == cell["least"] + 16
        else:  # of every pack: layers twice, the rest once, and the gradients
            assert cell["by"]["scatter"] == pytest.approx(
                cell["packs"] * cells["replicate", method, "weak"]["least"] / 2, abs=1
            )
            assert cell["bytes"] > cell["least"]
        assert cell["wire"] > 0.99 * cell["bytes"]
