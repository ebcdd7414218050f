"""Regular expressions of an adapter's configuration: those that would hang are refused in time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import sftx
from sftx.model import patterns

ENDLESS = r"([\w.]+)+!"
ROWS = [["What is one plus one?", "It is 2."]] * 4


def settings(folder: Path, **adapter: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "data": {"rows": ROWS, "cache": str(folder / "cache"), "workers": 0},
        "output": str(folder / "run"),
        "adapter": {"method": "lora", **adapter},
        "batch": {"steps": 1},
        "runtime": {"progress": False, "device": "cpu", "threads": 1, "tokens_per_pack": 512},
    }


def saved_adapter(folder: Path, **changes: Any) -> str:
    """An adapter of somebody else's, with changes to its configuration."""
    model = AutoModelForCausalLM.from_pretrained(tiny.folder(folder / "model"))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    get_peft_model(model, config).save_pretrained(str(folder / "adapter"))
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder / "adapter")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", ENDLESS),
        ("exclude_modules", ENDLESS),
        ("modules_to_save", [ENDLESS]),
        ("rank_pattern", {ENDLESS: 4}),
        ("alpha_pattern", {ENDLESS: 4}),
        ("target_modules", ".*.*.*.*.*.*.*.*.*.*.*.*!"),
    ],
)
def test_a_pattern_that_would_hang_is_refused(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    path = saved_adapter(tmp_path, **{name: value})
    began = time.monotonic()
    with pytest.raises(sftx.UserError) as caught:
        sftx.train(**settings(tmp_path, path=path))
    text = value if isinstance(value, str) else next(iter(value))
    assert f"adapter_config.json: {name}: {text!r} takes more than 1 s" in str(caught.value)
    assert time.monotonic() - began < 60


def test_a_pattern_in_the_settings_that_would_hang_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    tiny.folder(tmp_path / "model")
    with pytest.raises(sftx.UserError, match=r"adapter\.targets: target_modules: .* takes more"):
        sftx.train(**settings(tmp_path, targets=ENDLESS))
    with pytest.raises(sftx.UserError, match=r"adapter\.targets: .*'\(\(q' is no pattern: "):
        sftx.train(**settings(tmp_path, targets="((q"))


def test_patterns_as_people_write_them_work(tmp_path: Path) -> None:
    """As for models of texts and images: one long expression over all names."""
    pattern = (
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        r".*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:q_proj))"
    )
    path = saved_adapter(tmp_path, target_modules=pattern, rank_pattern={r"k_.*": 4})
    first = sftx.train(**settings(tmp_path, path=path))
    assert (first.folder / "adapter_model.safetensors").is_file()
    second = settings(tmp_path, targets=r".*\.(q|v)_proj", rank=2)
    second["output"] = str(tmp_path / "b")
    assert (sftx.train(**second).folder / "adapter_model.safetensors").is_file()


def test_names_cost_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.subprocess, "run", None)
    names = {"target_modules": ["q_proj", "a(b"], "modules_to_save": ["lm_head"], "bias": "none"}
    patterns.check_patterns("here", names, ["a.q_proj"])
    patterns.check_patterns("here", {"target_modules": "model.q_proj"}, ["a.q_proj"])
