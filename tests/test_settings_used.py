"""Every setting is used: runs of a tiny model read each of them, outside of the schema.

A setting that nobody reads would be ignored without a word. Writing all settings down (`run.json`)
does not count, nor does what the schema itself checks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import sftx
from sftx.model.shard import choose_layout
from sftx.settings.describe import section_of, settings
from sftx.settings.keywords import OptimSettings
from sftx.settings.schema import Config, Runtime, Section, Source
from sftx.training.signals import Diverged

SOURCE = Path(sftx.__file__).parent
EVERY_SETTING = {*settings(), *(f"source.{name}" for name in Source.model_fields)}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The dotted names of the settings that the code of sftx has read so far."""
    found: set[str] = set()
    prefixes: dict[type[Section], str] = {Config: "", Source: "source."}
    for name, field in Config.model_fields.items():
        if section := section_of(field):
            prefixes[section] = f"{name}."
    names = {section: {*section.model_fields} for section in prefixes}

    def recorded(self: Section, name: str) -> Any:
        if name in names.get(type(self), ()):
            file = Path(sys._getframe(1).f_code.co_filename)
            if SOURCE in file.parents and SOURCE / "settings" not in file.parents:
                found.add(prefixes[type(self)] + name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Section, "__getattribute__", recorded, raising=False)
    return found


def test_every_setting_is_read_by_a_run(read: set[str], tmp_path: Path) -> None:
    rows = [["What is one plus one?", "Two."], ["And one more?", "Three."]] * 4
    cache = str(tmp_path / "cache")
    base: dict[str, Any] = {
        "model": tiny.folder(tmp_path / "model"),
        "data": {"rows": rows, "eval_rows": rows, "cache": cache, "workers": 0},
        "batch": {"examples_per_step": 4, "epochs": 2},
        "eval": {"prompts": 2, "new_tokens": 2},
        "license": "mit",
        "license_link": "https://example.org",
        "checkpoint": {"every": 1},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }
    wsd: OptimSettings = {"schedule": "wsd"}
    sftx.train(**base, output=str(tmp_path / "adapter"), adapter="lora", optim=wsd)
    diverging: OptimSettings = {"learning_rate": 3e38, "max_grad_norm": 0.0, "max_bad_steps": 1}
    with pytest.raises(Diverged):
        sftx.train(**base, output=str(tmp_path / "all weights"), optim=diverging)
    # Read where there are several processes; tests/test_dist.py runs them in each layout.
    choose_layout(Runtime(), torch.device("cpu"), 1, 1)
    assert sorted(EVERY_SETTING - read) == []


def test_what_nobody_reads_is_found(read: set[str]) -> None:
    """Neither looking at a setting from outside nor writing all of them down counts."""
    config = sftx.make_config(model="m", data="d", output="o")
    assert config.seed == 0
    assert config.model_dump()["optim"]["eps"] == config.optim.eps
    assert read == set()
