"""The run folder, and `metrics.jsonl`: the one record that progress, reports and trackers read.

OUTPUT/run.json        what was run: settings, versions, data, fingerprints, status, final numbers
OUTPUT/metrics.jsonl   one line per optimiser step
OUTPUT/ledger.json     where every row went; dropped.jsonl lists those that were not trained on
OUTPUT/checkpoints/    states to continue from
OUTPUT/*               the trained model, a Hugging Face folder
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sftx.config import Config
from sftx.types import StepRecord, UserError, untrained

PACKAGES = ("sftx", "torch", "transformers", "peft", "tokenizers", "numpy")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that the file is either the old one or the new one, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class Run:
    """The folder of one run. Opening it does not change it; `start` does. With `writes` false nothing is written."""

    def __init__(self, config: Config, writes: bool = True) -> None:
        self.folder = Path(config.output)
        self.writes = writes
        self.config = config
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output: {self.folder} is a file; a folder is needed")
        path = self.folder / "run.json"
        self.facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def exists(self) -> bool:
        """Whether a run was started in this folder before."""
        return bool(self.facts)

    @property
    def finished(self) -> bool:
        """Whether that run reached its end."""
        return self.facts.get("status") == "finished"

    def start(self, step: int, **facts: Any) -> None:
        """Begin at `step`: write run.json, and drop metrics of steps that will be taken again."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "bad_steps.jsonl"):
                lines = [line for line in self._lines(name) if line["step"] <= step] if step else []
                if lines or name == "metrics.jsonl" or (self.folder / name).exists():
                    self._rewrite(name, lines)
        earlier = self.facts.get("started", []) if step else []
        self.facts = {
            "status": "running",
            "started": [*earlier, time.strftime("%Y-%m-%dT%H:%M:%S%z")],
            "config": self.config.model_dump(mode="json", exclude={"data": {"rows", "eval_rows"}}),
            "versions": _versions(),
        }
        self.update(**facts)

    def write(self, record: StepRecord) -> StepRecord:
        """Append one step to metrics.jsonl."""
        self._append("metrics.jsonl", asdict(record))
        return record

    def bad_step(self, step: int, loss: float, grad_norm: float, rows: list[str]) -> None:
        """Append a step whose loss or gradient was not finite, with the rows it was made of, to bad_steps.jsonl."""
        line = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": rows}
        self._append("bad_steps.jsonl", line)

    def update(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.facts.update(facts)
        if self.writes:
            write_json(self.folder / "run.json", self.facts)

    def write_evaluation(self, step: int, num_steps: int, numbers: dict[str, float]) -> None:
        """Put held-out numbers beside the record of `step`; step 0, of which nothing else is recorded, gets one."""
        if not self.writes:
            return
        lines = self.metrics()
        if step == 0 and not lines:
            lines = [asdict(untrained(num_steps))]
        for line in lines:
            if line["step"] == step:
                line["eval"] = numbers
        self._rewrite("metrics.jsonl", lines)

    def metrics(self) -> list[dict[str, Any]]:
        """The steps recorded so far; a half-written last line is left out."""
        return self._lines("metrics.jsonl")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines if line]

    def _rewrite(self, name: str, lines: list[dict[str, Any]]) -> None:
        write_text(self.folder / name, "".join(json.dumps(line) + "\n" for line in lines))

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if self.writes:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
