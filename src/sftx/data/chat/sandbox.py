"""Chat templates are programs from strangers: here they are compiled and run, without access and
within limits.

The environment renders as the one in transformers does, to the letter. A template cannot reach
Python, files or the network (jinja2's immutable sandbox). Its limits cost ordinary rendering
nothing: a watchdog thread interrupts the series of small operations that most templates are. What
it cannot interrupt is one large operation (the text of a list that holds itself many times over).
For these the system refuses memory beyond `MEMORY` while templates run, and ends the process, which
shows its stacks, after `LAST` seconds. Such limits are of the whole process: they act only in
processes of our own (`limit_this_process`), never in one that calls the library and does other
things beside it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.filters import do_round
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 10.0  # of processor time: longest rendering of one text
LAST = 60.0  # seconds of processor time in one operation, after which the process is ended
CHARACTERS = 20_000_000  # longest text
MEMORY = 1 << 30  # bytes by which the process may grow during one rendering
ELEMENTS = 1_000_000  # of a list that a filter sorts or makes: sorting cannot be interrupted
BITS = 1_000_000  # of a whole number: multiplying longer ones cannot be interrupted
TOO_LATE = f"it ran longer than {SECONDS:g} s of processor time"
TOO_LARGE = f"it took more than {MEMORY >> 20:,} MiB of memory"
_UNLIMITED = resource.getrlimit(resource.RLIMIT_DATA)
_own_process = False


def limit_this_process() -> None:
    """Say that this process is ours: templates run under limits of memory and time that act on all
    of it.
    """
    global _own_process
    _own_process = True


class LimitError(TemplateError):
    """A template ran for too long or made too much text."""


class _Interruption(LimitError):
    """Raised by the watchdog inside the rendering thread, where it may arrive outside of any
    `except`.
    """

    def __init__(self) -> None:
        super().__init__("it ran for too long or took too much memory")


# What a template can raise: its own complaint, a mistake in it, or data that it does not expect.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)


class _Generation(Extension):
    """`{% generation %}` marks what the model says. The mark is ignored: outputs are found by what
    is served.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as in transformers: variables set inside stay inside.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    """jinja2's namespace without underscore names, which reach into Python."""
    values = dict(*args, **kwargs)
    if private := [name for name in values if str(name).startswith("_")]:
        raise SecurityError(
            f"a template may not store a name that begins with an underscore: {private[0]!r}"
        )
    return Namespace(values)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(...)` inside a template, without the class behind it, whose methods could change the
    row.
    """
    return dict(*args, **kwargs)


_DICT_METHODS = frozenset(dir(dict))
_HARMLESS = frozenset(
    ["startswith", "endswith", "strip", "lstrip", "rstrip", "split", "lower", "upper"]
)
_OF_JINJA = frozenset(
    ["_loop_vars", "_block_vars"]
)  # arguments that compiled templates add to every call
_TEXT_METHODS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, quicker where its answers are known, and without powers that take minutes."""

    intercepted_binops = frozenset(["**", "*"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _check_power(right)
            _check_number(left, right)
        else:
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # The sandbox asks a dozen questions of every attribute. For what templates are full of, the
        # answers are known.
        if type(obj) is dict and attribute not in _DICT_METHODS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is str and attribute in _TEXT_METHODS:
            return getattr(obj, attribute)
        if type(obj) in (Namespace, LoopContext) and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and __obj.__name__ in _HARMLESS and kwargs.keys() <= _OF_JINJA:
            return __obj(
                *args
            )  # what templates call most: the sandbox's questions have known answers
        return super().call(__context, __obj, *args, **kwargs)


def _check_power(exponent: Any) -> None:
    if isinstance(exponent, int) and abs(exponent) > 1000:
        raise LimitError(f"the template asks for a power of {exponent:.2g}")


def _check_number(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > BITS:
        raise LimitError(f"the template makes a number of more than {BITS:,} bits")


def _check_product(left: Any, right: Any) -> None:
    """Refuse to multiply where the result is too long a number, text or list."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > BITS:
            raise LimitError(f"the template makes a number of more than {BITS:,} bits")
        return
    for series, times in ((left, right), (right, left)):
        size = (
            len(series) * times
            if isinstance(series, str | list | tuple) and isinstance(times, int)
            else 0
        )
        if size > CHARACTERS:
            raise LimitError(
                f"the template makes a text or list of {size:,}; {CHARACTERS:,} are allowed"
            )


# Filters that look at every element of their input in one operation, or whose time grows faster
# than it.
_WHOLE = (
    "batch",
    "dictsort",
    "groupby",
    "list",
    "max",
    "min",
    "reverse",
    "slice",
    "sort",
    "sum",
    "unique",
)


def _limited(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses an input of more than `ELEMENTS`."""
    place = (
        0 if getattr(original, "jinja_pass_arg", None) is None else 1
    )  # the environment may come first

    @wraps(original)
    def limited(*args: Any, **kwargs: Any) -> Any:
        value = args[place] if len(args) > place else None
        if isinstance(value, str | list | tuple | dict) and len(value) > ELEMENTS:
            raise LimitError(
                f"the template gives {len(value):,} elements to `{name}`; {ELEMENTS:,} are allowed"
            )
        return original(*args, **kwargs)

    return limited


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    _check_power(precision)
    return do_round(value, precision, method)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def compile_template(source: str) -> jinja2.Template:
    """The compiled template. `jinja2.TemplateError` if its syntax is wrong."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters.update(tojson=_to_json, round=_round)
    environment.filters.update({name: _limited(name, environment.filters[name]) for name in _WHOLE})
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_dict,
        namespace=_namespace,
    )
    with watched(), _deadline():  # jinja2 computes constant expressions here
        template = environment.from_string(source)
    template.globals = dict(template.globals)
    return template


def run_template(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The text of a template; the time limit holds inside `watched()`. Raises one of
    `TEMPLATE_ERRORS`.
    """
    with _deadline():
        # What `template.render` does, without looking through its chained globals for every text.
        text = "".join(
            template.root_render_func(
                template.new_context({**template.globals, **variables}, shared=True)
            )
        )
    if len(text) > CHARACTERS:
        raise LimitError(f"the template made {len(text):,} characters")
    return text


def _deadline() -> AbstractContextManager[None]:
    """What holds the limits of one rendering, where this thread is `watched`."""
    watch: _Watch | None = getattr(_local, "watch", None)
    return watch.deadline() if watch else nullcontext()


class _Watch(threading.Thread):
    """Looks every few milliseconds whether the current rendering is over its limits, and interrupts
    it if so.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="sftx-template-watch")
        self.guard = threading.Lock()
        self.done = threading.Event()
        self.target = threading.get_ident()
        self.started: float | None = None
        self.fired = False
        self.reason = ""
        self.clock = (
            time.pthread_getcpuclockid(self.target)
            if hasattr(time, "pthread_getcpuclockid")
            else None
        )

    def spent(self) -> float:
        """Seconds of processor time of the rendering thread; of the whole process where threads are
        not told apart.
        """
        return time.process_time() if self.clock is None else time.clock_gettime(self.clock)

    def run(self) -> None:
        seen, memory, began = None, 0, 0.0
        while not self.done.wait(0.02):
            if _own_process:
                signal.setitimer(
                    signal.ITIMER_VIRTUAL, LAST
                )  # again: no operation has held up this loop for so long
            with self.guard:
                if self.started is None or self.fired:
                    continue
                if seen != self.started:  # a new rendering since the last look
                    seen, memory, began = self.started, _memory(), self.spent()
                    continue
                is_late = self.spent() - began > SECONDS
                is_large = _own_process and _memory() - memory > MEMORY
                if is_late or is_large:
                    self.fired, self.reason = True, TOO_LATE if is_late else TOO_LARGE
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(self.target), ctypes.py_object(_Interruption)
                    )

    @contextmanager
    def deadline(self) -> Iterator[None]:
        with self.guard:
            self.started, self.fired, self.reason = time.monotonic(), False, TOO_LARGE
        try:
            try:
                yield
            finally:
                self._end()
        except (_Interruption, MemoryError):
            raise LimitError(self.reason) from None

    def _end(self) -> None:
        """Nothing is interrupted from here on; an interruption that is still on its way is waited
        for.
        """
        with self.guard:
            fired, self.started, self.fired = self.fired, None, False
        if fired and not isinstance(sys.exc_info()[1], _Interruption):
            for _ in range(1000):
                time.sleep(0.001)


_local = threading.local()  # .watch: the watchdog of this thread, if one is on guard


@contextmanager
def watched() -> Iterator[None]:
    """Inside, every `run_template` of this thread is interrupted when it runs too long or, in a
    process of our own, takes too much memory.
    """
    if getattr(_local, "watch", None) is not None:
        yield
        return
    watch = _local.watch = _Watch()
    watch.start()
    try:
        with _process_limits() if _own_process else nullcontext():
            yield
    finally:
        watch.done.set()
        watch.join()
        if _own_process:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _local.watch = None


@contextmanager
def _process_limits() -> Iterator[None]:
    """Inside, the process gets no more than `MEMORY` further bytes, and is ended by an operation
    longer than `LAST`.
    """
    signal.setitimer(signal.ITIMER_VIRTUAL, LAST)
    if sys.__stderr__ is not None:  # the stacks, and then what the signal does by default
        faulthandler.register(signal.SIGVTALRM, sys.__stderr__, chain=True)
    soft, hard = _UNLIMITED  # -1 = no limit
    resource.setrlimit(
        resource.RLIMIT_DATA, (min(_memory(of_data=True) + MEMORY, soft % 2**63), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, _UNLIMITED)


def _memory(of_data: bool = False) -> int:
    """Bytes of this process that are in memory, or that it has asked for (`of_data`); 0 where that
    is not told.
    """
    statm = Path("/proc/self/statm")
    return (
        int(statm.read_text().split()[5 if of_data else 1]) * os.sysconf("SC_PAGE_SIZE")
        if statm.exists()
        else 0
    )
