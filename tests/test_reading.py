"""How much a reader must read has limits, and they may only fall.

`python tests/reading.py` prints the figures. A limit that is not yet the aim is the figure measured
last: lower it with every change that lowers the figure, and never raise it. (Raised once, from
104,600 tokens on the run path, when evaluation by answers, token accuracy, weights by role, the
report and the trackers came into a run; from 127,600, when shared prefixes, padded batches, context
parallelism, mirrors and faster mixtures of experts did; from 147,650, when dense code was written as
named steps, and routers and the memory of answers came into a run.)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import reading

SOURCE = Path(__file__).parents[1] / "src" / "sftx"


class Limit(NamedTuple):
    """The most that a figure may be now, and the aim."""

    now: float
    aim: float


LIMITS = {
    "tokens on the run path": Limit(now=151_800, aim=55_000),
    "tokens per line of code": Limit(now=8.5, aim=8.5),
    "annotations with Any, in percent": Limit(now=5.0, aim=5),
    "functions of a complexity over 10": Limit(now=0, aim=0),
    "lines of the longest file": Limit(now=400, aim=400),
    "lines of the longest function": Limit(now=60, aim=60),
}


@cache
def measured() -> dict[str, float]:
    """The figures of the working tree, by the names of the limits."""
    found = reading.figures(SOURCE)
    return {
        "tokens on the run path": found.run_path_tokens,
        "tokens per line of code": found.tokens_per_line,
        "annotations with Any, in percent": found.any_share,
        "functions of a complexity over 10": found.complex_functions,
        "lines of the longest file": found.longest_file.lines,
        "lines of the longest function": found.longest_function_lines,
    }


@pytest.mark.parametrize("name", LIMITS)
def test_a_figure_is_within_its_limit(name: str) -> None:
    figure, limit = measured()[name], LIMITS[name].now
    assert figure <= limit, f"{name}: {figure:,.1f}, at most {limit:,}; see tests/reading.py"


def test_every_figure_has_a_limit_that_has_not_passed_its_aim() -> None:
    assert measured().keys() == LIMITS.keys()
    for name, limit in LIMITS.items():
        assert limit.now >= limit.aim, f"{name}: the aim is reached; the limit is {limit.aim:,}"


def test_what_is_counted(tmp_path: Path) -> None:
    """Names and signs count; comments, docstrings and white space do not."""
    text = '"""Said."""\n\n# why\nfrom typing import Any\n\n\ndef f(x: Any) -> int:\n'
    text += '    """Done."""\n    if x and x > 1:\n        return 1\n    return 2\n'
    path = tmp_path / "module.py"
    path.write_text(text)
    module = reading.measure(path, "module")
    assert (module.lines, module.code_lines, module.tokens) == (11, 5, 25)
    assert reading.annotation_texts(module.tree) == ["Any", "int"]
    (function,) = [node for node in module.tree.body if isinstance(node, reading.ast.FunctionDef)]
    assert reading.complexity(function) == 3
