"""Uploading an exported folder to a hub, only where that is asked for."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from sftx.boundary import boundary


def push_folder(folder: Path, name: str, private: bool) -> str:
    """Upload `folder` as the repository `name`, made private unless `private` is False; its address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    hint = f"; the export itself is in {folder}"
    with boundary(f"push={name}: could not be uploaded", hint):
        hub = HfApi()
        address = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Export of sftx")
    return str(address)
