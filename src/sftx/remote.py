"""Files elsewhere, by URL (`s3://`, `gs://`, `hf://`, `file://`): what fsspec opens.

Amazon's and Google's take packages of the extra `remote`; fsspec itself comes with torch.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from fsspec.core import url_to_fs

from sftx.boundary import boundary
from sftx.types import UserError


def is_url(path: str) -> bool:
    """Whether `path` says how to get there."""
    return "://" in path


def open_url(url: str, setting: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; UserError, which names the `setting`, where its
    package is missing or nothing is known of its kind.
    """
    hint = "; s3:// and gs:// need pip install 'sftx[remote]'"
    with boundary(f"{setting}: {url} cannot be opened", hint):
        files, path = cast(tuple[Any, str], url_to_fs(url))
    return files, path.rstrip("/")


def fetch_files(url: str, folder: Path) -> list[tuple[str, Path]]:
    """What a URL, a glob or a folder of them stands for: (URL, copy in `folder`) of every file.

    A copy is kept under the identity that the store gives the file (a checksum, or size and time), so
    that it is fetched once and again when it has changed.
    """
    files, path = open_url(url, "data")
    found: list[tuple[str, Path]] = []
    with boundary(f"{url}: cannot be read"):
        names = files.find(path) if files.isdir(path) else files.glob(path)
        for name in sorted(cast(list[str], names)):
            if files.isdir(name):
                continue
            known_by = f"{url} {name} {files.ukey(name)}"
            copy = folder / blake2b(known_by.encode(), digest_size=12).hexdigest() / Path(name).name
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                part = copy.with_name(copy.name + ".part")
                files.get_file(name, str(part))
                part.replace(copy)
            found.append((str(files.unstrip_protocol(name)), copy))
    if not found:
        raise UserError(f"{url}: there is no such file")
    return found
