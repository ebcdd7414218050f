"""The box that templates run in: what a template asks of it directly, without a row around."""

from __future__ import annotations

import pytest

from sftx.data import sandbox
from sftx.data.sandbox import LimitError, compile_template, run_template


def test_a_text_longer_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CHARACTERS", 1000)
    template = compile_template("{% for i in range(n) %}0123456789{% endfor %}")
    assert len(run_template(template, {"n": 100})) == 1000
    with pytest.raises(LimitError, match="1,010 characters"):
        run_template(template, {"n": 101})


@pytest.mark.parametrize("thing", ["namespace(a=1)", "loop"])
@pytest.mark.parametrize("name", ["__class__", "_iterator", "_Namespace__attrs"])
def test_what_jinja_makes_shows_nothing_of_python(thing: str, name: str) -> None:
    """Names that begin with an underscore are as if they were not there."""
    template = compile_template("{% for i in [1] %}{{ " + f"{thing}.{name}" + " }}{% endfor %}")
    assert run_template(template, {}) == ""
