"""Settings: what is read, what is refused, and how the refusal reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sftx.settings.describe import FOREIGN_NAMES, settings, suggestion
from sftx.settings.documents import as_json_schema, as_markdown
from sftx.settings.keywords import OptimSettings
from sftx.settings.load import load_config
from sftx.settings.make import make_config
from sftx.settings.read_yaml import parse
from sftx.settings.schema import Batch, Config, Model, Runtime
from sftx.types import UserError

BASE = "model: m\ndata: d.jsonl\noutput: o\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(str(path), list(overrides))


def refused(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_yaml_command_line_and_python_are_the_same(tmp_path: Path) -> None:
    nested = (
        "optim:\n  learning_rate: 1e-4\n  betas: [0.9, 0.95]\nbatch: {epochs: 2, shuffle: "
        "false}\nadapter: lora\n"
    )
    dotted = [
        "optim.learning_rate=1e-4",
        "optim.betas=[0.9, 0.95]",
        "batch.epochs=2",
        "batch.shuffle=false",
        "adapter=lora",
    ]
    python = make_config(
        model=Path("m"),
        data={"train": Path("d.jsonl")},
        output="o",
        optim={"learning_rate": 1e-4, "betas": (0.9, 0.95)},
        batch=Batch(epochs=2, shuffle=False),
        adapter={"method": "lora"},
    )
    assert load(tmp_path, BASE + nested) == load(tmp_path, BASE, *dotted) == python
    assert load_config(None, ["model=m", "data=d.jsonl", "output=o", *dotted]) == python
    assert python.model == Model(path="m")
    assert python.optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e5", 200_000),
        ("1.5e3", 1500.0),
        ("-3", -3),
        (".5", 0.5),
        ("true", True),
        ("yes", "yes"),
        ("on", "on"),
        ("True", "True"),
        ("0123", "0123"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2020-01-01", "2020-01-01"),
        ("'1'", "1"),
        ("~", None),
        ("", None),
        ("[a, 1, null]", ["a", 1, None]),
        (".nan", ".nan"),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    problems: list[str] = []
    found, _ = parse(text, "x", problems)
    assert (found, type(found), problems) == (value, type(value), [])


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**15), 10**15))
def test_numbers_written_by_python_are_read_back(number: float) -> None:
    found, _ = parse(repr(number), "x", problems := [])
    assert found == number
    assert not problems


def test_every_problem_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = BASE + (
        "batch:\n  epoch: 3\n  shuffle: yes\n  steps: true\noptim: {learning_rate: -1, betas: "
        "[0.9]}\nruntime: 3\n"
    )
    assert refused(tmp_path, text, "runtime.device=gpu", "seed=1.5") == [
        "command line: runtime.device: runtime is not a section",
        "run.yaml:5: batch.epoch: no such setting; did you mean `batch.epochs`?",
        "run.yaml:7: batch.steps: found true; allowed: a whole number >= 0, or null",
        "run.yaml:6: batch.shuffle: found 'yes'; allowed: true or false",
        "run.yaml:8: optim.learning_rate: found -1; allowed: a number > 0, or null",
        f"run.yaml:9: runtime: found 3; allowed: settings ({', '.join(Runtime.model_fields)})",
        "command line: seed: found 1.5; allowed: a whole number",
        "run.yaml:8: optim.betas[1]: missing; allowed: a list of 2 numbers",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: m\n", "run.yaml:4: modle: no such setting; did you mean `model`?"),
        ("epochs: 2\n", "run.yaml:4: epochs: no such setting; it is `batch.epochs`"),
        (
            "every: 2\n",
            "run.yaml:4: every: no such setting; it is `eval.every` or `checkpoint.every`",
        ),
        ("lora_r: 8\n", "run.yaml:4: lora_r: no such setting; here it is `adapter.rank`"),
        ("lora-alfa: 8\n", "run.yaml:4: lora-alfa: no such setting; did you mean `adapter.alpha`?"),
        (
            "train:\n  sequence_len: 8\n",
            "run.yaml:5: train.sequence_len: no such setting; here it is `data.max_length`",
        ),
        ("optimizer:\n  eps: 8\n", "run.yaml:5: optimizer.eps: no such setting; it is `optim.eps`"),
        (
            "batch: {batch.epochs: 2}\n",
            "run.yaml:4: batch.batch.epochs: dotted keys are for the command line; write ",
        ),
        (
            "batch:\n  steps: 1\n  steps: 1\n",
            "run.yaml:6: batch.steps: written twice, first at run.yaml:5",
        ),
        ("seed: 1.0e999\n", "run.yaml:4: seed: 1.0e999 is too large a number"),
        ("packing: true\n", "run.yaml:4: packing: no such setting; examples are always packed"),
        ("a: !!str b\n", "run.yaml:4: not readable as YAML: tags such as "),
        ("a: &b c\n", "run.yaml:4: not readable as YAML: anchors and aliases are not read"),
        ("a: [1\n", "run.yaml:5: not readable as YAML: "),
    ],
)
def test_unknown_keys_and_bad_yaml(tmp_path: Path, text: str, expected: str) -> None:
    assert any(line.startswith(expected) for line in refused(tmp_path, BASE + text)), refused(
        tmp_path, BASE + text
    )


def test_keys_inside_a_list_of_sources(tmp_path: Path) -> None:
    text = (
        "model: m\noutput: o\ndata:\n  train:\n    - path: a\n      weigth: 2\n    - {weight: 2}\n"
    )
    allowed = "allowed: text or a list of text / {path, name, weight}, or null"
    assert refused(tmp_path, text) == [
        f"run.yaml:6: data.train[0].weigth: no such setting; {allowed}",
        f"run.yaml:7: data.train[1].path: missing; {allowed}",
    ]


def test_missing_settings_and_files(tmp_path: Path) -> None:
    assert refused(tmp_path, "")[0] == "run.yaml: model: missing: The model to start from."
    assert refused(tmp_path, "- a") == [
        "run.yaml: found ['a']; a run is a mapping such as `model: PATH`"
    ]
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file"):
        load_config("nowhere.yaml", [])
    with pytest.raises(UserError, match="a folder, where a YAML file"):
        load_config(str(tmp_path), [])


def test_overrides_merge_into_sections(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        BASE + "batch: {epochs: 2}\noptim:\n",
        "model.tokenizer=t",
        "batch={shuffle: false}",
        "model=n",
    )
    assert (config.model.path, config.model.tokenizer) == ("n", "t")
    assert (config.batch.epochs, config.batch.shuffle) == (2, False)
    assert refused(tmp_path, BASE, "seed=1", "seed=2") == ["command line: seed: given twice"]
    assert refused(tmp_path, BASE, "seed")[0].startswith(
        "command line: 'seed': write a setting as key=value"
    )


def test_defaults_yield_to_the_file_and_to_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\n")
    assert load_config(str(path), [], ["output=none"]).output == "none"
    assert load_config(str(path), ["output=mine"], ["output=none"]).output == "mine"


def test_rows_may_come_from_a_generator() -> None:
    rows = [["a", "b"], ["c", "d"]]
    ways: list[Any] = [rows, (row for row in rows), {"rows": (row for row in rows)}]
    for data in ways:
        assert make_config(model="m", output="o", data=data).data.rows == rows
    assert (
        make_config(
            model="m", output="o", data={"rows": rows, "eval_rows": iter(rows)}
        ).data.eval_rows
        == rows
    )


def test_a_list_of_paths_is_not_a_list_of_rows(tmp_path: Path) -> None:
    hint = (
        "found a list of paths; a list here means rows in memory; for files write `data: "
        "{train: [a.jsonl, b.txt.gz]}`"
    )
    assert refused(tmp_path, "model: m\noutput: o\ndata: [a.jsonl, b.txt.gz]\n") == [
        f"run.yaml:3: data: {hint}"
    ]
    with pytest.raises(UserError, match="list of paths"):
        make_config(model="m", output="o", data=[str(tmp_path)])
    rows = ["a text", "I saved it as a.jsonl"]
    assert make_config(model="m", output="o", data=rows).data.rows == rows
    assert make_config(model="m", output="o", data={"train": ["a.jsonl", tmp_path]}).data.train == [
        "a.jsonl",
        str(tmp_path),
    ]


def test_python_mistakes() -> None:
    wrong: dict[str, Any] = {"num_train_epochs": 1, "batch.epochs": 1}
    with pytest.raises(UserError) as caught:
        make_config(model="m", data="d", output="o", **wrong)
    assert str(caught.value).splitlines() == [
        "num_train_epochs: no such setting; here it is `batch.epochs`",
        "batch.epochs: dotted keys are for the command line; write batch={'epochs': ...}",
    ]


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_are_finite(number: float) -> None:
    with pytest.raises(
        UserError, match=rf"optim.learning_rate: found {number}; allowed: a number > 0, or null"
    ):
        make_config(model="m", data="d", output="o", optim={"learning_rate": number})


def test_every_foreign_name_leads_to_a_setting() -> None:
    for name, (ours, meaning) in FOREIGN_NAMES.items():
        assert ours in settings() or (not ours and meaning), name
        assert name not in {key.rpartition(".")[2] for key in settings()}, (
            f"{name} is a name of ours"
        )
        assert (ours or meaning) in suggestion(name)


def test_words_of_the_libraries_below_do_not_leak(tmp_path: Path) -> None:
    wrong = "\n".join(f"{key}: [{{x: y}}]" for key in Config.model_fields)
    text = " ".join(refused(tmp_path, wrong)) + " ".join(
        refused(tmp_path, BASE + "data: {train: {a: 1}, train_on: 3}\n")
    )
    for word in (
        "Input should",
        "pydantic",
        "Extra inputs",
        "valid dictionary",
        "Literal",
        "NoneType",
        "loc",
    ):
        assert word not in text


NAMES = sorted(
    {part for key in settings() for part in key.split(".")} | {"1", "null", "a.b", "<<", "lora_r"}
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(NAMES), TREES, max_size=6),
    st.text("ab:-[]{}#'\"\n &*!|>%@~,.1", max_size=30),
)
@hypothesis_settings(deadline=None)
def test_no_input_ends_in_anything_but_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, sections: dict[str, Any], text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    calls = [
        lambda: make_config(**sections),
        lambda: load_config(str(path)),
        lambda: load_config(None, [f"data={text}"]),
    ]
    for content in (yaml.safe_dump(sections, allow_unicode=True), text):
        path.write_text(content, encoding="utf-8")
        for call in calls:
            try:
                call()
            except UserError as error:
                assert "Input should" not in str(error)  # noqa: PT017


def test_nesting_has_an_end(tmp_path: Path) -> None:
    assert refused(tmp_path, "a: " + "[" * 5000) == [
        "run.yaml: not readable as YAML: nested too deeply"
    ]


def test_json_schema_takes_the_short_forms() -> None:
    schema = as_json_schema()
    assert schema["properties"]["model"]["anyOf"][0] == {"type": "string"}
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "data", "output"]


def test_settings_page_is_up_to_date() -> None:
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == as_markdown(), (
        "run `sftx schema format=markdown > docs/settings.md`"
    )


def test_nothing_given_twice_is_left_out_silently(tmp_path: Path) -> None:
    for overrides, name in (
        (["model=a", "model=b"], "model.path"),
        (["model=a", "model.path=b"], "model.path"),
        (["batch={epochs: 1}", "batch={epochs: 2}"], "batch.epochs"),
        (["optim={eps: 1e-9}", "optim.eps=1e-8"], "optim.eps"),
    ):
        assert refused(tmp_path, BASE, *overrides) == [f"command line: {name}: given twice"]


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"schedule": "constant", "final_ratio": 0.1},
            "`final_ratio` says where a schedule ends, but the schedule is",
        ),
        ({"betas": (0.9, 1.5)}, r"`betas` are \(0.9, 1.5\); each is at least 0 and below 1"),
        ({"warmup": 1.5}, "`warmup` is 1.5; give a share of the steps below 1, or a whole number"),
    ],
)
def test_settings_that_would_do_nothing_or_fail_late(optim: OptimSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(model="m", data="d", output="o", optim=optim)


def test_roles_to_train_on_are_known(tmp_path: Path) -> None:
    found = (
        "found ['asistant']; allowed: one of all, last or a list of system, developer, user, "
        "assistant, tool"
    )
    assert refused(tmp_path, BASE, "data.train_on=[asistant]") == [
        f"command line: data.train_on: {found}"
    ]


def test_rows_are_a_list(tmp_path: Path) -> None:
    found = "run.yaml:3: data.rows: found 3; allowed: a list of rows, or null"
    assert refused(tmp_path, "model: m\noutput: o\ndata: {rows: 3}\n") == [found]
    assert (
        "for files write `data: {train: [owner/name]}`"
        in refused(tmp_path, BASE, "data=[owner/name]")[0]
    )
    assert refused(tmp_path, BASE + f"seed: {'1' * 5000}\n")[0].startswith(
        "run.yaml:4: seed: found '111"
    )


def test_data_sets_held_in_memory() -> None:
    """Rows are rows: not the names of a table's columns, and without the null keys that Arrow
    invents.
    """
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    for data in (pandas.DataFrame(rows), datasets.Dataset.from_list(rows)):
        assert make_config(model="m", output="o", data=data).data.rows == rows
    calls = [{"text": "a", "call": {"city": "Paris"}}, {"text": "b", "call": {"n": 1}}]
    table = datasets.Dataset.from_list(calls)
    assert make_config(model="m", output="o", data={"eval_rows": table}).data.eval_rows == calls
