"""The schema as Python types, for editors and type checkers.

`sftx schema format=python` prints them; `sftx/settings/keywords.py` holds them. The types take what
`settings.make_config` takes: paths as text or as `Path`, lists as lists or tuples, a section as a
dictionary, as its section object or in its short form.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
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


_SIMPLE: dict[object, str] = {
    str: "Text",
    int: "int",
    float: "float",
    bool: "bool",
    Any: "Any",
    type(None): "None",
}


def _source_of(annotation: Any) -> str:
    """A type of the schema as Python source."""
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    origin = get_origin(annotation)
    if origin in _AS_SOURCE:
        return _AS_SOURCE[origin](get_args(annotation))
    return f"{annotation.__name__}Settings | schema.{annotation.__name__}"


def _literal(values: Sequence[object]) -> str:
    return "Literal[" + ", ".join(f'"{value}"' for value in values) + "]"


def _union(parts: Sequence[object]) -> str:
    return " | ".join(map(_source_of, parts))


def _tuple(items: Sequence[object]) -> str:
    return f"tuple[{', '.join(map(_source_of, items))}] | list[{_source_of(items[0])}]"


_AS_SOURCE: dict[object, Callable[[Sequence[object]], str]] = {
    Annotated: lambda parts: _source_of(parts[0]),
    Literal: _literal,
    Union: _union,
    types.UnionType: _union,
    dict: lambda types: f"Mapping[str, {_source_of(types[1])}]",
    Callable: lambda _: "Callable[..., Any]",
    list: lambda items: f"Sequence[{_source_of(items[0])}]",
    tuple: _tuple,
}
"""The source of each kind of type, from what stands in its brackets."""
