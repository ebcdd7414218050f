"""The tool calls of an answer, told apart from its text while the answer is being written."""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from sftx.boundary import boundary
from sftx.eval.call_forms import BROKEN, calls_of


class CallStream:
    """Takes the text of an answer bit by bit, and gives back what is no call. From the beginning of
    the first call on everything is held back until the answer has ended: then either all calls are
    whole, or that text is given back as it came.

    `response_template`: how the model writes calls, as transformers takes it. `tools`: those of the
    request, whose schemas say of which type an argument is. `control`: the special tokens, which are
    part of calls and of nothing that is given back. Without a template (None) all text is given back.

    Raises:
        UserError: the template is none.
    """

    def __init__(
        self,
        response_template: dict[str, Any] | None,
        tools: list[dict[str, Any]],
        control: re.Pattern[str],
    ) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._control = control
        self._parser: ResponseParser | None = None
        if response_template is not None:
            with boundary("tokenizer_config.json: response_template cannot be used"):
                self._parser = ResponseParser(response_template, prefix="", tools=[*tools])
        self._held = ""  # text that was not given back
        self._after = ""  # text behind a call
        self._calling = self._broken = False

    @property
    def reads(self) -> bool:
        """Whether calls are looked for."""
        return self._parser is not None

    def feed(self, text: str) -> str:
        """What may be shown now that `text` has come."""
        if self._parser is None:
            return text
        self._held += text
        if self._broken:
            return ""
        try:
            return self._plain(self._shown(self._parser.feed(text)))
        except BROKEN:
            self._broken = self._calling = True
            return ""

    def end(self) -> str:
        """The rest of the text, when the answer has ended; `calls` holds the calls."""
        if self._parser is None or self._broken:
            return self._plain(self._held)
        try:
            message, events = self._parser.finalize()
            shown = self._shown(events)
            self.calls = calls_of(message)
        except BROKEN:
            return self._plain(self._held)
        if not self.calls:
            return self._plain(shown + self._held)
        return self._plain(shown + (self._after if self._after.strip() else ""))

    def _plain(self, text: str) -> str:
        return self._control.sub("", text)

    def _shown(self, events: list[dict[str, Any]]) -> str:
        shown = ""
        for event in events:
            if event["field"] == "tool_calls":
                self._calling = True
            elif event["type"] != "region_chunk" or event["field"] != "content":
                continue
            elif self._calling:
                self._after += event["text"]
            else:
                shown += event["text"]
                self._held = self._held.partition(event["text"])[2]
        return shown
