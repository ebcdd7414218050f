"""What a server sends and where it stops, against what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sftx.settings.schema import Data
from sftx.types import Example, Row
from sftx.verify.finding import Finding, counted, does_not_apply
from sftx.verify.oracle import Server, conversation_of
from sftx.verify.sample import Sample, TakenRow

PROMPTS = "trained prompt ids = served prompt ids"
STOPS = "stop token learned"
_DIALOGUE = ("messages", "phrases")


def compare_prompts(sample: Sample, server: Server) -> Finding:
    """Every trained turn of every row: the ids that a server would send stand before it, and what
    follows them is trained.
    """
    how = "tokenizer.apply_chat_template of the saved folder, before every trained turn"
    data = sample.config.data
    rows = [taken for taken in sample.rows if taken.row.kind in _DIALOGUE]
    if not rows:
        return does_not_apply(PROMPTS, how, "the rows are no dialogues: they have no prompts")
    if not server.tokenizer.chat_template:
        why = "the model has no chat template: the caller joins the texts (data.template: none)"
        return does_not_apply(PROMPTS, how, why)
    plain = [taken for taken in rows if not server.spells_a_special_token(taken.row)]
    turns = [(taken, turn) for taken in plain for turn in trained_turns(taken.row, data)]
    if not turns:
        return does_not_apply(PROMPTS, how, "no turn of the assistant is trained")
    wrong = list(_wrong_prompts(turns, server))
    of = f"{len(turns):,} turns of {len(plain):,} rows"
    left_out = len(rows) - len(plain)
    if left_out:
        of += f"; {left_out:,} rows that spell special tokens are left out: a server obeys them"
    return counted(PROMPTS, how, len(wrong), of, wrong[0] if wrong else "")


def _wrong_prompts(turns: Sequence[tuple[TakenRow, int]], server: Server) -> Iterator[str]:
    for taken, turn in turns:
        served = server.prompt_ids(taken.row, turn)
        if not _is_trained_behind(served, taken.examples):
            yield _told(taken, turn, served, server)


def trained_turns(row: Row, data: Data) -> Iterator[int]:
    """The turns of the assistant that carry weight, by their number in the conversation."""
    messages = conversation_of(row)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if data.train_on == "last":
        answers = answers[-1:]
    elif data.train_on != "all" and "assistant" not in data.train_on:
        return
    for number in answers:
        given = row.messages[number] if row.messages else {}
        if number and given.get("train", True) and given.get("weight", 1.0):
            yield number


def _is_trained_behind(served: Sequence[int], examples: Sequence[Example]) -> bool:
    size = len(served)
    for example in examples:
        begins = example.ids[:size].tolist() == list(served)
        behind = example.weights[size : size + 1]
        if begins and behind.any():
            return True
    return False


def _told(taken: TakenRow, turn: int, served: Sequence[int], server: Server) -> str:
    """Where the prompt that is sent and the one that was trained part."""
    shared = 0
    nearest: list[int] = []
    for example in taken.examples:
        ids = example.ids.tolist()
        common = next(
            (at for at, (a, b) in enumerate(zip(ids, served, strict=False)) if a != b),
            min(len(ids), len(served)),
        )
        if common >= shared:
            shared = common
            nearest = ids
    sent = server.tokenizer.decode(list(served)[shared : shared + 12])
    trained = server.tokenizer.decode(nearest[shared : shared + 12])
    return (
        f"{taken.place}, message {turn + 1}: equal up to token {shared:,}; then a server sends "
        f"{sent!r}, and trained is {trained!r}"
    )


def check_stops(sample: Sample, server: Server) -> Finding:
    """In every dialogue the last target is a token at which the saved model stops."""
    how = "the last target of every example is in eos_token_id of the saved generation_config.json"
    dialogues = [taken for taken in sample.rows if taken.row.kind in _DIALOGUE]
    if not dialogues:
        return does_not_apply(STOPS, how, "the rows are no dialogues")
    wrong: list[str] = []
    for taken in dialogues:
        wrong += [
            f"{taken.place}: the last target is token {last}; the saved model stops at "
            f"{sorted(server.stop_ids) or 'none'}"
            for last in _last_targets(taken.examples)
            if last not in server.stop_ids
        ]
    examples = sum(len(taken.examples) for taken in dialogues)
    of = f"{examples:,} examples"
    return counted(STOPS, how, len(wrong), of, wrong[0] if wrong else "")


def _last_targets(examples: Sequence[Example]) -> Iterator[int]:
    for example in examples:
        yield int(example.ids[example.weights.nonzero()[0][-1]])
