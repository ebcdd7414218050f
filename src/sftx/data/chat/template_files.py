"""The texts of the chat templates that `data.template` names."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from sftx.data.tokenizer import Tokenizer
from sftx.types import UserError

_USED = ("default", "tool_use")  # of the templates of a tokenizer


class TemplateText(NamedTuple):
    """The text of a template, and what to call it in messages."""

    text: str
    label: str


def bundled_templates() -> list[str]:
    """Names of the templates that come with sftx."""
    names = [entry.name for entry in (resources.files("sftx.data") / "templates").iterdir()]
    return sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja"))


def template_texts(setting: str, tokenizer: Tokenizer) -> dict[str, TemplateText]:
    """The templates by name ("default", maybe "tool_use"); {} for none.

    Raises:
        UserError: there is no such template.
    """
    if setting == "none":
        return {}
    if setting == "auto":
        return {
            name: TemplateText(tokenizer.chat_templates[name], "chat template")
            for name in _USED
            if name in tokenizer.chat_templates
        }
    return {"default": TemplateText(_named_text(setting, tokenizer), f"template {setting}")}


def _named_text(setting: str, tokenizer: Tokenizer) -> str:
    if setting in bundled_templates():
        file = resources.files("sftx.data") / "templates" / f"{setting}.jinja"
        # A bundled template does not know the tokenizer: where that begins every text with BOS,
        # the template must.
        begin = "{{- bos_token -}}\n" if tokenizer.adds_bos else ""
        return begin + file.read_text(encoding="utf-8")
    if not Path(setting).is_file():
        raise UserError(
            f"data.template: {setting!r} is neither a file nor one of auto, none, "
            f"{', '.join(bundled_templates())}"
        )
    try:
        return Path(setting).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.template: {setting}: cannot be read as UTF-8 text: {error}"
        ) from None
