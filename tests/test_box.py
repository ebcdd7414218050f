"""The box that templates run in: what a template asks of it directly, without a row around."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest

from sftx.data.chat import limits, sandbox
from sftx.data.chat.limits import LimitError
from sftx.data.chat.sandbox import compile_template, run_template


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


def test_an_interruption_that_comes_late_ends_the_text_that_it_was_meant_for() -> None:
    """The watch has fired, and the rendering ends before the interruption is there: nothing after
    it may be hit.
    """
    watch = limits._Watch()
    target, interruption = ctypes.c_ulong(watch.target), ctypes.py_object(limits._Interruption)
    late = threading.Timer(0.1, ctypes.pythonapi.PyThreadState_SetAsyncExc, (target, interruption))

    def rendered() -> None:
        with watch.deadline():
            watch.fired = True
            late.start()
        time.sleep(0.5)  # what comes after the text

    with pytest.raises(LimitError) as ended:
        rendered()
    late.join()
    assert type(ended.value) is LimitError, "the interruption itself, and too late"
