"""What a run finds in its folder and leaves there: strangers' files, earlier runs, damaged records,
a full disk.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
from safetensors.torch import load_file

import sftx
from sftx import distributed
from sftx.training import checkpoint, finish, memory_plan
from sftx.training.signals import SaveClock, StopFlag, listening

ROWS = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(12)]
TIMES = {"seconds", "seconds_left", "tokens_per_second", "memory"}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run here needs its memory predicted, which takes most of its time."""
    monkeypatch.setattr(memory_plan, "predict", unpredictable)


def unpredictable(*_: Any) -> None:
    raise RuntimeError("not predicted")


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    return sftx.train(**settings(model, tmp_path_factory.mktemp("whole") / "run")).folder


def settings(model: str, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of six steps; every setting may be replaced."""
    base: dict[str, Any] = {
        "model": model,
        "data": {"rows": ROWS, "cache": str(output.parent / "cache"), "workers": 0},
        "output": str(output),
        "batch": {"examples_per_step": 4, "steps": 6},
        "optim": {"learning_rate": 3e-3},
        "runtime": {"progress": False, "device": "cpu", "threads": 1, "tokens_per_pack": 512},
    }
    return tiny.merged(base, changes)


def killed(config: dict[str, Any], after: int) -> None:
    """Take the steps up to `after`, and no more."""
    for record in sftx.steps(**config):
        if record.step == after:
            return


def notes(folder: Path) -> list[str]:
    return json.loads((folder / "run.json").read_text())["notes"]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_equal(run: Path, whole: Path) -> None:
    assert numbers(run) == numbers(whole)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# Strangers' files.


def test_a_folder_with_files_of_others_is_refused_and_left_as_it_was(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("my project")
    monkeypatch.chdir(tmp_path)
    for output in (".", str(tmp_path)):
        with pytest.raises(sftx.UserError, match=r"output: .* holds README.md and no run of sftx"):
            sftx.train(**{**settings(model, tmp_path / "run"), "output": output})
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "my project"


def test_a_record_that_another_program_wrote_is_no_run(model: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"id": 7}')
    with pytest.raises(sftx.UserError, match=r"run\.json that sftx did not write"):
        sftx.train(**settings(model, tmp_path / "run"))
    assert (tmp_path / "run" / "run.json").read_text() == '{"id": 7}'


def test_an_empty_folder_and_what_a_killed_start_left_are_welcome(
    model: str, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in (".owner.lock", ".owner.json", "run.json.tmp"):
        (tmp_path / "run" / name).write_text("")
    assert_equal(sftx.train(**settings(model, tmp_path / "run")).folder, whole)


# Earlier runs.


def test_a_run_that_saved_nothing_is_begun_again_with_a_word(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(model, tmp_path / "run", runtime={"progress": True})
    killed(config, after=4)
    assert "starting over" not in capfd.readouterr().err
    sftx.train(**config)
    assert (
        "an earlier run stopped after step 4 and saved nothing: starting over"
        in capfd.readouterr().err
    )
    assert [line["step"] for line in numbers(tmp_path / "run")] == list(range(1, 7))


def test_a_run_whose_checkpoints_are_all_damaged_is_begun_again_with_a_word(
    model: str, whole: Path, tmp_path: Path
) -> None:
    config = settings(model, tmp_path / "run", checkpoint={"every": 3})
    killed(config, after=5)
    (tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    assert_equal(sftx.train(**config).folder, whole)
    said = (
        "an earlier run stopped after step 5 and left no checkpoint that can be used: starting over"
    )
    assert said in notes(tmp_path / "run")


# Saving by time.


def test_saving_by_time_is_the_default() -> None:
    section = sftx.Config.model_validate({"model": "m", "data": "d", "output": "o"}).checkpoint
    assert (section.every, section.minutes) == (0, 15)


@pytest.mark.parametrize("background", [False, True])
def test_a_save_by_time_changes_no_number(
    model: str, whole: Path, tmp_path: Path, background: bool
) -> None:
    config = settings(
        model, tmp_path / "run", checkpoint={"minutes": 1e-9, "keep": 9, "background": background}
    )
    result = sftx.train(**config)
    assert_equal(result.folder, whole)
    saved = sorted(path.name for path in (result.folder / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in range(1, 6)]


def test_a_killed_run_continues_from_what_was_saved_by_time(
    model: str, whole: Path, tmp_path: Path
) -> None:
    config = settings(model, tmp_path / "run", checkpoint={"minutes": 1e-9})
    killed(config, after=4)
    taken = [record.step for record in sftx.steps(**config)]
    assert taken[0] in (4, 5)
    assert_equal(tmp_path / "run", whole)


def test_a_clock_counts_from_the_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock, never = SaveClock(15), SaveClock(0)
    now[0] = 899
    assert not clock.due()
    now[0] = 900
    assert clock.due()
    clock.restart()
    assert not clock.due()
    now[0] = 1e9
    assert clock.due()
    assert not never.due()


def test_ranks_learn_of_a_save_and_of_a_signal_by_one_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def agree(number: int) -> int:  # the other rank's answer is the larger one
        asked.append(number)
        return max(number, other)

    monkeypatch.setattr(distributed, "all_reduce_max", agree)
    flag, other = StopFlag(), 0
    assert flag.or_save(False) == (False, False)
    assert flag.or_save(True) == (False, True)
    other = 1  # rank 0's clock
    assert flag.or_save(False) == (False, True)
    assert flag.signal is None
    other = 2 * signal.SIGTERM  # a signal somewhere; whoever stops saves
    assert flag.or_save(True)[0]
    assert flag.signal == signal.SIGTERM
    assert len(asked) == 4


def test_a_save_that_nobody_asked_for_does_not_end_a_run_on_a_full_disk(
    model: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checkpoint, "_shortage", checkpoint._no_room)
    result = sftx.train(**settings(model, tmp_path / "run", checkpoint={"minutes": 1e-9}))
    assert_equal(result.folder, whole)
    assert "warning: nothing was saved after step 1: " in capfd.readouterr().err
    with pytest.raises(sftx.UserError, match=r"cannot be written: .* needed, .* free"):
        sftx.train(**settings(model, tmp_path / "asked", checkpoint={"every": 2, "minutes": 1e-9}))


# Damaged records.

DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "zeros at the end": lambda content: content[: len(content) // 2] + bytes(len(content) // 2),
    "gone": lambda _: None,
}


def damage(path: Path, how: str) -> None:
    content = DAMAGE[how](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_record_is_rebuilt_from_the_checkpoint_with_a_line(
    model: str, whole: Path, tmp_path: Path, how: str
) -> None:
    config = settings(model, tmp_path / "run", checkpoint={"every": 4})
    killed(config, after=5)
    damage(tmp_path / "run" / "metrics.jsonl", how)
    sftx.train(**config)
    assert_equal(tmp_path / "run", whole)
    assert "metrics.jsonl was damaged: it is again as the checkpoint of step 4 has it" in notes(
        tmp_path / "run"
    )


def test_steps_that_are_taken_again_are_cut_from_the_record_with_a_line(
    model: str, tmp_path: Path
) -> None:
    config = settings(model, tmp_path / "run", checkpoint={"every": 3})
    killed(config, after=5)
    sftx.train(**config)
    assert "metrics.jsonl is cut after step 3: 2 lines of later steps come anew" in notes(
        tmp_path / "run"
    )


def test_a_record_that_is_as_the_checkpoint_has_it_needs_no_line(
    model: str, tmp_path: Path
) -> None:
    config = settings(model, tmp_path / "run", checkpoint={"every": 3})
    killed(config, after=3)
    sftx.train(**config)
    assert not [note for note in notes(tmp_path / "run") if ".json" in note]


@pytest.mark.parametrize("how", ["cut", "zeros"])
def test_damaged_records_of_a_finished_run_are_named_and_made_readable(
    model: str, whole: Path, tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = settings(model, tmp_path / "run", runtime={"progress": True})
    run = sftx.train(**config).folder
    ledger = (run / "ledger.json").read_bytes()
    damage(run / "metrics.jsonl", how)
    damage(run / "ledger.json", how)
    capfd.readouterr()
    assert list(sftx.steps(**config)) == []
    said = capfd.readouterr().err
    lost = {"cut": 3, "zeros": 6}[how]
    assert (
        f"metrics.jsonl was damaged: {lost} of 6 steps are lost from it, none from the model"
        in said
    )
    assert "ledger.json did not hold what this data gives" in said
    assert (run / "ledger.json").read_bytes() == ledger
    assert numbers(run) == numbers(whole)[: 6 - lost]


def test_bad_steps_in_a_row_are_counted_across_a_stop(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two before it and two after it are four in a row, whatever became of the record."""
    config = settings(
        model,
        tmp_path / "run",
        optim={"learning_rate": 3e38, "max_bad_steps": 3},
        checkpoint={"every": 1},
    )
    killed(config, after=4)  # the first step goes through; its update is far too large
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        sftx.train(**config)
    assert "4 steps in a row, up to step 5" in ended.value.message  # pyright: ignore[reportAttributeAccessIssue]


# A full disk.


def full(monkeypatch: pytest.MonkeyPatch, free: int = 1000) -> None:
    monkeypatch.setattr(checkpoint, "_free", lambda folder: free)


def test_room_for_the_model_is_asked_for_before_the_first_step(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch)
    with pytest.raises(
        sftx.UserError, match=r"no room for the trained model: 0.1 MiB needed, 0.0 MiB free"
    ):
        sftx.train(**settings(model, tmp_path / "run"))
    assert not numbers(tmp_path / "run")
    monkeypatch.setattr(
        checkpoint, "_free", lambda folder: 90_000
    )  # enough for the adapter, and not for a merged model
    sftx.train(**settings(model, tmp_path / "lora", adapter={"method": "lora", "rank": 1}))
    with pytest.raises(sftx.UserError, match="no room for the trained model"):
        sftx.train(
            **settings(
                model, tmp_path / "merged", adapter={"method": "lora", "rank": 1, "merge": True}
            )
        )


def test_where_no_model_can_be_written_the_state_is_kept(
    model: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model, tmp_path / "run")

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(finish, "save_model", fails)
        with pytest.raises(
            sftx.UserError, match=r"No space left.*the state after the last step is saved"
        ):
            sftx.train(**config)
    assert list(sftx.steps(**config)) == []
    assert_equal(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("every", "told"), [(4, "the newest checkpoint is that of step 4"), (0, "no checkpoint")]
)
def test_where_nothing_can_be_written_at_the_end_the_last_checkpoint_is_named(
    model: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, told: str
) -> None:
    config = settings(model, tmp_path / "run", checkpoint={"every": every})

    def full_after(step: int) -> None:
        for record in sftx.steps(**config):
            if record.step == step:
                full(monkeypatch)

    with pytest.raises(sftx.UserError, match=rf"needed.*free\); .*{told}"):
        full_after(5)
    full(monkeypatch, 1 << 40)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    sftx.train(**config)
    assert_equal(tmp_path / "run", whole)


# Ctrl-C.


def test_the_first_interrupt_is_answered_at_once_and_the_second_quits(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert "stopping after this step; again = quit without saving" in capfd.readouterr().err
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# What differs from step to step.


@pytest.mark.parametrize("noise", ["dropout", "neftune"])
def test_every_step_draws_noise_of_its_own(model: str, tmp_path: Path, noise: str) -> None:
    """Equal rows in equal order and equal weights in every step: only what is drawn can make the
    losses differ.
    """
    fixed = {
        "batch": {"examples_per_step": 12, "steps": 3, "shuffle": False},
        "optim": {"learning_rate": 1e-30, "schedule": "constant"},
    }
    if noise == "neftune":
        config = settings(model, tmp_path / "run", **fixed, loss={"neftune_alpha": 5.0})
    else:
        lora = {
            "method": "lora",
            "rank": 4,
            "dropout": 0.5,
        }  # begins at 0, where dropout changes nothing
        begun = sftx.train(
            **settings(model, tmp_path / "begun", adapter=lora, optim={"learning_rate": 1e-2})
        )
        assert load_file(begun.folder / "adapter_model.safetensors")
        config = settings(
            model, tmp_path / "run", **fixed, adapter={"method": "lora", "path": str(begun.folder)}
        )
    sftx.train(**config)
    losses = [line["loss"] for line in numbers(tmp_path / "run")]
    assert min(abs(a - b) for a, b in zip(losses, [*losses[1:], losses[0]], strict=True)) > 1e-4, (
        losses
    )


@pytest.mark.slow
def test_two_ranks_save_by_time_after_the_same_steps_and_change_no_number(tmp_path: Path) -> None:
    path = ranks.model(tmp_path / "model")
    ranks.run(ranks.write_run(tmp_path, path, "plain", checkpoint={"minutes": 0}), 2)
    ranks.run(ranks.write_run(tmp_path, path, "saved", checkpoint={"minutes": 1e-9, "keep": 99}), 2)
    assert ranks.difference(tmp_path / "plain", tmp_path / "saved") == 0
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "saved")
    saved = sorted(path.name for path in (tmp_path / "saved" / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in range(1, 20)]
