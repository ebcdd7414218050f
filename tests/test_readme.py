"""What the pages say is true.

The README's YAML and Python run as they are printed, on a small model; files that a page names
exist.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

import sftx
from sftx import cli
from sftx.settings.load import load_config

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""A model with a chat template, which the README's rows need."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with the model under its name on the hub, and the README's chats.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    tiny.folder(tmp_path / HUB_NAME)
    pair, messages = (line for line in blocks("json")[1].splitlines() if line.startswith("{"))
    assert "prompt" in pair
    lines = [messages.replace("Paris", f"Paris {i}") for i in range(24)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_the_first_yaml_runs_as_printed(home: Path) -> None:
    (home / "run.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    assert load_config("run.yaml").model.path == HUB_NAME
    for verb in ("lint", "train"):
        assert cli.main([verb, "run.yaml", "runtime.threads=1", "data.workers=0"]) == 0
    assert (home / "runs" / "first" / "adapter_model.safetensors").exists()


def test_the_python_runs_as_printed(home: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (home / "runs" / "second" / "model.safetensors").exists()
    assert (home / "runs" / "third" / "model.safetensors").exists()


def test_the_file_map_names_every_package() -> None:
    source = Path(sftx.__file__).parent
    table = README.partition("## Where things are")[2].partition("\nBeside them")[0]
    listed = {name.rstrip("/") for name in re.findall(r"^\| `([^`]+/)` \|", table, re.MULTILINE)}
    packages = {
        path.parent.relative_to(source).as_posix() for path in source.rglob("*/__init__.py")
    }
    inner = {name for name in packages if name.startswith("compat/")}
    assert listed == packages - inner


def test_the_page_of_the_public_api_lists_what_is_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(sftx.__all__)
    assert sorted({*sftx._PUBLIC, "__version__"}) == sorted(sftx.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_links_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = (ROOT, ROOT / "src" / "sftx", page.parent)
    named = re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|md|jinja|html|yaml))`", text)
    if page.name == "migrating-from-trlx.md":  # which names files of trlx
        named = []
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing += [link for link in links if not (page.parent / link).exists()]
    assert missing == []
