"""The models that are to answer: a folder, an adapter on its base, and a base beside it."""

from __future__ import annotations

from threading import Lock
from typing import Any

from sftx.data.chat.template_files import template_texts
from sftx.data.chat.turns import ChatTemplate
from sftx.data.tokenizer import Tokenizer
from sftx.eval.served import adapter_in, on_base, put_adapter
from sftx.model.load import load_model
from sftx.model.runtime import Machine
from sftx.model_config import config_file, read_json
from sftx.settings.schema import Model
from sftx.talk.assistant import Assistant
from sftx.types import UserError

OWN = "own"
"""`base=own`: the adapter's own base, which is the same model with the adapter switched off."""


def load_assistants(
    model: Model, template: str, base: str, base_name: str, here: Machine
) -> list[Assistant]:
    """The assistant of `model`, and behind it that of `base` where one is named: a folder, a name
    on the hub, or `own`.

    `template`: as `data.template`. `base_name`: the model under an adapter, where the caller names
    another than its adapter_config.json does.

    Raises:
        UserError: a folder is damaged, there is no chat template, or `own` is asked of a model that
            is no adapter.
    """
    adapter = adapter_in(model.path)
    if base == OWN and adapter is None:
        raise UserError(f"base={OWN}: {model.path} is no adapter; name its base: base=FOLDER")
    source = model
    if adapter is not None:
        source = on_base(model, adapter, base_name)
    tokenizer = Tokenizer.of_model(source)
    chat = chat_templates(template, tokenizer, model.path)
    calls = _response_template(source)
    loaded = load_model(source, here.device, here.precision).eval()
    loaded.config.use_cache = True
    lock = Lock()
    wrapped = None if adapter is None else put_adapter(loaded, adapter).eval()
    found = [Assistant(_name(model.path), loaded, tokenizer, chat, lock, wrapped, calls=calls)]
    if base == OWN:
        found.append(Assistant("base", loaded, tokenizer, chat, lock, wrapped, True, calls))
    elif base:
        other = model.model_copy(update={"path": base, "tokenizer": None})
        found += load_assistants(other, template, "", "", here)
        found[-1].name = "base"
    return found


def chat_templates(setting: str, tokenizer: Tokenizer, path: str) -> dict[str, ChatTemplate]:
    """The templates that write the prompts, by name: "default", and "tool_use" where there is one;
    {} for `none`.

    Raises:
        UserError: there is none, or it does not compile.
    """
    texts = template_texts(setting, tokenizer)
    if texts or setting == "none":
        return {
            name: ChatTemplate(text, tokenizer, name=label) for name, (text, label) in texts.items()
        }
    raise UserError(
        f"{path} has no chat template: it was not trained to hold conversations. Set "
        "data.template= to the template it was trained with (plain, chatml, a .jinja file), or to "
        "none (the text goes to the model as it is)"
    )


def _response_template(model: Model) -> dict[str, Any] | None:
    """How the model writes tool calls, where its tokenizer's folder says so."""
    config = config_file(model.tokenizer or model.path)
    found = read_json(config.with_name("tokenizer_config.json")).get("response_template")
    return found if isinstance(found, dict) else None


def _name(path: str) -> str:
    """What a model is called: the last part of its path."""
    return path.rstrip("/").rpartition("/")[2] or path
