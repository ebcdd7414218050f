"""What a user installs: the wheel, in an environment that does not see this folder."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sftx

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [sftx.__version__]
    assert f"## {sftx.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_wheel_installs_and_works_without_this_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # Built from what git tracks, so that no leftover of this folder gets in.
    files = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("sftx-*.whl")
    assert wheel.name.startswith(f"sftx-{sftx.__version__}-")

    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    expected = {name.removeprefix("src/") for name in files if name.startswith("src/sftx/")}
    assert expected <= packaged
    tops = {name.split("/")[0] for name in packaged}
    assert tops == {"sftx", f"sftx-{sftx.__version__}.dist-info"}

    target = tmp_path / "installed"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
        cwd=tmp_path,
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sftx; "
        "assert sftx.__file__.startswith(sys.argv[1]), sftx.__file__; "
        "from sftx.cli import main; sys.exit(main(['schema']))"
    )
    assert '"properties"' in run(sys.executable, "-P", "-c", code, target, cwd=tmp_path)
