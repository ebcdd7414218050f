"""The public API is typed: names are found, sections are completed, and a misspelt setting is
flagged.
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sftx
from sftx.settings import keywords
from sftx.settings.describe import section_of
from sftx.settings.schema import Config
from sftx.settings.typed_keywords import as_python

ROOT = Path(__file__).parents[1]


def test_the_types_are_those_of_the_schema() -> None:
    page = ROOT / "src" / "sftx" / "settings" / "keywords.py"
    assert page.read_text(encoding="utf-8") == as_python(), "run `make docs`"


def test_every_setting_is_in_the_types() -> None:
    """Compared key by key with the schema, whatever the generator does."""
    assert keywords.Sections.__annotations__.keys() == Config.model_fields.keys()
    hints = inspect.get_annotations(keywords.Sections)
    assert {key for key, hint in hints.items() if "Required" in str(hint)} == {
        "model",
        "data",
        "output",
    }
    for name, field in Config.model_fields.items():
        section = section_of(field)
        if section is not None:
            typed = getattr(keywords, f"{name.capitalize()}Settings")
            assert typed.__annotations__.keys() == section.model_fields.keys()


def test_public_names_are_found_before_they_are_used() -> None:
    code = (
        "import sys, sftx; print(*dir(sftx)); assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"train", "steps", "encode", "Config", "Result", "Steps", "load_config"} <= {
        *done.stdout.split()
    }
    assert {*sftx.__all__} == {*sftx._PUBLIC, "__version__"}
    for name in sftx.__all__:
        assert getattr(sftx, name) is not None


def test_type_checkers_see_the_same_names_as_python() -> None:
    tree = ast.parse((ROOT / "src" / "sftx" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == sftx._PUBLIC


def test_a_setting_takes_what_make_config_takes() -> None:
    """Each way of writing a value that the types allow is one that is accepted."""
    config = sftx.make_config(
        model=Path("m"),
        data={"train": [Path("a.jsonl"), {"path": "b.jsonl", "weight": 2}], "train_on": ("user",)},
        output=Path("o"),
        adapter="lora",
        optim={"betas": [0.8, 0.9], "learning_rate": 1},
        batch=sftx.Config.model_fields["batch"].default,
    )
    assert (config.model.path, config.data.train_on, config.optim.betas) == (
        "m",
        ["user"],
        (0.8, 0.9),
    )


RIGHT = """\
import sftx
from pathlib import Path
from sftx.settings.schema import Batch

def rows():
    yield ["a", "b"]

sftx.train(model="m", data=[["a", "b"]], output="o", batch={"epochs": 2}, adapter="lora")
sftx.train(model=Path("m"), data=rows(), output=Path("o"), batch=Batch(), optim={"betas": (0.9,
    0.95)})
sftx.train(model={"path": "m", "freeze": ["a"]}, data={"train": ["a", {"path": "b",
    "weight": 2}]}, output="o")
result = sftx.train(sftx.load_config("run.yaml"))
reveal_type(sftx.train)
reveal_type(result.metrics)
steps = sftx.steps(model="m", data="d", output="o")
for record in steps:
    reveal_type(record)
    reveal_type(steps.evaluate())
anything: dict = {}
sftx.train(**anything)
"""
WRONG = {
    'sftx.train(model="m", data="d", output="o", batch={"epoch": 2})': (
        'not assignable to "BatchSettings"'
    ),
    'sftx.train(model="m", data={"trian": "d"}, output="o")': "DataSettings",
    'sftx.train(model="m", data="d", output="o", epochs=2)': "No overloads",
    'sftx.steps(model="m", data="d", output="o", optim={"schedule": "cosin"})': (
        'not assignable to "OptimSettings"'
    ),
    'sftx.train(model="m", output="o")': "No overloads",
    'sftx.train(sftx.load_config("a"), batch={"epochs": 2})': "No overloads",
    'sftx.make_config(model="m", data="d", output="o", seed="1")': 'not assignable to "int"',
    'sftx.encode("a", "m", tempalte="none")': 'No parameter named "tempalte"',
    "sftx.trian": '"trian" is not a known attribute',
}


@pytest.mark.slow
def test_a_type_checker_flags_mistakes_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text("import sftx\n" + "".join(f"{line}\n" for line in WRONG))
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    report = json.loads(done.stdout)["generalDiagnostics"]
    told = {"right.py": [], "wrong.py": []}
    for entry in report:
        told[Path(entry["file"]).name].append(
            (entry["severity"], entry["range"]["start"]["line"], entry["message"])
        )
    assert [entry for entry in told["right.py"] if entry[0] == "error"] == []
    revealed = " ".join(message for _, _, message in told["right.py"])
    for type_name in (
        "-> Result",
        "list[StepRecord]",
        '"record" is "StepRecord"',
        "dict[str, float]",
    ):
        assert type_name in revealed
    for number, (line, message) in enumerate(WRONG.items(), 1):
        assert any(at == number and message in text for _, at, text in told["wrong.py"]), line
