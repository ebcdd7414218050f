"""A conversation longer than `data.max_length`, cut between its turns.

Each piece is a conversation by itself, rendered as a server would render it: the system message and
the tools stay, the oldest turns are gone, and what is left begins at a user's message. Where even
the exchanges since the last user's message are too long, that message stays and the oldest
exchanges behind it (calls with their results) are gone.

How many tokens a conversation will have is estimated, and known once it is rendered; a piece that
turns out too long is made again with less.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from sftx.data.chat.conversation import ChatMessage, Conversation, Share, reasoning_of
from sftx.data.truncation import Fitted, TokenSequence, fit
from sftx.types import RowError, joined_notes

Render = Callable[[Conversation], list[TokenSequence]]
"""The token sequences of a conversation; `RowError` if it cannot be rendered."""
Count = Callable[[Sequence[str]], list[int]]
"""The tokens of each text."""
_MARKUP = 6.0  # tokens that a template writes around one message, until that is measured


def shorten(
    sequences: Sequence[TokenSequence],
    conversation: Conversation,
    render: Render,
    count: Count,
    max_length: int,
) -> list[Fitted]:
    """Make the sequences of a conversation at most `max_length` tokens long, without losing a
    target.

    Where no cut between turns helps (one message and its answer are longer than that), tokens are
    cut as `fit` does.
    """
    trained = conversation.trained
    outputs = sum(len(sequence.spans) for sequence in sequences)
    if outputs != len(trained):
        # An output without tokens: whose the spans are is not known.
        return [fit(sequence, max_length, "split") for sequence in sequences]
    sizes = count([_text(message) for message in conversation.messages])
    used: set[int] = set()  # messages that stand in some piece
    results: list[Fitted] = []
    done = 0
    for sequence in sequences:
        turns = trained[done : done + len(sequence.spans)]
        done += len(turns)
        if len(sequence.ids) <= max_length:
            results.append(Fitted([sequence]))
            used.update(range(turns[-1] + 1))
        else:
            cut = _Cut(conversation, render, sizes, max_length, used)
            results.append(cut.pieces(sequence, turns))
    gone = set(range(trained[-1] + 1)) - used
    results[0] = _with_losses(results[0], conversation, gone, sizes)
    return results


def _with_losses(
    first: Fitted, conversation: Conversation, gone: set[int], sizes: Sequence[int]
) -> Fitted:
    """The first sequence of a row, with the loss of the messages that are in no piece."""
    tokens = first.tokens_lost
    targets = first.targets_lost
    for i in gone:
        tokens += sizes[i]
        if conversation.shares and conversation.shares[i].content:
            targets += sizes[i]
    return replace(first, tokens_lost=tokens, targets_lost=targets)


class _Opening(NamedTuple):
    """How a piece begins behind the system message: with the messages of `anchor`, then all from
    `begin` on.
    """

    anchor: tuple[int, ...]
    begin: int


class _Cut:
    """One sequence that is too long, on its way to pieces."""

    def __init__(
        self,
        conversation: Conversation,
        render: Render,
        sizes: Sequence[int],
        max_length: int,
        used: set[int],
    ) -> None:
        self.messages = conversation.messages
        self.conversation = conversation
        self.render = render
        self.sizes = sizes  # tokens of the text of each message
        self.max_length = max_length
        self.length = 0  # tokens of the sequence
        self.whole: list[int] = []  # the messages in it
        self.markup = _MARKUP
        self.used = used  # messages that stand in some piece
        self.base = 0.0  # tokens that are there whatever messages are kept, such as those of tools
        roles = [message["role"] for message in self.messages]
        others = [i for i, role in enumerate(roles) if role not in ("system", "developer")]
        self.head: list[int] = []  # the messages before all others, which stay
        if others:
            self.head = list(range(others[0]))
        self.users = [i for i, role in enumerate(roles) if role == "user"]
        self.answers = [i for i, role in enumerate(roles) if role == "assistant"]

    def pieces(self, sequence: TokenSequence, turns: Sequence[int]) -> Fitted:
        """Pieces that train `turns`, each of them in one."""
        self.length = len(sequence.ids)
        self.whole = list(range(turns[-1] + 1))
        self.base = max(self.length - self._estimate(self.whole), 0.0)
        barest = self._openings(turns[0])[-1]
        self._rendered(self._kept(barest, turns[0]), turns[:1])  # measures what markup takes
        pieces: list[TokenSequence] = []
        lost = 0
        left = list(turns)
        while left:
            kept, piece = self._next(left)
            self.used.update(kept)
            if len(piece.ids) <= self.max_length:
                pieces.append(piece)
            else:
                cut = fit(piece, self.max_length, "split")
                pieces += cut.pieces
                lost += cut.tokens_lost
            left = [turn for turn in left if turn > kept[-1]]
        return Fitted(pieces, lost)

    def _next(self, turns: Sequence[int]) -> tuple[list[int], TokenSequence]:
        """The messages and the tokens of a piece that trains the first of `turns`, and as many more
        as fit.

        Where nothing fits, it is the shortest that can be rendered, and trains the first alone.
        """
        openings = self._openings(turns[0])
        least, number = self._guess(openings, turns)
        at = self._earliest(openings[: least + 1], turns[number - 1])
        shortest: tuple[list[int], TokenSequence] | None = None
        while at < len(openings):
            last = turns[number - 1]
            kept = self._kept(openings[at], last)
            piece = self._rendered(kept, turns[:number])
            if piece is None:
                if number == 1:
                    at += 1
                number = 1
                continue
            if len(piece.ids) <= self.max_length:
                return kept, piece
            if number == 1:
                shortest = kept, piece
            if at < least or number == 1:
                at += 1
            else:
                number -= 1
        return shortest or self._from_the_first(turns[0])

    def _from_the_first(self, turn: int) -> tuple[list[int], TokenSequence]:
        """All messages up to `turn`, for a template that wants the turns from the first on."""
        kept = list(range(turn + 1))
        piece = self._rendered(kept, [turn])
        if piece is None:
            raise RowError(
                f"turn {turn}: the row is longer than data.max_length {self.max_length:,}, and its "
                "turns cannot be rendered one by one, to be cut apart"
            )
        return kept, piece

    def _openings(self, turn: int) -> list[_Opening]:
        """Where a piece that trains `turn` may begin, from the most context to the least."""
        begin = len(self.head)
        found = [_Opening((), begin)]
        anchor: tuple[int, ...] = ()
        last = begin
        for i in self.users:
            if i <= turn:
                anchor = (i,)
                last = i
                if i > begin:
                    found.append(_Opening((), i))
        for i in self.answers:
            if last + 1 < i <= turn:
                found.append(_Opening(anchor, i))
        return found

    def _guess(self, openings: Sequence[_Opening], turns: Sequence[int]) -> tuple[int, int]:
        """The opening with the least context to be content with, and how many turns fit behind it,
        by estimate.

        That is the question with all that follows it; where this is too long, the exchanges that
        fill half the room, and at least one.
        """
        costs = [self._cost(opening, turns[0]) for opening in openings]
        least = max(i for i, opening in enumerate(openings) if not opening.anchor)
        if costs[least] > self.max_length:
            least = self._half_full(costs, least + 1)
        fitting = [turn for turn in turns if self._cost(openings[least], turn) <= self.max_length]
        return least, max(len(fitting), 1)

    def _half_full(self, costs: Sequence[float], begin: int) -> int:
        """The first opening from `begin` on that leaves half the room for turns; else the first
        that fits, else the last.
        """
        barest = len(costs) - 1
        half = (costs[barest] + self.max_length) / 2
        for room in (half, self.max_length):
            for i in range(begin, barest):
                if costs[i] <= room:
                    return i
        return barest

    def _earliest(self, openings: Sequence[_Opening], end: int) -> int:
        """The opening with the most context that leaves room up to message `end`, by estimate; else
        the last.
        """
        for i, opening in enumerate(openings):
            if self._cost(opening, end) <= self.max_length:
                return i
        return len(openings) - 1

    def _kept(self, opening: _Opening, end: int) -> list[int]:
        return [*self.head, *opening.anchor, *range(opening.begin, end + 1)]

    def _cost(self, opening: _Opening, end: int) -> float:
        """The estimated tokens of a piece."""
        return self._estimate(self._kept(opening, end))

    def _estimate(self, kept: Sequence[int]) -> float:
        return self.base + self._text(kept) + self.markup * len(kept)

    def _text(self, kept: Sequence[int]) -> int:
        """Tokens of the texts of some messages."""
        return sum(self.sizes[i] for i in kept)

    def _learn(self, length: int, kept: Sequence[int]) -> None:
        """Fit the estimate to the whole sequence and to a piece of `length` tokens, both of which
        are known.
        """
        more = len(self.whole) - len(kept)
        if more:
            text = self._text(self.whole) - self._text(kept)
            self.markup = (self.length - length - text) / more
        self.base += length - self._estimate(kept)

    def _rendered(self, kept: Sequence[int], turns: Sequence[int]) -> TokenSequence | None:
        """The tokens of some messages that train some turns; None if the template refuses, or they
        share none.
        """
        whole = self.conversation
        messages = [self.messages[i] for i in kept]
        weights = [0.0] * len(kept)
        for k, i in enumerate(kept):
            if i in turns:
                weights[k] = whole.weights[i]
        shorter = Conversation(messages, weights, whole.tools, dict(whole.kwargs))
        if whole.shares:
            shorter.shares = [self._share(i) for i in kept]
        try:
            sequences = self.render(shorter)
        except RowError:
            return None
        if len(sequences) != 1:
            return None
        sequence = sequences[0]
        self._learn(len(sequence.ids), kept)
        dropped = kept[-1] + 1 - len(kept)
        if not dropped:
            return sequence
        note = joined_notes(sequence.note, f"without {dropped} earlier messages")
        return replace(sequence, note=note, shortened=True)

    def _share(self, i: int) -> Share:
        """What message `i` counts in a piece: a content that stands in an earlier piece counts
        there.
        """
        share = self.conversation.shares[i]
        if i in self.used:
            return share._replace(content=0.0)
        return share


def _text(message: ChatMessage) -> str:
    """All that a message says."""
    said = message["content"] + reasoning_of(message)
    calls = message.get("tool_calls")
    if calls:
        said += json.dumps(calls, ensure_ascii=False)
    return said
