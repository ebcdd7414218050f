"""The CPU benchmarks: rows of the stated lengths, one small case of the growth table, the summary line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.parametrize(("kind", "prompt", "answer"), [("gsm8k", 56, 95), ("sft_mix", 59, 30)])
def test_rows_have_the_lengths_of_their_kind(kind: str, prompt: int, answer: int) -> None:
    from peers import rows

    made = rows(2000, 1000, kind=kind)
    masked = [row["labels"].count(-100) for row in made]
    assert np.median(masked) == pytest.approx(prompt, rel=0.1)
    assert np.median([len(row["labels"]) for row in made] - np.array(masked)) == pytest.approx(answer, rel=0.1)
    assert all(len(row["input_ids"]) == len(row["labels"]) and max(row["input_ids"]) < 1000 for row in made)


def test_both_sides_of_the_growth_table_compute_the_same_loss() -> None:
    from growth import compare

    ours, theirs, tokens = compare(64, 300, 1)  # compares the losses itself
    assert tokens == 128
    assert ours > 0
    assert theirs > 0


def test_the_last_line_names_every_precision_of_the_first_case() -> None:
    from cpu import last_line

    def case(shape: str, precision: str, speed: float) -> dict[str, object]:
        summary = {"speed": speed, "matmul": speed / 10, "memory": 0.5}
        return {"shape": shape, "rows": "gsm8k", "method": "full", "precision": precision, "summary": summary}

    figures = [case("a", "bf16", 5.6), case("a", "fp32", 5.31), case("b", "fp32", 1.0)]
    assert last_line(figures) == "speedup bf16=5.60 fp32=5.31 matmul_share=0.53 memory=0.50"
