"""Talk to a model in the terminal: `sftx chat MODEL`, beside its base with base=.

MODEL is a folder, the folder of an adapter, or a name on the hub. Prompts, stop tokens and sampling
settings are those of the folder, as a server uses them; the keys below change the settings. A line is
a message; a line that ends in a backslash goes on in the next. Ctrl-C ends an answer, Ctrl-D the chat.

In the chat: /system TEXT, /reset, /retry, /save FILE (a row that sftx trains on), /set KEY=VALUE,
/help, /quit.
"""

from __future__ import annotations

from collections.abc import Mapping

from sftx.model.runtime import machine
from sftx.settings.schema import Config
from sftx.talk.load import load_assistants
from sftx.talk.sampling import sampling_of
from sftx.talk.terminal import Chat, Screen

STAGE = "talk"
EXAMPLE = "sftx chat runs/first"
POSITIONAL = ("model",)
GROUPS = ("sampling", "answers")
SETTINGS = ("model", "runtime", "data.template")
EXTRA = {
    "base": "A model that answers beside it: a folder, a hub name, or `own` (an adapter's base).",
    "under": "The model under an adapter, where it is another than the adapter's files name.",
    "system": "The system message.",
    "thoughts": "show or hide what the model thinks before it answers; default: show.",
}
DEFAULTS = ("output=unused", "data=unused")


def run(
    config: Config,
    base: str = "",
    under: str = "",
    system: str = "",
    thoughts: str = "show",
    sampling: Mapping[str, str] | None = None,
    answers: Mapping[str, str] | None = None,
) -> int:
    """Talk until the input ends."""
    screen = Screen(thoughts)
    chosen = sampling_of({**(sampling or {}), **(answers or {})})
    with machine(config.runtime) as here:
        with screen.console.status("loading the model"):
            assistants = load_assistants(config.model, config.data.template, base, under, here)
        Chat(screen, assistants, chosen, system).run()
    return 0
