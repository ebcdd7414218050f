"""The CPU benchmarks: rows of the stated lengths, one small case of the growth table, the summary
line, and what torchtune is told (it is not needed here).
"""

from __future__ import annotations

import json
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
    assert np.median([len(row["labels"]) for row in made] - np.array(masked)) == pytest.approx(
        answer, rel=0.1
    )
    assert all(
        len(row["input_ids"]) == len(row["labels"]) and max(row["input_ids"]) < 1000 for row in made
    )


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
        return {
            "shape": shape,
            "rows": "gsm8k",
            "method": "full",
            "precision": precision,
            "summary": summary,
        }

    figures = [case("a", "bf16", 5.6), case("a", "fp32", 5.31), case("b", "fp32", 1.0)]
    assert last_line(figures) == "speedup bf16=5.60 fp32=5.31 matmul_share=0.53 memory=0.50"


def test_torchtune_is_told_the_sizes_of_the_model_and_the_rows_of_the_others(
    tmp_path: Path,
) -> None:
    from peers import SHAPES, folder, rows
    from torchtune_peer import configuration, dataset

    size, data = SHAPES["smoke"], rows(2, 1024)
    job = {
        "model": folder("smoke", tmp_path),
        "method": "lora",
        "batch": 2,
        "precision": "bf16",
        "output": "run",
    }
    told = configuration(job, data)
    model = told["model"]
    assert [
        model[name]
        for name in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim")
    ] == [
        size["vocab_size"],
        size["num_hidden_layers"],
        size["num_attention_heads"],
        size["num_key_value_heads"],
        size["hidden_size"],
    ]
    assert (model["intermediate_dim"], model["tie_word_embeddings"], model["lora_rank"]) == (
        128,
        True,
        16,
    )
    assert told["checkpointer"]["checkpoint_files"] == ["model.safetensors"]
    assert [list(row.values()) for row in dataset(None, told["dataset"]["rows"])] == [
        list(r.values()) for r in data
    ]


def test_torchtune_without_a_builder_for_the_family_is_an_error_that_says_so(
    tmp_path: Path,
) -> None:
    from torchtune_peer import configuration

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ValueError, match="no builder for qwen3; choose a Llama shape"):
        configuration({"model": str(tmp_path), "method": "full"}, [])


def test_torchtune_without_its_own_python_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cpu

    monkeypatch.setattr("sys.argv", ["cpu.py", "--systems", "sftx", "torchtune"])
    monkeypatch.setattr(cpu, "measure", None)
    with pytest.raises(SystemExit) as stop:
        cpu.main()
    assert stop.value.code == 2
    assert "--torchtune-python" in capsys.readouterr().err
