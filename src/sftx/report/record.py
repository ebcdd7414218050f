"""The run folder, and `metrics.jsonl`: the one record that progress, reports and trackers read.

OUTPUT/run.json        what was run: settings, versions, data, fingerprints, status, final numbers
OUTPUT/metrics.jsonl   one line per optimiser step
OUTPUT/samples.jsonl   the answers of each evaluation, one line each
OUTPUT/ledger.json     where every row went; dropped.jsonl lists those that were not trained on
OUTPUT/checkpoints/    states to continue from, each with the record up to its step
OUTPUT/report.html     the page on the run
OUTPUT/report.json     what the page needs of the data, kept by the run, which has read its rows:
                       `lengths` (edges and counts of a histogram), `weights` (tokens by weight, in
                       `weights_of` examples), `rows` by step: the first rows of each step that
                       stands out (place, tokens, targets, weight, begin of the text; `of` = all)
OUTPUT/.owner.*        which process owns the folder
OUTPUT/*               the trained model, a Hugging Face folder
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sftx.files import make_folder, no_link, sync, write_json, write_text
from sftx.report.facts import RunFacts, check_needed, read_facts
from sftx.settings.schema import Config
from sftx.types import StepRecord, UserError

METRICS = "metrics.jsonl"
RECORDS = (METRICS, "bad_steps.jsonl")
"""Files of one line per step, which a checkpoint carries up to its own."""
SAMPLES = "samples.jsonl"
"""The record of answers. A checkpoint does not carry it: what it holds of later steps is cut off."""
PACKAGES = ("sftx", "torch", "transformers", "peft", "tokenizers", "numpy")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class Run:
    """The folder of one run. Opening it does not change it; `start` does. With `writes` false
    nothing is written.
    """

    def __init__(self, config: Config, writes: bool = True) -> None:
        self.folder = Path(config.output)
        self.writes = writes
        self.config = config
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output: {self.folder} is a file; a folder is needed")
        self.facts = RunFacts.of_json(read_facts(self.folder / "run.json"))

    @property
    def exists(self) -> bool:
        """Whether a run was started in this folder before."""
        return self.facts != RunFacts()

    @property
    def finished(self) -> bool:
        """Whether that run reached its end."""
        return self.facts.status == "finished"

    def check(self) -> None:
        """UserError where the record of the run in this folder lacks what continuing it needs."""
        if self.exists:
            path = self.folder / "run.json"
            check_needed(read_facts(path), path)

    def start(self, step: int, carried: Mapping[str, str], facts: RunFacts) -> None:
        """Begin at `step`: write run.json, and make the records those that the checkpoint of `step`
        carries.
        """
        started: list[str] = []
        if step:
            started += self.facts.started
            facts = replace(facts, tracker_id=self.facts.tracker_id)
        started.append(time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        self.facts = facts
        if self.writes:
            make_folder(self.folder)
        self.update(  # first of all files: what has a run.json is known to be a run
            status="running",
            started=started,
            config=self.config.model_dump(mode="json", exclude={"data": {"rows", "eval_rows"}}),
            versions=_versions(),
        )
        if self.writes:
            self._begin_records(step, carried)

    def _begin_records(self, step: int, carried: Mapping[str, str]) -> None:
        """Make the files of one line per step those of the checkpoint of `step`."""
        for name in RECORDS:
            kept = carried.get(name, "")
            path = self.folder / name
            if kept or name == METRICS or path.exists():
                write_text(path, kept)
        if (self.folder / SAMPLES).exists():
            self._cut_samples(step + 1 if step else 0)

    def records(self) -> dict[str, str]:
        """The records so far, for a checkpoint to carry; what is returned is on the disk."""
        found: dict[str, str] = {}
        if not self.writes:
            return found
        for name in RECORDS:
            path = self.folder / name
            if path.exists():
                sync(path)
                found[name] = self._text(name)
        samples = self.folder / SAMPLES
        if samples.exists():
            sync(samples)
        return found

    def unlike(self, step: int, carried: Mapping[str, str]) -> list[str]:
        """In words, a line for each record that is not as the checkpoint of `step` carries it."""
        said: list[str] = []
        for name in RECORDS:
            kept = _steps(carried.get(name, ""))
            found = _steps(self._text(name))
            more = len(found) - len(kept)
            if found[: len(kept)] != kept:
                said.append(
                    f"{name} was damaged: it is again as the checkpoint of step {step:,} has it"
                )
            elif more > 0:
                said.append(
                    f"{name} is cut after step {step:,}: {more:,} lines of later steps come anew"
                )
        return said

    def unreadable(self) -> list[str]:
        """In words, what is missing in the record of a finished run; what can be read of it stays."""
        lines = self.metrics()
        expected = self.facts.ended_at or self.facts.num_steps
        found = {line["step"] for line in lines if line["step"] != 0}
        missing = expected - len(found)
        if not missing:
            return []
        if self.writes:
            self._rewrite(METRICS, lines)
        return [
            f"metrics.jsonl was damaged: {missing:,} of {expected:,} steps are lost from it, none "
            "from the model"
        ]

    def write(self, record: StepRecord) -> StepRecord:
        """Append one step to metrics.jsonl."""
        self._append(METRICS, asdict(record))
        return record

    def bad_step(self, step: int, loss: float, grad_norm: float, rows: list[str]) -> None:
        """Append a step that was not finite, with its rows, to bad_steps.jsonl."""
        line = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": rows}
        self._append("bad_steps.jsonl", line)

    def update(self, **facts: object) -> None:
        """Add facts to run.json."""
        self.facts = replace(self.facts, **facts)
        if self.writes:
            write_json(self.folder / "run.json", self.facts.to_json())

    def write_evaluation(self, step: int, num_steps: int, numbers: dict[str, float]) -> None:
        """Put held-out numbers beside the record of `step`; step 0 gets a record for them."""
        if not self.writes:
            return
        lines = self.metrics()
        if step == 0 and not lines:
            lines = [asdict(StepRecord(0, num_steps))]
        for line in lines:
            if line["step"] == step:
                line["eval"] = numbers
        self._rewrite(METRICS, lines)

    def write_samples(self, lines: list[dict[str, object]], again: bool) -> None:
        """Append the answers of a step to samples.jsonl; those of the same step that stand there
        are replaced where it is evaluated `again`.
        """
        if again and self.writes and lines:
            self._cut_samples(int(str(lines[0]["step"])))
        for line in lines:
            self._append(SAMPLES, line)

    def _cut_samples(self, step: int) -> None:
        """Take the answers at `step` and later out of samples.jsonl."""
        lines = _lines(self._text(SAMPLES))
        earlier = [line for line in lines if line["step"] < step]
        self._rewrite(SAMPLES, earlier)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """The numbers of all evaluations recorded so far, by step."""
        found: dict[int, dict[str, float]] = {}
        for line in self.metrics():
            if line.get("eval"):
                found[line["step"]] = line["eval"]
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """The steps recorded so far, without lines that cannot be read."""
        return read_lines(self.folder / METRICS)

    def _text(self, name: str) -> str:
        return _text_of(self.folder / name)

    def _rewrite(self, name: str, lines: list[dict[str, object]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(self.folder / name, text)

    def _append(self, name: str, line: dict[str, object]) -> None:
        if self.writes:
            with open(self.folder / name, "a", encoding="utf-8", opener=no_link) as file:
                file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a record of steps; none where there is no such file."""
    return _lines(_text_of(path))


def _text_of(path: Path) -> str:
    """What stands in a record; empty where there is no such file."""
    if not path.exists():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _steps(text: str) -> list[int]:
    return [line["step"] for line in _lines(text)]


def _lines(text: str) -> list[dict[str, Any]]:
    """The whole lines of a record; a power loss can leave it cut, or NULs in it."""
    found: list[dict[str, Any]] = []
    for line in text.split("\n")[:-1]:
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                found.append(value)
    return found
