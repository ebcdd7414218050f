"""Talk to a model in the terminal: `sftx chat MODEL`, beside its base with base=.

MODEL is a folder, the folder of an adapter, or a name on the hub. Prompts, stop tokens and sampling
settings are those of the folder, as a server uses them; the keys below change the settings. A line is
a message; a line that ends in a backslash goes on in the next. Ctrl-C ends an answer, Ctrl-D the chat.

In the chat: /system TEXT, /reset, /retry, /save FILE (a row that sftx trains on), /set KEY=VALUE,
/help, /quit.
"""

from __future__ import annotations

from sftx.model.runtime import machine
from sftx.settings.schema import Config
from sftx.talk.load import load_assistants
from sftx.talk.terminal import Chat, Screen, sampling_of

STAGE = "talk"
EXAMPLE = "sftx chat runs/first"
POSITIONAL = ("model",)
EXTRA = {
    "base": "A model that answers beside it: a folder, a hub name, or `own` (an adapter's base).",
    "under": "The model under an adapter, where it is another than the adapter's files name.",
    "system": "The system message.",
    "temperature": "0 = always the most probable token; default: the folder's.",
    "top_p": "Sample from the most probable tokens that make up this probability together.",
    "top_k": "Sample from this many most probable tokens.",
    "repetition_penalty": "Above 1: make tokens that have come before less probable.",
    "max_tokens": "Most tokens of an answer; default: 1024.",
    "seed": "Of the sampling; default: another one for each answer.",
    "stop": "A text at which answers are cut.",
    "thoughts": "show or hide what the model thinks before it answers; default: show.",
}
DEFAULTS = ("output=unused", "data=unused")


def run(
    config: Config,
    base: str = "",
    under: str = "",
    system: str = "",
    thoughts: str = "show",
    temperature: str = "",
    top_p: str = "",
    top_k: str = "",
    repetition_penalty: str = "",
    max_tokens: str = "",
    seed: str = "",
    stop: str = "",
) -> int:
    """Talk until the input ends."""
    screen = Screen(thoughts)
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
        "stop": stop,
    }
    chosen = sampling_of({key: text for key, text in given.items() if text})
    with machine(config.runtime) as here:
        with screen.console.status("loading the model"):
            assistants = load_assistants(config.model, config.data.template, base, under, here)
        Chat(screen, assistants, chosen, system).run()
    return 0
