"""Run folders from strangers: what their files name is a record; code runs and files are read only
where the caller says so. And run folders with a damaged record: one message that says what to do.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import sftx
from sftx.cli import main
from sftx.settings.keywords import AdapterSettings
from sftx.training.export import Allowed

ROWS = [[f"What is {i} plus one?", f"It is {i + 1}."] for i in range(8)]
SECRET = "the secret {{ 'of somebody' }}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and the runs `full` and `lora`, each finished and with a checkpoint after step 1."""
    home = tmp_path_factory.mktemp("home")
    path = tiny.folder(home / "model")
    adapters: dict[str, AdapterSettings] = {
        "full": {"method": "none"},
        "lora": {"method": "lora", "rank": 2},
    }
    for name, adapter in adapters.items():
        sftx.train(**settings(home, name), adapter=adapter, model=path)
    return home


def settings(home: Path, name: str) -> dict[str, Any]:
    return {
        "data": {"rows": ROWS, "cache": str(home / "cache"), "workers": 0},
        "output": str(home / name),
        "batch": {"examples_per_step": 4, "steps": 2},
        "checkpoint": {"every": 1},
        "runtime": {"progress": False, "device": "cpu", "threads": 1},
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection can be made; one that is tried fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def copied(home: Path, name: str, to: Path, **changes: Any) -> Path:
    """A copy of a run with other values in its run.json: `model__path="x"` is config.model.path."""
    folder = Path(shutil.copytree(home / name, to / name))
    facts = json.loads((folder / "run.json").read_text())
    for key, value in changes.items():
        section, _, field = key.partition("__")
        facts["config"][section][field] = value
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def plant_code(folder: Path, trace: Path) -> None:
    """Let the model in `folder` come with code that leaves a trace when it is imported."""
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((folder / name).read_text())
        names = {
            "AutoConfig": "evil.C",
            "AutoModelForCausalLM": "evil.M",
            "AutoTokenizer": ["evil.T", None],
        }
        (folder / name).write_text(
            json.dumps(told | {"auto_map": names, "model_type": "evil", "tokenizer_class": "T"})
        )
    (folder / "evil.py").write_text(
        f"open({str(trace)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM as M\n"
        "class C(LlamaConfig):\n    model_type = 'evil'\n"
    )


@pytest.mark.parametrize(
    ("name", "step"), [("full", ""), ("full", "1"), ("lora", ""), ("lora", "1")]
)
def test_trust_in_a_file_is_no_permission(
    name: str, step: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, evil = tmp_path / "EXECUTED", Path(shutil.copytree(home / "model", tmp_path / "evil"))
    folder = copied(home, name, tmp_path, model__path=str(evil), model__trust_remote_code=True)
    plant_code(folder if name == "full" and not step else evil, trace)
    arguments = [
        "export",
        str(folder),
        f"to={tmp_path / 'out'}",
        *([f"step={step}"] if step else []),
    ]
    assert main(arguments) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not trace.exists()
    assert not (tmp_path / "out").exists()
    try:
        main([*arguments, "trust_remote_code=true"])
    except BaseException as error:  # what the trap does after it has sprung
        print(error)
    assert trace.exists()


def test_only_true_and_false_are_trust(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(home / "full"), "trust_remote_code=yes"]) == 2
    assert "allowed: true, false" in capsys.readouterr().err
    assert Allowed() == Allowed(False)


@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
def test_the_other_verbs_do_not_trust_a_file_either(
    verb: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, evil = tmp_path / "EXECUTED", Path(shutil.copytree(home / "model", tmp_path / "evil"))
    plant_code(evil, trace)
    changes = {
        "model__trust_remote_code": True,
        "model__path": str(evil),
        "data__template": "/dev/zero",
    }
    folder = copied(home, "full", tmp_path, **changes)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = [
        f"model={evil}",
        f"data.train={rows}",
        f"data.cache={tmp_path / 'cache'}",
        f"output={folder}",
    ]
    code = main([verb, *asked, "runtime.device=cpu", "data.workers=0"])
    said = capsys.readouterr()
    assert not trace.exists()
    assert code == (0 if verb == "inspect" else 2), said.err  # looking at data needs no model
    assert verb == "inspect" or "trust_remote_code" in said.err


def test_a_template_that_run_json_names_is_not_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    folder = copied(home, "full", tmp_path, data__template=str(secret))
    assert main(["export", str(folder), f"to={tmp_path / 'out'}"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny.CHAT_TEMPLATE
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()  # as in a run that is not finished
    capsys.readouterr()
    assert main(["export", str(folder), f"to={tmp_path / 'two'}", "step=1"]) == 2
    assert "template=FILE" in capsys.readouterr().err
    own = tmp_path / "own.jinja"
    own.write_text(tiny.CHAT_TEMPLATE + "{# mine #}")
    assert main(["export", str(folder), f"to={tmp_path / 'two'}", "step=1", f"template={own}"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == own.read_text()
    found = [
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and p.name != "secret" and b"the secret" in p.read_bytes()
    ]
    assert found == []


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "step", "changes", "key"),
    [
        ("lora", "", {"model__path": "evil/base"}, "model"),
        ("full", "1", {"model__path": "evil/base"}, "model"),
        ("lora", "", {"model__tokenizer": "evil/tokenizer"}, "tokenizer"),
        ("lora", "1", {"adapter__path": "evil/adapter"}, "adapter"),
        ("lora", "1", {"adapter__path": "../../x/../evil"}, "adapter"),
        ("lora", "", {"model__path": "https://evil.example/base"}, "model"),
    ],
)
def test_what_only_run_json_names_is_never_fetched(
    name: str, step: str, changes: dict[str, Any], key: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = copied(home, name, tmp_path, **changes)
    arguments = [
        "export",
        str(folder),
        f"to={tmp_path / 'out'}",
        *([f"step={step}"] if step else []),
    ]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"the {key} " in said
    assert "is not on this disk" in said
    assert f"{key}=..." in said
    own = home / ("lora" if key == "adapter" else "model")
    assert main([*arguments, f"{key}={own}"]) == 0  # named by the caller


@pytest.mark.usefixtures("offline")
def test_the_data_and_cache_that_run_json_names_are_not_opened(home: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # reading it would wait for ever
    places = {
        "data__train": str(tmp_path / "fifo"),
        "data__eval": "evil/data",
        "data__cache": str(tmp_path / "made"),
    }
    folder = copied(home, "lora", tmp_path, **places)
    assert main(["export", str(folder), f"to={tmp_path / 'out'}"]) == 0
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"megatron_config": {"x": 1}, "megatron_core": "evil"}, "megatron_config"),
        ({"megatron_core": "evil"}, "megatron_core"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"something_new": "evil/code"}, "something_new"),
        ({"peft_type": "EVIL"}, "cannot be continued"),
        ({"peft_type": "PREFIX_TUNING"}, "cannot be continued"),
        ({"r": "x"}, "cannot be continued"),
        ({"target_modules": 7}, "cannot be continued"),
        ({"base_model_name_or_path": "evil/base", "revision": "evil"}, None),
        ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}, None),
    ],
)
def test_what_an_adapter_folder_names(
    changes: dict[str, Any],
    said: str | None,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused (`said` is in the message), or without effect (None)."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'EXECUTED')!r}, 'w')\n")
    folder = Path(shutil.copytree(home / "lora", tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    run = {**settings(home, "x"), "output": str(tmp_path / "run"), "model": str(home / "model")}
    adapter: AdapterSettings = {"method": "lora", "path": str(folder)}
    if said is None:
        sftx.train(**run, adapter=adapter)
    else:
        with pytest.raises(sftx.UserError, match="adapter") as caught:
            sftx.train(**run, adapter=adapter)
        assert said in str(caught.value)
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize("where", ["adapter", "run"])
def test_pickles_in_an_adapter_folder_are_not_read(
    where: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(home, "lora", tmp_path)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    if where == "run":
        assert main(["export", str(folder), f"to={tmp_path / 'out'}"]) == 2
    else:
        base = copied(home, "lora", tmp_path / "other", adapter__path=str(folder))
        assert main(["export", str(base), "step=1", f"to={tmp_path / 'out'}"]) == 2
    assert "pickled weights are not read" in capsys.readouterr().err


def test_a_manifest_opens_nothing_outside_of_its_checkpoint(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(home, "full", tmp_path)
    os.mkfifo(tmp_path / "fifo")  # reading it would wait for ever
    path = folder / "checkpoints" / "step-00000001" / "MANIFEST.json"
    path.write_text(
        json.dumps({"../../../fifo": {"sha256": "0", "bytes": 0}, **json.loads(path.read_text())})
    )
    assert main(["export", str(folder), "step=1"]) == 2
    assert "outside of the checkpoint" in capsys.readouterr().err


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(path.read_text()[:200]),
    "NULs": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b"\xff" + path.read_bytes()),
    "not JSON": lambda path: path.write_text("{'status': 'finished'}"),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "nested deeply": lambda path: path.write_text(
        '{"status": ' + "[" * 100_000 + "]" * 100_000 + "}"
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    **{
        f"{name} = {value!r}": lambda path, name=name, value=value: path.write_text(
            json.dumps(json.loads(path.read_text()) | {name: value})
        )
        for name, value in {
            "status": "done",
            "config": None,
            "mathematics": "x",
            "precision": 3,
            "device": ["cpu"],
            "num_steps": "2",
            "tokens_per_pack": -1,
            "started": "yesterday",
        }.items()
    },
    **{
        f"no {name}": lambda path, name=name: path.write_text(
            json.dumps(
                {key: value for key, value in json.loads(path.read_text()).items() if key != name}
            )
        )
        for name in ("status", "config", "mathematics", "precision", "tokens_per_pack")
    },
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_says_what_to_do(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(home, "full", tmp_path)
    DAMAGE[name](folder / "run.json")
    with pytest.raises(
        sftx.UserError, match=r"run\.json: this record of a run is damaged: .*put a copy of it back"
    ):
        sftx.train(**{**settings(home, "x"), "output": str(folder)}, model=str(home / "model"))
    assert main(["export", str(folder), f"to={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "run.json" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "path", 7),
        ("model", "save_dtype", "fp8"),
        ("model", "add_tokens", "x"),
        ("adapter", "rank", -1),
        ("adapter", "method", "magic"),
        ("data", "too_long", "hope"),
    ],
)
def test_settings_of_a_record_are_checked(
    section: str,
    field: str,
    value: Any,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(home, "lora", tmp_path, **{f"{section}__{field}": value})
    assert main(["export", str(folder), "step=1"]) == 2
    assert (
        f"run.json: this record of a run is damaged: config.{section}.{field}: "
        in capsys.readouterr().err
    )
