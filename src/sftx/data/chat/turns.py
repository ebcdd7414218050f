"""A chat template, and the trained turns of conversations rendered with it."""

from __future__ import annotations

from typing import Literal

from sftx.data.chat.answer import Answer, Turn, last_added, thought_of
from sftx.data.chat.conversation import Conversation
from sftx.data.chat.renderer import TOOLS, USER, Renderer, calls, says, says_calls
from sftx.data.chat.thoughts import open_tag
from sftx.data.chat.traits import Switch, Traits
from sftx.data.tokenizer import Tokenizer
from sftx.types import RowError, joined_notes

LOST_REASONING = "reasoning left out by the template"


class ChatTemplate:
    """A chat template. `UserError` if it does not compile."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        forced_opening: Literal["close", "error"] = "close",
        name: str = "chat template",
        lost_reasoning: Literal["note", "error"] = "note",
    ):
        self.source = source
        self.name = name
        self._tokenizer = tokenizer
        self._close_opening = forced_opening == "close"
        self._lost_reasoning = lost_reasoning
        renderer = Renderer(source, tokenizer.special, name)
        self.render = renderer.render
        self.traits = Traits(renderer, tokenizer)

    @property
    def stop_id(self) -> int | None:
        """The token that ends an output with this template: its stop token, else EOS."""
        stop = self.traits.ending.stop
        if stop is None:
            return self._tokenizer.eos_id
        return self._tokenizer.backend.token_to_id(stop)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end outputs: `stop_id`, and the one after a tool call where that is
        another.
        """
        found = {self.stop_id, self._stop_id_of_call()}
        return frozenset(token for token in found if token is not None)

    def _stop_id_of_call(self) -> int | None:
        """The token that ends a tool call; None where none does."""
        called = [says("user", USER), says_calls(calls({}))]
        try:
            turn = self.turn(Conversation(called, [0.0, 1.0], TOOLS), 1)
        except RowError:
            return None
        last = last_added(self._tokenizer, turn.output)
        if last is None or not turn.ends:
            return None
        return self._tokenizer.backend.token_to_id(last.group())

    def turns(self, conversation: Conversation) -> list[Turn]:
        """All trained turns, as `turn` gives them."""
        return [self.turn(conversation, t) for t in conversation.trained]

    def turn(self, conversation: Conversation, t: int) -> Turn:
        """Prompt and output of turn `t`. `RowError` if no faithful rendering exists."""
        message = conversation.messages[t]
        if message["role"] != "assistant":
            return Answer(self.traits, conversation, t, {}).turn_of_another()
        thought = thought_of(message, self.traits.thought_tag).strip()
        refusal: RowError | None = None
        without_thought: Turn | None = None
        for switch in self._switches(conversation, t, bool(thought)):
            try:
                turn = Answer(self.traits, conversation, t, switch).turn(self._close_opening)
            except RowError as error:
                refusal = refusal or error
                continue
            if thought in turn.output:
                return turn
            without_thought = without_thought or turn
        if without_thought is None:
            assert refusal is not None
            raise refusal
        if self._lost_reasoning == "error":
            raise RowError(
                f"turn {t}: the {self.name} leaves out the reasoning; {self.how_to_keep_thoughts()}"
            )
        without_thought.note = joined_notes(LOST_REASONING, without_thought.note)
        return without_thought

    def how_to_keep_thoughts(self) -> str:
        """What a user can do against lost reasoning."""
        setting = self.traits.keeps_thoughts
        if setting:
            return f"chat_template_kwargs {setting} in a row keeps it"
        return "set data.template to a template that writes reasoning_content"

    def _switches(self, conversation: Conversation, t: int, thinks: bool) -> list[Switch]:
        """The settings of the template to try, best first; those that a row sets itself stay as
        they are.
        """
        own = self.traits.switches[thinks]
        if not own or own.keys() & conversation.kwargs.keys():
            return [{}]
        if thinks:
            return [{}, own]
        plain = Answer(self.traits, conversation, t, {})
        prompt = plain.prompt()
        if not open_tag(prompt) or plain.full.startswith(prompt):
            return [{}]
        return [own, {}]
