"""What the model card says of licence, base and data: only what somebody stated."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import yaml

import sftx
from sftx.cli import main
from sftx.report import provenance
from sftx.report.provenance import card_fields
from sftx.settings.make import make_config
from sftx.training.hand_over_card import licence_text

CARD = """---
license: llama3.2
license_name: 'Community, 3.2'
license_link: https://example.org/licence
tags: [x]
---
# A model

license: mit
"""


def metadata(folder: Path) -> dict[str, object]:
    """The metadata block of the card in a folder, as a hub reads it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_licence_is_the_users_else_the_bases_else_none(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    given = {"model": str(base), "data": ["a text"], "output": "x"}
    assert card_fields(make_config(**given)) == {}
    (base / "README.md").write_text(CARD)
    stated = {
        "license": "llama3.2",
        "license_name": "Community, 3.2",
        "license_link": "https://example.org/licence",
    }
    assert card_fields(make_config(**given)) == stated
    assert card_fields(make_config(**given, license="mit")) == {"license": "mit"}
    own = make_config(**given, license="ours", license_link="https://x.org")
    assert card_fields(own) == {
        "license": "other",
        "license_name": "ours",
        "license_link": "https://x.org",
    }
    assert licence_text(card_fields(own)) == "Licence: ours (https://x.org)."
    assert licence_text({}).startswith("Licence: not stated.")


def test_a_gguf_file_states_its_licence(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_license_link("LICENSE")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    config = make_config(model=str(tmp_path / "model.gguf"), data=["a text"], output="x")
    assert card_fields(config) == {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ("license: [mit, apache-2.0]", {}),
        ("license: >\n  mit", {}),
        ("license_name: mine", {}),
        ("license: other\nlicense_link: LICENSE", {"license": "other"}),
        ('license: "mit"', {"license": "mit"}),
        ("", {}),
    ],
)
def test_only_a_plain_licence_is_taken(tmp_path: Path, block: str, found: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(f"---\n{block}\n---\n")
    config = make_config(model=str(tmp_path), data=["a text"], output="x")
    assert card_fields(config) == found


def test_names_on_the_hub_are_named_and_paths_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('["a", "b"]\n')
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr(provenance, "hf_hub_download", lambda *_: str(card))
    config = make_config(
        model="owner/base",
        data={"train": ["owner/rows:train", {"path": "a/b/c:test[:5]"}, "chats.jsonl"]},
        output="x",
    )
    assert card_fields(config) == {
        "license": "other",
        "license_link": "https://huggingface.co/owner/base/blob/main/LICENSE",
        "base_model": "owner/base",
        "datasets": ["a/b", "owner/rows"],
    }


def test_a_card_that_cannot_be_fetched_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: str) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(provenance, "hf_hub_download", fails)
    config = make_config(model="owner/base", data=["a text"], output="x")
    assert card_fields(config) == {"base_model": "owner/base"}


def test_run_and_export_write_the_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(CARD)
    sftx.train(
        model="base",
        data={"rows": [[f"{i}?", f"{i}!"] for i in range(4)], "cache": str(tmp_path / "cache")},
        output="run",
        license="our own: v1",
        license_link="https://x.org",
        runtime={"threads": 1, "progress": False},
    )
    assert main(["export", "run", "to=exported"]) == 0
    expected = {
        "license": "other",
        "license_name": "our own: v1",
        "license_link": "https://x.org",
    }
    for folder in (tmp_path / "run", tmp_path / "exported"):
        assert expected.items() <= metadata(folder).items()
    assert "Licence: our own: v1 (https://x.org)." in (tmp_path / "exported/README.md").read_text()
