"""The quick start: its corpus keeps its promises, and its pieces fit from the words to the last
printed line.
"""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from sftx import encode
from sftx.demo.quickstart import Size, run
from sftx.demo.village import Question, Village, build
from sftx.types import UserError

TINY = Size(people=6, retellings=2, hidden=32, layers=1, epochs=(1, 1))


@pytest.fixture(scope="module", params=[0, 7])
def village(request: pytest.FixtureRequest) -> Village:
    """The whole village, by two seeds."""
    return build(request.param)


def test_the_same_seed_makes_the_same_village() -> None:
    assert build(3, people=9) == build(3, people=9)
    assert build(3, people=9) != build(4, people=9)


def test_no_dialogue_asks_or_tells_what_is_held_out(village: Village) -> None:
    phrases = {phrase for dialogue in village.dialogues for phrase in dialogue}
    assert len({question.answer for question in village.held_out}) == len(village.held_out) == 80
    for question in village.held_out:
        assert question.text not in phrases
        assert question.answer not in phrases
        assert not [
            phrase for phrase in phrases if name_in(question) in phrase and question.fact in phrase
        ]


def test_the_chronicle_tells_every_fact_often(village: Village) -> None:
    sentences = [sentence for text in village.chronicle for sentence in text.split(". ")]
    for question in village.held_out:
        told = [
            sentence
            for sentence in sentences
            if name_in(question) in sentence and question.fact in sentence
        ]
        assert len(told) >= 8


def test_every_answer_in_a_dialogue_stands_in_the_chronicle(village: Village) -> None:
    """Stage 2 adds no fact: person and value of each of its answers meet in one paragraph of stage
    1.
    """
    for dialogue in village.dialogues[:100]:
        for answer in dialogue[1::2]:
            name = " ".join(answer.split()[:2])
            words = set(re.findall(r"\w+", answer)) - {
                "lives",
                "works",
                "as",
                "keeps",
                "likes",
                "best",
                "of",
                "all",
            }
            words -= {"spends", "the", "evenings"}
            assert any(
                name in text and words <= set(re.findall(r"\w+", text))
                for text in village.chronicle
            )


def test_a_village_has_no_more_people_than_names() -> None:
    with pytest.raises(UserError, match=r"from 1 to 80 have names, not 81"):
        build(people=81)


def name_in(question: Question) -> str:
    """First name and family name of the villager asked about."""
    return " ".join(question.opening.split()[:2])


class Tiny(NamedTuple):
    """A whole quick start, too small to learn anything: its folder and output."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Run over the remains of an earlier one."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "chronicle.txt").write_text("an earlier chronicle")
    (folder / "stage1").mkdir()
    (folder / "stage1" / "stale").write_text("")
    with redirect_stdout(StringIO()) as output:
        run(str(folder), seed=1, size=TINY)
    return Tiny(folder, output.getvalue())


def test_the_quick_start_runs_through_saved_folders(tiny: Tiny) -> None:
    folder = tiny.folder
    assert not (folder / "stage1" / "stale").exists()
    for stage, model in (("stage1", "untrained"), ("stage2", "stage1")):
        facts = json.loads((folder / stage / "run.json").read_text())
        assert facts["status"] == "finished"
        assert facts["config"]["model"]["path"] == str(folder / model)
        assert (folder / stage / "model.safetensors").exists()
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert rows == [[question.text, question.answer] for question in build(1, 6, 2).held_out]
    assert build(1, 6, 2).chronicle[0] in (folder / "chronicle.txt").read_text()


def test_the_answers_and_their_stop_token_are_trained_and_nothing_else(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder / "stage2")
    dialogue = ["Where does Ada live?", "Ada lives here.", "And Odo?", "Odo lives there."]
    (example,) = encode(dialogue, tokenizer)
    trained = tokenizer.decode(
        [i for i, weight in zip(example.ids, example.weights, strict=True) if weight]
    )
    assert trained == " Ada lives here.<|end|> Odo lives there.<|end|>"
    assert tokenizer.decode(example.ids) == (
        "<|user|> Where does Ada live?<|end|><|assistant|> Ada lives here.<|end|>"
        "<|user|> And Odo?<|end|><|assistant|> Odo lives there.<|end|>"
    )


def test_it_prints_both_stages_and_ends_with_the_result(tiny: Tiny) -> None:
    printed = tiny.printed
    assert "Stage 1, plain text: WHAT is true" in printed
    assert "Stage 2, dialogues: HOW to answer" in printed
    spoken, marks = re.findall(r"^( +<\|assistant\|>.*<\|end\|>)\n( +\^+)$", printed, re.MULTILINE)[
        0
    ]
    assert len(spoken) == len(marks)
    assert spoken[: marks.index("^")] == "  <|assistant|>"  # from there on, every token is a target
    last = printed.rstrip("\n").splitlines()[-1]
    assert re.fullmatch(r"held_out_exact_match before=\d\.\d\d after=\d\.\d\d seconds=\d+", last)


def test_only_an_earlier_quick_start_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a quick start"):
        run(str(tmp_path), size=TINY)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_the_whole_quick_start_learns_to_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(str(tmp_path / "demo"))
    last = capsys.readouterr().out.rstrip("\n").splitlines()[-1]
    before, after = (float(share) for share in re.findall(r"(?:before|after)=(\S+)", last))
    assert before < 0.05
    assert after >= 0.9
