"""The shape of the project: layers, cycles, sizes, documented settings, files that load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sftx
from sftx.settings.describe import fields
from sftx.settings.load import load_config

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sftx"

# A module imports from its own layer and from those beneath it; the longest name that fits decides.
LAYERS = {
    5: ("cli", "compat", "demo", "__main__"),
    4: (
        "talk",
        "training.loop",
        "training.control",
        "training.metrics",
        "training.build",
        "training.run_data",
        "training.finish",
        "report",
        "starter",
        "sweep",
        "verify",
    ),
    3: ("training", "eval", "doctor"),
    2: ("model", "distributed"),
    1: ("data", "report.record", "report.facts", "report.lock", "report.model_card"),
    0: (
        "arrow",
        "boundary",
        "cores",
        "evenly",
        "files",
        "gguf",
        "first_line",
        "hub",
        "model_config",
        "printable",
        "remote",
        "settings",
        "types",
    ),
}
STRANGERS = (
    ("data", "model"),
    ("data", "report"),
    ("cli", "compat"),
    ("cli", "demo"),
    ("compat", "demo"),
)
"""Packages that never import each other, in either direction (a verb may run the demo, and the pages
of a report show data).
"""
NO_TORCH_BELOW = 2
CATCHES_ALL = SOURCE / "boundary.py"
"""The one file that may catch whatever a library raises; see its docstring."""
MAX_FILE, MAX_FUNCTION = 400, 60
"""Lines, counted whole, as a reader meets them. The whole has no limit: code is never made denser
to fit one.
"""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name without `sftx.`; the package itself is the
    empty name.
    """
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = (
            ".".join(path.relative_to(SOURCE).with_suffix("").parts)
            .removesuffix("__init__")
            .rstrip(".")
        )
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def layer(name: str) -> int:
    """The layer of a module; a package that only describes its modules (no imports) belongs to the
    lowest of them.
    """
    matches = [
        (len(part), number)
        for number, parts in LAYERS.items()
        for part in parts
        if f"{name}.".startswith(f"{part}.")
    ]
    assert matches, f"sftx.{name} has no layer: put it into LAYERS"
    return max(matches)[1]


def imports(name: str) -> set[str]:
    """The sftx modules that a module imports anywhere, inside functions included."""
    found = set()
    is_package = (SOURCE / Path(*name.split(".")) / "__init__.py").exists()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "sftx"}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["sftx", *name.split(".")]
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            if base.split(".")[0] == "sftx":
                found |= {f"{base}.{alias.name}" for alias in node.names}
    resolved = set()
    for target in found:
        inner = target.removeprefix("sftx").lstrip(".")
        if inner in sftx._PUBLIC:
            inner = sftx._PUBLIC[inner].removeprefix("sftx.")
        while inner and inner not in modules():
            inner = inner.rpartition(".")[0]
        resolved |= {inner} - {"", name}
    return resolved


def test_imports_go_downward_only() -> None:
    wrong = [
        f"sftx.{name} (layer {layer(name)}) imports sftx.{target} (layer {layer(target)})"
        for name in modules()
        if name
        for target in imports(name)
        if layer(target) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_strangers_stay_strangers() -> None:
    wrong = [
        f"sftx.{name} imports sftx.{target}"
        for name in modules()
        for target in imports(name)
        for pair in STRANGERS
        if (name.split(".")[0], target.split(".")[0]) in (pair, pair[::-1])
        and (name, target.split(".")[0]) != ("cli.demo", "demo")
        and not (pair == ("data", "report") and layer(name) > layer(target))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    try:
        TopologicalSorter({name: imports(name) for name in modules()}).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_lower_layers_never_import_torch() -> None:
    wrong = [
        f"sftx.{name} imports {target}"
        for name, tree in modules().items()
        if name and layer(name) < NO_TORCH_BELOW
        for node in ast.walk(tree)
        for target in _outside(node)
        if target.split(".")[0] in ("torch", "peft", "accelerate")
    ]
    assert not wrong, "\n".join(wrong)


def _outside(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


POSIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios")
NEED_POSIX: set[str] = set()
"""Modules that do not load on Windows yet."""


def test_modules_load_on_windows_too() -> None:
    wrong = {
        f"sftx.{name} imports {target}"
        for name, tree in modules().items()
        for node in tree.body
        for target in _outside(node)
        if target.split(".")[0] in POSIX_ONLY
    }
    assert wrong <= NEED_POSIX


def test_light_modules_load_without_torch_and_transformers() -> None:
    light = ["sftx"] + [
        f"sftx.{name}" for name in modules() if name and layer(name) < NO_TORCH_BELOW
    ]
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'peft'} & {*sys.modules}\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *light], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_files_and_functions_are_small() -> None:
    sizes = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCE.rglob("*.py")
        if path.name != "keywords.py"  # made from the schema, for editors
    }
    assert not [
        f"{path.relative_to(ROOT)}: {size}" for path, size in sizes.items() if size > MAX_FILE
    ]
    long = [
        f"sftx.{name}: {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_everything_public_is_documented() -> None:
    missing = [f"sftx.{name}" for name, tree in modules().items() if not ast.get_docstring(tree)]
    for name, tree in modules().items():
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name[0] != "_"
            and "overload"
            not in [
                decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)
            ]
        ]
        missing += [f"sftx.{name}.{node.name}" for node in public if not ast.get_docstring(node)]
    assert not missing, "\n".join(missing)


def test_every_setting_is_documented() -> None:
    assert not [key for key, field in fields() if not (field.description or "").strip()]


def test_no_leftovers() -> None:
    everywhere = [
        "TO" + "DO",
        "FIX" + "ME",
        "XX" + "X",
        "break" + "point(",
        "/wo" + "rk/",
        "/tm" + "p/",
    ]
    in_source = [
        r"except Exception",
        r"except:",
        r"NotImplementedError\(\)",
    ]
    places = [
        *SOURCE.rglob("*.py"),
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "tests").rglob("*.py"),
    ]
    wrong = []
    for path in [*places, *(ROOT / "examples").rglob("*.*")]:
        patterns = [re.escape(word) for word in everywhere]
        if SOURCE in path.parents:
            patterns += [
                word for word in in_source if path != CATCHES_ALL or word != r"except Exception"
            ]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            wrong += [
                f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
                for word in patterns
                if re.search(word, line)
            ]
    assert not wrong, "\n".join(wrong)
    assert CATCHES_ALL.read_text(encoding="utf-8").count("except Exception") == 1


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name
)
def test_every_example_loads(path: Path) -> None:
    assert load_config(str(path)).output.startswith("runs/")
