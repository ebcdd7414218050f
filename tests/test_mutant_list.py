"""The list of mutants fits the code: each names a text that stands there once, and tests that are
there. The mutants themselves are tried by `python tests/mutants.py`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from mutant_list import MUTANTS, Mutant

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "sftx"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_text_stands_in_the_code_exactly_once(mutant: Mutant) -> None:
    text = (SOURCE / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    broken = text.replace(mutant.old, mutant.new)
    assert broken != text
    compile(broken, mutant.file, "exec")


def test_names_are_unique() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len({*names})


@pytest.mark.parametrize("tests", sorted({each for m in MUTANTS for each in m.tests}))
def test_the_tests_that_must_notice_it_are_there(tests: str) -> None:
    first, *_ = words = shlex.split(tests)
    if first == "scorecard":
        assert all(number.isdecimal() for word in words[1:] for number in word.split(","))
        return
    files = [word for word in words if word.startswith("test_")]
    assert files == [word for word in files if (TESTS / word).is_file()]
