"""What the pages say is true.

Every command in them is read by the command line, settings by the schema, rows by the encoder; the
code of each page runs in a fresh folder, on small models; files that a page names exist.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import blocks
import gguf_files
import pytest
import tiny
import transformers
from blocks import DOCS, PAGES, ROOT, Block, blocks_of, name_of

import sftx
from sftx.demo import smollm2
from sftx.settings.describe import settings
from sftx.settings.schema import SHORT_FORMS, Config

README = ROOT / "README.md"
LINKED = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
COMING_FROM = [*sorted((DOCS / "coming-from").glob("*.md")), DOCS / "migrating-from-trlx.md"]
BASES = {"HuggingFaceTB/SmolLM2-135M"}
"""Models that have no chat template."""


def pages_with(language: str) -> list[Path]:
    """Pages that have such a block."""
    return [page for page in PAGES if any(each.language == language for each in blocks_of(page))]


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small new models under the names that the pages use."""
    folder = tmp_path_factory.mktemp("hub")
    for name in blocks.HUB_MODELS:
        if name in BASES:
            tiny.folder(folder / name, chat=False, max_position_embeddings=1024)
        else:  # merges, as GGUF needs them
            gguf_files.folder(folder / name, max_position_embeddings=1024)
    return folder


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the place of SmolLM2 in its package, which the tutorial takes."""
    pytest.importorskip("gguf")
    source = gguf_files.folder(tmp_path_factory.mktemp("source"), max_position_embeddings=1024)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    return gguf_files.gguf_of(source, model, source / "model.gguf")


@pytest.fixture
def home(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with the models and some dialogues in `chats.jsonl` and `held_out.jsonl`."""
    home = tmp_path / "home"
    shutil.copytree(hub, home)
    monkeypatch.chdir(home)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    [_, messages] = [
        line
        for block in blocks_of(README)
        if block.language == "json"
        for line in block.text.splitlines()
        if line.startswith(('{"prompt', '{"messages'))
    ]
    lines = [messages.replace("Paris", f"Paris {i}") for i in range(24)]
    (home / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (home / "held_out.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    return home


def test_blocks_are_found_and_told_apart(tmp_path: Path) -> None:
    page = ROOT / "docs" / "index.md"
    [*found] = blocks._BLOCK.finditer(
        '<!-- hidden sh\na\n-->\n\n<!-- not run: why -->\n```sh title="b"\nc\n```\n'
        "- d\n\n  ```python\n  e\n  ```\n"
    )
    assert [each["hidden"] for each in found] == ["sh", None, None]
    assert [each["reason"] for each in found] == [None, "why", None]
    assert [each["text"] for each in found] == [None, "c\n", "  e\n"]
    assert page in PAGES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_its_language(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = blocks_of(page)
    assert not [str(each) for each in found if each.language not in blocks.LANGUAGES]
    fences = len(re.findall(r"^ *```", text, re.MULTILINE))
    hidden = text.count("<!-- hidden")
    assert fences == 2 * (len(found) - hidden), "a fence is open, or a mark stands alone"
    marks = len(re.findall("<!-- not run", text))
    assert marks == sum(bool(each.not_run) for each in found), "a mark stands above no block"
    outside = blocks._BLOCK.sub("", text)
    assert not re.findall(r"\n\n    \S.*", outside), "code that is indented has no language"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("{model: m, data: d.jsonl, output: runs/first}")
    for block in blocks_of(page):
        if block.language == "sh":
            for command in blocks.commands_of(block):
                blocks.check_command(command, tmp_path)
    for command in blocks.inline_commands(page):
        blocks.check_command(command, tmp_path)


def test_a_wrong_command_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("{model: m, data: d.jsonl, output: runs/first}")
    for wrong in (
        "sftx trian run.yaml",
        "sftx train run.yaml batch.epoch=2",
        "sftx train run.yaml batch.epochs=two",
        "sftx export runs/first into=merged",
        "sftx sweep run.yaml optim.learning=1,2",
        "sftx doctor batch.epochs=2",
    ):
        with pytest.raises(AssertionError):
            blocks.check_command(wrong, tmp_path)
    with pytest.raises(sftx.UserError):
        blocks.check_settings("batch: {epoch: 2}", tmp_path / "block.yaml")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_rows_and_python_are_read(page: Path, tmp_path: Path) -> None:
    for block in blocks_of(page):
        if block.language == "yaml" and not block.not_run:
            blocks.check_settings(block.text, tmp_path / "block.yaml")
        elif block.language == "json" and not block.not_run:
            blocks.check_rows(block)
        elif block.language == "python":
            compile(block.text, str(block), "exec")


def does(page: Path) -> list[Block]:
    """The blocks of a page, if any of them runs."""
    found = blocks_of(page)
    runs = [each for each in found if each.language in ("sh", "python") and not each.not_run]
    return found if runs else []


def test_the_readme_runs_as_printed(home: Path) -> None:
    blocks.run(blocks_of(README))
    assert (home / "runs" / "first" / "adapter_model.safetensors").exists()
    assert (home / "runs" / "second" / "model.safetensors").exists()
    assert (home / "runs" / "third" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != README and does(page)], ids=name_of
)
def test_a_page_runs_as_printed(page: Path, home: Path, request: pytest.FixtureRequest) -> None:
    if page.name == "tutorial.md":
        place = Path(os.environ["SFTX_CACHE"], "smollm2", Path(smollm2.MEMBER).name)
        place.parent.mkdir(parents=True)
        shutil.copy(request.getfixturevalue("gguf"), place)
    blocks.run(does(page))


def test_the_notebook_is_made_from_the_tutorial() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import notebook

    kept = json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    made = notebook.cells()
    assert ["".join(cell["source"]) for cell in kept] == [cell["source"] for cell in made], (
        "run `python scripts/notebook.py`"
    )
    code = [cell for cell in kept if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]


@pytest.mark.parametrize("page", COMING_FROM, ids=name_of)
def test_settings_that_other_tools_lead_to_exist(page: Path) -> None:
    known = {*settings(), *SHORT_FORMS, *Config.model_fields}
    sections = {key.partition(".")[0] for key in settings() if "." in key}
    rows = re.findall(r"^\|[^|]*\|(.*)\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([a-z_]+\.[a-z_.]+)", row)]
    ours = [name for name in named if name.partition(".")[0] in sections]
    assert len(ours) > 10
    assert not [name for name in ours if name not in known]


def test_every_page_is_in_the_navigation() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]

    def pages(entries: list[dict[str, object]]) -> Iterator[str]:
        for entry in entries:
            for target in entry.values():
                if isinstance(target, str):
                    yield target
                else:
                    assert isinstance(target, list)
                    yield from pages(target)

    listed = sorted(pages(site["nav"]))
    assert listed == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_pages_made_from_the_code_are_up_to_date(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import reference

    for name, text in reference.pages().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, (
            "run `python scripts/reference.py`"
        )


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="pip install -r requirements-docs.txt")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    site = tmp_path / "build" / "site"
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    assert (site / "search.js").exists()  # the index, for search in pages opened from disk
    assert "assets/iframe-worker/shim.js" in (site / "index.html").read_text(encoding="utf-8")
    loads = r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\">\s]*"
    for page in pages:
        found = re.findall(loads, page.read_text(encoding="utf-8"))
        assert not [each for each in found if "canonical" not in each], page.name


def test_the_file_map_names_every_package() -> None:
    source = Path(sftx.__file__).parent
    text = README.read_text(encoding="utf-8")
    table = text.partition("## Where things are")[2].partition("\nBeside them")[0]
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


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_files_and_links_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = (ROOT, ROOT / "src" / "sftx", page.parent)
    named = re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|md|jinja|html|yaml))`", text)
    named = [name for name in named if not name.startswith("runs/")]
    if page in COMING_FROM:  # which name files of other tools
        named = []
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing += [link for link in links if not (page.parent / link).exists()]
    assert missing == []
