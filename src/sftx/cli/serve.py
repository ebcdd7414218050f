"""Serve a model to programs and a browser, on this machine: `sftx serve MODEL`.

A small endpoint of the OpenAI chat API (chat completions, streaming, the list of models) at
http://127.0.0.1:8000/v1, and a page at http://127.0.0.1:8000/ that puts the answers of a model and of
its base side by side (base=). It answers one request at a time, with the template, stop tokens and
sampling settings of the model's folder: for trying, and for tests. The command of a real server that
fits the model is printed at the start. The settings of sampling below hold where a request names none.
Any other address than this machine's own needs token=.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from sftx.cli._inputs import whole_number
from sftx.model.runtime import machine
from sftx.settings.schema import Config
from sftx.talk.endpoint import Endpoint
from sftx.talk.load import load_assistants
from sftx.talk.real_servers import commands
from sftx.talk.sampling import sampling_of
from sftx.talk.terminal import Screen

STAGE = "talk"
EXAMPLE = "sftx serve runs/first"
POSITIONAL = ("model",)
GROUPS = ("sampling", "answers")
SETTINGS = ("model", "runtime", "data.template")
EXTRA = {
    "base": "A model to compare it with: a folder, a hub name, or `own` (an adapter's base).",
    "under": "The model under an adapter, where it is another than the adapter's files name.",
    "host": "The address to listen at; default: 127.0.0.1, this machine alone.",
    "port": "The port; 0 = a free one; default: 8000.",
    "token": "What clients must send (Authorization: Bearer TOKEN); default: SFTX_TOKEN, if set.",
}
DEFAULTS = ("output=unused", "data=unused")


def run(
    config: Config,
    base: str = "",
    under: str = "",
    host: str = "127.0.0.1",
    port: str = "8000",
    token: str = "",
    sampling: Mapping[str, str] | None = None,
    answers: Mapping[str, str] | None = None,
) -> int:
    """Serve until Ctrl-C."""
    screen = Screen("show")
    chosen = sampling_of({**(sampling or {}), **(answers or {})})
    number = whole_number("serve port", port, 0)
    secret = token or os.environ.get("SFTX_TOKEN", "")
    # The address first: a mistake in it should not wait for the model.
    endpoint = Endpoint([], chosen, host, number, secret, screen.say)
    with endpoint, machine(config.runtime) as here:
        with screen.console.status("loading the model"):
            found = load_assistants(config.model, config.data.template, base, under, here)
        endpoint.assistants |= {assistant.name: assistant for assistant in found}
        for note in (note for assistant in found for note in assistant.notes):
            screen.say(f"note: {note}")
        for line in commands(config.model.path):
            screen.say(line, "dim")
        screen.say(f"serving {', '.join(endpoint.assistants)} at {endpoint.url}/v1")
        screen.say(f"the page to compare answers: {endpoint.url}/   (Ctrl-C ends it)")
        try:
            endpoint.serve_forever()
        except KeyboardInterrupt:
            screen.say("ended")
    return 0
