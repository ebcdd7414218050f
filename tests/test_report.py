"""The report of a run: what its data are, when it is written, and that it never stops a run."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import sftx
from sftx.cli import main
from sftx.data.dataset import load_corpora
from sftx.data.plan import plan_of
from sftx.data.tokenizer import Tokenizer
from sftx.report import live
from sftx.report.histograms import lengths_of, weights_of
from sftx.report.run_data import BUCKETS, Spike, spikes
from sftx.report.run_page import write_report
from sftx.report.shell import as_json, page
from sftx.settings.load import load_config
from sftx.training.result import Result
from sftx.training.signals import Diverged


def report(*folders: Path) -> dict[str, Any]:
    """The data of the page on these runs."""
    file = folders[0].parent / "page.html"
    write_report(folders, file)
    return pages.data_of(file.read_text(encoding="utf-8"))


def train(tmp_path: Path, name: str = "run", **sections: Any) -> Result:
    """A run of six steps with held-out rows."""
    if not (tmp_path / "model").exists():
        tiny.folder(tmp_path / "model")
    rows = tiny.pairs(24)
    data = {"rows": rows[4:], "eval_rows": rows[:4], "workers": 0, "cache": str(tmp_path / "cache")}
    settings: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "data": data,
        "output": str(tmp_path / name),
        "batch": {"examples_per_step": 4, "steps": 6},
        "eval": {"every": 2},
    }
    runtime = {"progress": False, "device": "cpu", "threads": 1, **sections.pop("runtime", {})}
    settings |= {"runtime": runtime, **sections}
    return sftx.train(**settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(tmp_path_factory.mktemp("trained"))


# --- a run and its page ---------------------------------------------------------------------------


def test_the_page_of_a_run_holds_its_record(trained: Result) -> None:
    data = pages.data_of((trained.folder / "report.html").read_text(encoding="utf-8"))
    (run,) = data["runs"]
    metrics, steps = trained.metrics, trained.metrics[1:]
    assert run["facts"]["status"] == "finished"
    assert run["series"]["loss"]["steps"] == [record.step for record in steps] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory", "targets"):
        expected = [getattr(record, name) for record in steps]
        assert run["series"][name]["values"] == pytest.approx(expected, rel=1e-5)
    rates = [record.targets / record.seconds for record in steps]
    assert run["series"]["targets_per_second"]["values"] == pytest.approx(rates, rel=1e-5)
    held = {record.step: record.eval["loss"] for record in metrics if record.eval}
    assert run["held"]["loss"]["steps"] == [*held] == [0, 2, 4, 6]
    assert run["held"]["loss"]["values"] == pytest.approx([*held.values()], rel=1e-5)
    assert run["evaluations"] == {
        "before training": trained.eval_before,
        "after step 6": trained.eval_after,
    }
    assert run["ledger"] == json.loads((trained.folder / "ledger.json").read_text())
    assert run["settings"]["batch.examples_per_step"] == 4
    assert sum(run["noted"]["lengths"]["counts"]) == run["ledger"]["all"]["examples"] == 20
    assert sum(each["tokens"] for each in run["noted"]["weights"]) == run["ledger"]["all"]["tokens"]
    card = (trained.folder / "README.md").read_text(encoding="utf-8")
    assert "report.html" in card


def test_a_page_written_later_is_the_same(trained: Result, tmp_path: Path) -> None:
    file = tmp_path / "later.html"
    assert main(["report", str(trained.folder), f"to={file}"]) == 0
    own, later = (
        pages.data_of(path.read_text(encoding="utf-8"))["runs"]
        for path in (trained.folder / "report.html", file)
    )
    assert own == later


def test_the_page_is_written_at_evaluations_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def noted(folders: list[Path], file: Path) -> None:
        write_report(folders, file)
        (run,) = pages.data_of(file.read_text(encoding="utf-8"))["runs"]
        seen.append(run["steps"])

    monkeypatch.setattr(live, "write_report", noted)
    monkeypatch.setattr(live, "SHARE", math.inf)
    train(tmp_path)
    assert seen == [1, 2, 4, 6]


def test_pages_cost_a_hundredth_of_the_run_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With evaluations every two seconds and pages of a tenth, one page in ten seconds is written."""
    now, written = [0.0], []

    def slow(folders: list[Path], file: Path) -> None:
        written.append(now[0])
        now[0] += 0.1

    monkeypatch.setattr(live, "write_report", slow)
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    control = sftx.steps(**_as_settings(tmp_path))
    for _ in control:
        now[0] += 2.0
    assert len(written) == 5
    assert all(late - early >= 10 for early, late in pairwise(written[:-1]))


def _as_settings(tmp_path: Path) -> dict[str, Any]:
    tiny.folder(tmp_path / "model")
    rows, cache = tiny.pairs(8), str(tmp_path / "cache")
    return {
        "model": str(tmp_path / "model"),
        "data": {"rows": rows, "eval_rows": rows[:2], "workers": 0, "cache": cache},
        "output": str(tmp_path / "run"),
        "batch": {"examples_per_step": 2, "steps": 20},
        "eval": {"every": 1},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }


def test_a_page_that_cannot_be_written_stops_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folders: list[Path], file: Path) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(live, "write_report", full)
    monkeypatch.setattr(live, "SHARE", math.inf)
    result = train(tmp_path, runtime={"progress": True})
    assert result.steps == 6
    assert (result.folder / "model.safetensors").exists()
    said = capfd.readouterr().err
    assert said.count("warning  the report of the run is not written: [Errno 28] No space") == 1


def test_without_a_report_there_is_none(tmp_path: Path) -> None:
    result = train(tmp_path, runtime={"report": False})
    assert not {"report.html", "report.json"} & {path.name for path in result.folder.iterdir()}
    assert "report.html" not in (result.folder / "README.md").read_text(encoding="utf-8")
    (run,) = report(result.folder)["runs"]
    assert run["noted"] is None
    assert len(run["series"]["loss"]["values"]) == 6


def test_a_run_that_diverges_has_a_page_with_the_rows_of_its_bad_steps(tmp_path: Path) -> None:
    optim = {"learning_rate": 3e38, "max_grad_norm": 0.0, "max_bad_steps": 1}
    with pytest.raises(Diverged):
        train(tmp_path, optim=optim)
    folder = tmp_path / "run"
    (run,) = pages.data_of((folder / "report.html").read_text(encoding="utf-8"))["runs"]
    assert run["facts"]["status"] == "diverged"
    bad = [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]
    assert [spike["step"] for spike in run["spikes"]] == [line["step"] for line in bad]
    for line in bad:
        rows = run["noted"]["rows"][str(line["step"])]
        assert [row["place"] for row in rows["rows"]] == line["rows"]
        assert rows["of"] == len(line["rows"])


def test_the_rows_of_a_spike_are_those_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "spikes", lambda folder, steps: [Spike(3, "stands out")])
    train(tmp_path)
    noted = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert noted["rows"].keys() == {"3"}
    config = load_config(str(tmp_path / "run" / "config.yaml"))
    tokenizer = Tokenizer.of(tiny.tokenizer())
    corpus, _ = load_corpora(config, tokenizer, 256)
    chosen = plan_of(corpus, config).examples(2)
    rows = noted["rows"]["3"]["rows"]
    assert [row["tokens"] for row in rows] == corpus.lengths[chosen].tolist()
    assert [row["targets"] for row in rows] == corpus.targets[chosen].tolist()
    for row, index in zip(rows, chosen, strict=True):
        assert tokenizer.decode(corpus.example(int(index)).ids.tolist()).startswith(row["text"])


# --- spikes ---------------------------------------------------------------------------------------


def found(folder: Path, losses: Sequence[float | None], norms: Sequence[float] = ()) -> list[int]:
    """The steps that stand out in a run with these losses."""
    lines = [pages.record(step, loss) for step, loss in enumerate(losses, 1)]
    for line, norm in zip(lines, norms, strict=False):
        line["grad_norm"] = norm
    return [spike.step for spike in spikes(folder, lines)]


def test_spikes_stand_out_and_noise_does_not(tmp_path: Path) -> None:
    rng = random.Random(0)
    falling = [5 * 0.99**step + rng.gauss(2, 0.05) for step in range(400)]
    norms = [abs(rng.gauss(1, 0.2)) + 0.1 for _ in range(400)]
    assert found(tmp_path, falling, norms) == []
    falling[200] = 7.0
    norms[300] = 30.0
    assert found(tmp_path, falling, norms) == [201, 301]
    assert found(tmp_path, [1.0] * 100) == []
    assert found(tmp_path, [1.0] * 60 + [1.05] + [1.0] * 20) == []
    assert found(tmp_path, [1.0] * 60 + [None] + [1.3]) == [62]
    assert found(tmp_path, [1.0, 9.0]) == []


def test_the_largest_spikes_are_kept(tmp_path: Path) -> None:
    losses: list[float | None] = [1.0] * 2000
    for place in range(100, 2000, 50):
        losses[place] = 2.0 + place / 1000
    assert found(tmp_path, losses) == list(range(1001, 2000, 50))


# --- a long run -----------------------------------------------------------------------------------


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    rng, count = random.Random(0), 20_000
    losses = [2 + rng.random() for _ in range(count)]
    losses[17_777], losses[3_333] = 9.5, 0.5
    lines = [pages.record(step, loss) for step, loss in enumerate(losses, 1)]
    pages.write_lines(run / "metrics.jsonl", lines)
    (shown,) = report(run)["runs"]
    assert (tmp_path / "page.html").stat().st_size < 1_000_000
    assert shown["steps"] == count
    loss = shown["series"]["loss"]
    assert loss["of"] == count
    assert len(loss["steps"]) == len(loss["values"]) <= 2 * BUCKETS
    assert loss["steps"] == sorted(set(loss["steps"]))
    points = dict(zip(loss["steps"], loss["values"], strict=True))
    assert points[17_778] == 9.5
    assert points[3_334] == 0.5
    for step, value in points.items():
        assert value == pytest.approx(losses[step - 1], rel=1e-5)
    for begin in range(0, count, count // BUCKETS):
        span = losses[begin : begin + count // BUCKETS]
        here = [v for step, v in points.items() if begin < step <= begin + count // BUCKETS]
        assert [min(here), max(here)] == pytest.approx([min(span), max(span)], rel=1e-5)
    means = loss["means"]["values"]
    assert sum(means) / len(means) == pytest.approx(sum(losses) / count, rel=1e-5)


# --- runs of every kind ---------------------------------------------------------------------------


def test_a_run_of_an_older_version_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "old"
    run.mkdir()
    lines = [pages.record(step, 2.0) for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo', encoding="utf-8"
    )
    (shown,) = report(run)["runs"]
    assert shown["series"]["loss"]["values"] == [2.0, 2.0, 2.0]
    assert shown["series"]["accuracy"]["values"] == []
    assert (shown["held"], shown["evaluations"], shown["spikes"]) == ({}, {}, [])
    assert (shown["ledger"], shown["noted"], shown["dropped"]) == (None, None, [])
    assert shown["samples"] == {"steps": [], "evaluations": 0, "prompts": []}


def test_a_run_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "run.json").write_text('{"status": "running", "num_steps": 9}')
    (shown,) = report(run)["runs"]
    assert shown["steps"] == 0


def test_damaged_files_beside_the_record_are_left_out(tmp_path: Path) -> None:
    run = pages.folder(tmp_path / "run")
    for name in ("report.json", "ledger.json"):
        (run / name).write_text("{")
    (run / "dropped.jsonl").write_bytes(b'\xff\n{"file": "a", "line": 1, "reason": "b"}\n7\n')
    (shown,) = report(run)["runs"]
    assert (shown["noted"], shown["ledger"]) == (None, None)
    assert shown["dropped"] == [{"file": "a", "line": 1, "reason": "b"}]


def test_the_best_evaluation_stands_between_the_first_and_the_last(tmp_path: Path) -> None:
    (run,) = report(pages.folder(tmp_path / "run"))["runs"]
    losses = {when: numbers["loss"] for when, numbers in run["evaluations"].items()}
    assert losses == {"before training": 3.0, "best, step 40": 2.0, "after step 60": 1.5}


def test_answers_are_put_side_by_side(tmp_path: Path) -> None:
    run = pages.folder(tmp_path / "run")
    samples = [
        {"step": step, "prompt": f"p{i}", "output": f"{step} {i}" + "x" * 9000 * (i == 1)}
        for step in range(0, 200, 10)
        for i in range(40)
    ]
    pages.write_lines(run / "samples.jsonl", samples)
    (shown,) = report(run)["runs"]
    answers = shown["samples"]
    assert answers["evaluations"] == 20
    assert (answers["steps"][0], answers["steps"][-1], len(answers["steps"])) == (0, 190, 8)
    assert [prompt["prompt"] for prompt in answers["prompts"]] == [f"p{i}" for i in range(24)]
    assert answers["prompts"][5]["answers"]["190"]["output"] == "190 5"
    assert [*answers["prompts"][5]["answers"]] == [str(step) for step in answers["steps"]]
    assert answers["prompts"][1]["answers"]["0"]["output"].endswith("… and 5,003 more characters")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    first, second = pages.folder(tmp_path / "a" / "run"), pages.folder(tmp_path / "b" / "run")
    names = [run["name"] for run in report(first, second)["runs"]]
    assert names == [str(first), str(second)]


def test_what_is_no_run_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pages.folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "run.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ([], "name the output folder of one run or more"),
        (["absent"], "absent: there is no such folder; name the output folder of a run"),
        (["file"], "file: there is no such folder"),
        (["run", "empty"], "empty is not the folder of a run: it has neither run.json nor"),
        (["damaged"], "run.json: this record of a run is damaged"),
        (["run", "to=empty"], "to=empty: this is a folder; name a file in it"),
        (["run", "out=x"], "'out=x' means nothing here; it takes to=..."),
    ):
        before = {path for path in tmp_path.rglob("*") if path.name != "report.html"}
        assert main(["report", *arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said, said
        assert said.count("error:") == 1
        assert {path for path in tmp_path.rglob("*")} == before
    assert main(["report", "run", "run"]) == 0
    assert (run / "report.html").exists()
    assert main(["report", "run", "damaged", "to=x.html"]) == 2
    shutil.copytree(run, tmp_path / "script" / "sftx")
    assert main(["report", "run", "script"]) == 0
    assert len(pages.data_of((tmp_path / "report.html").read_text())["runs"]) == 2


# --- the shell ------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.sampled_from([pages.EVIL, "<!--<script>", "]]>", "\u2028"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("__proto__"), inner),
)  # fmt: skip


@given(VALUES)
def test_data_come_back_from_the_page_as_they_were(value: object) -> None:
    text = as_json(value)
    assert "<" not in text
    assert json.loads(text) == value


def test_what_json_and_files_cannot_hold(tmp_path: Path) -> None:
    assert json.loads(as_json({"a": [math.nan, math.inf, 1.5]})) == {"a": [None, None, 1.5]}
    text = page("half \ud800", "", {"a": "\udfff"}, "1;")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    assert "<title>half ?</title>" in text
    assert "&lt;b&gt;" in page("<b>", "", None, "1;")


# --- histograms -----------------------------------------------------------------------------------


def test_histograms_count_every_example() -> None:
    lengths = [3, 3, 9, 40, 41, 80, 80, 200]
    corpus = tiny.corpus(tiny.examples(lengths))
    spread = lengths_of(corpus)
    assert sum(spread["counts"]) == len(lengths)
    for (low, high), count in zip(pairwise(spread["edges"]), spread["counts"], strict=True):
        last = high == spread["edges"][-1]
        assert count == sum(low <= n < high or (last and n == high) for n in lengths)
    capped = lengths_of(corpus, 50)
    assert (capped["edges"][-1], sum(capped["counts"])) == (50, len(lengths))


def test_weights_are_counted_each_or_by_spans() -> None:
    few = tiny.examples([30, 50])
    for number, example in enumerate(few):
        example.weights[:] = np.array([0, 0.5, 1])[np.arange(len(example.ids)) % 3] * (number + 1)
    counts: Counter[float] = Counter()
    for example in few:
        counts.update(example.weights.tolist())
    assert weights_of(tiny.corpus(few)) == [
        {"weight": f"{weight:g}", "tokens": counts[weight]} for weight in (0, 0.5, 1, 2)
    ]
    many = tiny.examples([300, 500])
    spans = weights_of(tiny.corpus(many))
    zeros = sum(int((example.weights == 0).sum()) for example in many)
    assert spans[0] == {"weight": "0", "tokens": zeros}
    assert sum(span["tokens"] for span in spans) == 800
