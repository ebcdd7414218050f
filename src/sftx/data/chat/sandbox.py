"""Chat templates are programs from strangers: here they are compiled and run without access.

The environment renders as the one in transformers does, to the letter. A template cannot reach
Python, files or the network (jinja2's immutable sandbox), and it cannot ask for one operation that
takes minutes. `limits` ends those that take long in many small operations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sized
from datetime import datetime
from functools import wraps
from typing import Any, Literal, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.filters import do_round
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sftx.data.chat.limits import LimitError, deadline, watched

CHARACTERS = 20_000_000  # longest text
ELEMENTS = 1_000_000  # of a list that a filter sorts or makes: sorting cannot be interrupted
BITS = 1_000_000  # of a whole number: multiplying longer ones cannot be interrupted

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


def _namespace(*args: Mapping[str, object], **kwargs: object) -> Namespace:
    """jinja2's namespace without underscore names, which reach into Python."""
    values = dict(*args, **kwargs)
    if private := [name for name in values if str(name).startswith("_")]:
        raise SecurityError(
            f"a template may not store a name that begins with an underscore: {private[0]!r}"
        )
    return Namespace(values)


def _dict(*args: Mapping[str, object], **kwargs: object) -> dict[str, object]:
    """`dict(...)` inside a template, without the class behind it, whose methods could change the
    row.
    """
    return dict(*args, **kwargs)


_DICT_METHODS = frozenset(dir(dict))
_HARMLESS = frozenset(
    ["startswith", "endswith", "strip", "lstrip", "rstrip", "split", "lower", "upper"]
)
_OF_JINJA = frozenset(["_loop_vars", "_block_vars"])
"""Arguments that compiled templates add to every call."""
_TEXT_METHODS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, quicker where its answers are known, and without powers that take minutes."""

    intercepted_binops = frozenset(["**", "*"])

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "**":
            _check_power(right)
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() * right)
        else:
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> object:
        # The sandbox asks a dozen questions of every attribute. For what templates are full of, the
        # answers are known.
        kind: type[object] = type(obj)  # pyright: ignore[reportUnknownVariableType]
        if kind is dict and attribute not in _DICT_METHODS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is str and attribute in _TEXT_METHODS:
            return getattr(obj, attribute)
        if kind in (Namespace, LoopContext) and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: object, **kwargs: object) -> object:
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and __obj.__name__ in _HARMLESS and kwargs.keys() <= _OF_JINJA:
            # What templates call most: the answers to the sandbox's questions are known.
            return __obj(*args)
        return super().call(__context, __obj, *args, **kwargs)


def _check_power(exponent: object) -> None:
    if isinstance(exponent, int) and abs(exponent) > 1000:
        raise LimitError(f"the template asks for a power of {exponent:.2g}")


def _check_product(left: object, right: object) -> None:
    """Refuse to multiply where the result is too long a number, text or list."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return
    for series, times in ((left, right), (right, left)):
        if isinstance(series, str | list | tuple) and isinstance(times, int):
            size = len(cast("Sized", series)) * times
            if size > CHARACTERS:
                raise LimitError(
                    f"the template makes a text or list of {size:,}; {CHARACTERS:,} are allowed"
                )


def _check_bits(bits: int) -> None:
    if bits > BITS:
        raise LimitError(f"the template makes a number of more than {BITS:,} bits")


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


def _limited(name: str, original: Callable[..., object]) -> Callable[..., object]:
    """A filter that refuses an input of more than `ELEMENTS`."""
    # The environment may come first.
    place = 0 if getattr(original, "jinja_pass_arg", None) is None else 1

    @wraps(original)
    def limited(*args: object, **kwargs: object) -> object:
        value = args[place] if len(args) > place else None
        if isinstance(value, str | list | tuple | dict):
            size = len(cast("Sized", value))
            if size > ELEMENTS:
                raise LimitError(
                    f"the template gives {size:,} elements to `{name}`; {ELEMENTS:,} are allowed"
                )
        return original(*args, **kwargs)

    return limited


_AS_TEXT = ("escape", "e", "forceescape", "format", "join", "pprint", "replace", "string", "tojson")
"""Filters that write their input as text, in one operation."""


def _written(value: object) -> object:
    """What a template is about to write: refused where it holds more than `ELEMENTS` things.

    A list that holds another many times over is small in memory, but its text is not, and nothing
    can interrupt the writing of it.
    """
    if isinstance(value, str):
        return value
    waiting = [value]
    elements = 0
    while waiting:
        inside = _inside(waiting.pop())
        elements += len(inside)
        if elements > ELEMENTS:
            raise LimitError(
                f"the template writes a list of more than {ELEMENTS:,} elements as text"
            )
        waiting += inside
    return value


def _inside(value: object) -> list[object]:
    """What a list or a dictionary contains."""
    if isinstance(value, dict):
        return list(cast("dict[object, object]", value).values())
    if isinstance(value, list | tuple):
        return list(cast("list[object]", value))
    return []


def _writing(original: Callable[..., object]) -> Callable[..., object]:
    """A filter that writes its input as text, within the limit of `_written`."""

    @wraps(original)
    def writing(*args: object, **kwargs: object) -> object:
        for value in args:
            _written(value)
        return original(*args, **kwargs)

    return writing


def _round(
    value: float, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common"
) -> float:
    _check_power(precision)
    return do_round(value, precision, method)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise TemplateError(message)


def compile_template(source: str) -> jinja2.Template:
    """The compiled template. `jinja2.TemplateError` if its syntax is wrong."""
    environment: Any = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        finalize=_written,
    )
    environment.filters |= {"tojson": _to_json, "round": _round}
    for name in _WHOLE:
        environment.filters[name] = _limited(name, environment.filters[name])
    for name in _AS_TEXT:
        environment.filters[name] = _writing(environment.filters[name])
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _dict,
        "namespace": _namespace,
    }
    with watched(), deadline():  # jinja2 computes constant expressions here
        template: jinja2.Template = environment.from_string(source)
    template.globals = dict(template.globals)
    return template


def run_template(template: jinja2.Template, variables: Mapping[str, object]) -> str:
    """The text of a template; the time limit holds inside `watched()`. Raises one of
    `TEMPLATE_ERRORS`.
    """
    with deadline():
        # What `template.render` does, without looking through its chained globals for every text.
        context = template.new_context({**template.globals, **variables}, shared=True)
        text = "".join(template.root_render_func(context))
    if len(text) > CHARACTERS:
        raise LimitError(f"the template made {len(text):,} characters")
    return text
