"""The schema as Python types, for editors and type checkers.

`sftx schema format=python` prints them; `sftx/settings/keywords.py` holds them. The types take what
`settings.make_config` takes: paths as text or as `Path`, lists as lists or tuples, a section as a
dictionary, as its section object or in its short form.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from textwrap import wrap
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sftx.settings.describe import doc, section_of
from sftx.settings.schema import SHORT_FORMS, Config, Model, Section, Source

WIDTH = 100
"""Characters of a line, as the formatter of the project has it."""

HEAD = '''\
"""The settings of a run as types: editors complete them, type checkers find a misspelt one.

Made from the schema by `sftx schema format=python`; do not edit. Nothing here is read while a run
is made: `Config` alone decides what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Required, TypedDict

from sftx.settings import schema
from sftx.settings.given import Rows, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel
'''


def as_python() -> str:
    """The module `sftx/settings/keywords.py`."""
    sections = {
        name: inner for name, field in Config.model_fields.items() if (inner := section_of(field))
    }
    parts = [HEAD, _typed_dict("SourceSettings", Source)]
    parts += [_typed_dict(f"{inner.__name__}Settings", inner) for inner in sections.values()]
    parts.append(_typed_dict("Sections", Config))
    return "\n\n".join(parts)


def _typed_dict(name: str, section: type[Section]) -> str:
    """One class, with the documentation of every key beneath it, as editors show it."""
    lines = [f"class {name}(TypedDict, total=False):", *_docstring(section.__doc__ or ""), ""]
    for key, field in section.model_fields.items():
        annotation = _field_type(key, field)
        if field.is_required():
            annotation = f"Required[{annotation}]"
        lines += [*_annotated(key, annotation), *_docstring(doc(field))]
    return "\n".join(lines) + "\n"


def _annotated(key: str, annotation: str) -> list[str]:
    """The lines of `key: annotation`, broken as the formatter breaks them."""
    line = f"    {key}: {annotation}"
    if len(line) <= WIDTH:
        return [line]
    if " | " not in annotation:
        outer, _, inner = annotation.removesuffix("]").partition("[")
        return [f"    {key}: {outer}[", f"        {inner}", "    ]"]
    return [f"    {key}: (", "        " + annotation.replace(" | ", "\n        | "), "    )"]


def _docstring(text: str) -> list[str]:
    """`text` as the lines of a docstring, quotes included."""
    plain = " ".join(text.split())
    line = f'    """{plain}"""'
    if len(line) <= WIDTH:
        return [line]
    lines = wrap(f'"""{plain}', WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    return [*(f"    {line}" for line in lines), '    """']


def _field_type(key: str, field: FieldInfo) -> str:
    """What a keyword or a key of a dictionary takes."""
    section = section_of(field)
    if key == "path" and field is Model.model_fields["path"]:
        return "Text | PreTrainedModel"
    if section is None:
        return "Rows | None" if key in ("rows", "eval_rows") else _source_of(field.annotation)
    name = section.__name__
    ways = [f"{name}Settings", f"schema.{name}"]
    if key in SHORT_FORMS:
        main = _source_of(section.model_fields[SHORT_FORMS[key]].annotation)
        ways.insert(
            0,
            main.removesuffix(" | None").removesuffix(
                " | Sequence[Text | SourceSettings | schema.Source]"
            ),
        )
    if key == "data":
        ways.insert(1, "Rows")
    if key == "model":
        ways.append("PreTrainedModel")
    return " | ".join(ways)


def _source_of(annotation: Any) -> str:
    """A type of the schema as Python source."""
    simple = {str: "Text", int: "int", float: "float", bool: "bool", Any: "Any", type(None): "None"}
    if annotation in simple:
        return simple[annotation]
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Annotated:
            return _source_of(arguments[0])
        case origin if origin is Literal:
            return "Literal[" + ", ".join(f'"{value}"' for value in arguments) + "]"
        case origin if origin in (Union, types.UnionType):
            return " | ".join(_source_of(part) for part in arguments)
        case origin if origin is dict:
            return f"Mapping[str, {_source_of(arguments[1])}]"
        case origin if origin is Callable:
            return "Callable[..., Any]"
        case origin if origin is list:
            return f"Sequence[{_source_of(arguments[0])}]"
        case origin if origin is tuple:
            items = ", ".join(_source_of(part) for part in arguments)
            return f"tuple[{items}] | list[{_source_of(arguments[0])}]"
        case _:
            return f"{annotation.__name__}Settings | schema.{annotation.__name__}"
