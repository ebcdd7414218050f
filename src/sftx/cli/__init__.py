"""The command line: `sftx VERB [file.yaml] key=value ...`.

Every verb is one module of this package. It has `run`; it may have `EXTRA`, the keys it takes
besides the settings of a run (their values stay text; those that begin with a key ending in a dot
come as one dictionary, `bounds`), `DEFAULTS`, overrides such as `output=unused` for settings that
this verb can do without, `POSITIONAL`, the settings that arguments without `=` stand for,
`SETTINGS`, the sections and settings that it reads where those are not all, and `GROUPS`, keys that
it shares with other verbs (`_groups.py`); all are literals, read from the file, and so are `STAGE`
and `EXAMPLE` for the map (`_map.py`). A verb
whose `run` takes no `config` reads no settings at all; one that takes `path` is given the argument
without `=`, one that takes `paths` all such arguments, and one that takes `overrides` the settings
as they are written. A module is imported last, after mistakes in the settings were named and a
first line was shown: it may bring torch along, which takes seconds.
"""

from __future__ import annotations

import ast
import errno
import os
import sys
import time
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sftx import __version__
from sftx.cli._flags import message as flag_message
from sftx.cli._groups import group_of, keys_of
from sftx.cli._map import overview, verb_of
from sftx.cli._output import check_files
from sftx.first_line import first_line
from sftx.printable import printable
from sftx.types import UserError

PRINTS = ("completion", "schema")
"""Verbs whose output goes into a file or a shell at once: they say nothing else."""
_LITERALS = ("EXTRA", "GROUPS", "DEFAULTS", "POSITIONAL", "SETTINGS")
_USAGE = "usage: sftx VERB [file.yaml] [key=value ...]"


def main(arguments: list[str] | None = None, said: bool = False) -> int:
    """Run one verb and return its exit code: 0 done, 2 a mistake in the input (one message), 130
    interrupted. `said`: the first line was shown already.
    """
    own_process = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(arguments, own_process, said)
    except UserError as error:
        return _refused(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `sftx ... | head`
        sys.stderr.close()
        return 141
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:  # not of the user's files
            raise
        return _refused(_explained(error))


def _refused(message: str) -> int:
    """Print what is wrong; returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    if not rank:
        print(f"error: {message}", file=sys.stderr)
        return 2
    # Rank 0 mostly says the same; the launcher then ends this rank before it does.
    time.sleep(2)
    print(f"rank {rank}: error: {message}", file=sys.stderr)
    return 2


def _explained(error: OSError) -> str:
    """What a file or disk refused, and what to do."""
    cause = error.strerror or str(error)
    if error.filename is not None:
        cause = f"{printable(str(error.filename))}: {cause}"
    return f"{cause}; mend that, then run the same command to continue"


def verbs() -> dict[str, str]:
    """Every verb with the first line of its module's docstring, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = doc.partition("\n")[0]
    return found


def _dispatch(arguments: list[str], own_process: bool, said: bool) -> int:
    match arguments:
        case [] | ["-h" | "--help" | "help"]:
            print(_overview())
            return 0
        case ["--version" | "-V"]:
            print(f"sftx {__version__}")
            return 0
        case ["-h" | "--help" | "help", verb, *_]:
            return _dispatch([verb, "--help"], own_process, said)
        case [flag, *_] if flag.startswith("-"):
            raise UserError(f"a verb comes first; {flag_message(flag)}\n{_USAGE}")
        case [verb, *_] if verb not in verbs():
            close = get_close_matches(verb, verbs(), 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(verbs())}"
            raise UserError(f"no verb {verb!r}; {hint}\n{_USAGE}")
    verb, *rest = arguments
    if rest == ["help"] or "-h" in rest or "--help" in rest:
        print(_verb_help(verb, declared(verb)))
        return 0
    return _call(verb, rest, own_process, said)


class Declared(NamedTuple):
    """What a verb says of itself."""

    doc: str
    extra: dict[str, str]  # its own keys and those of its groups
    defaults: tuple[str, ...]
    positional: tuple[str, ...]  # settings that arguments without `=` stand for
    takes: tuple[str, ...]  # parameters of its `run`
    groups: tuple[str, ...]
    settings: tuple[str, ...]  # sections and settings that it reads; () = all


def declared(verb: str) -> Declared:
    """What the module of a verb says, read from its file without importing it."""
    module = sys.modules.get(f"sftx.cli.{verb}")
    if module:
        known = vars(module)
        takes = tuple(signature(module.run).parameters)
        return _declared((module.__doc__ or "").strip(), known, takes)
    file = Path(__file__).with_name(f"{verb}.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    takes: tuple[str, ...] = ()
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]) if name in _LITERALS:
                found[name] = ast.literal_eval(node.value)
            case ast.FunctionDef(name="run"):
                takes = tuple(argument.arg for argument in node.args.args)
    return _declared(ast.get_docstring(tree) or "", found, takes)


def _declared(doc: str, literals: Mapping[str, Any], takes: tuple[str, ...]) -> Declared:
    groups = tuple(literals.get("GROUPS", ()))
    return Declared(
        doc,
        literals.get("EXTRA", {}) | keys_of(groups),
        tuple(literals.get("DEFAULTS", ())),
        tuple(literals.get("POSITIONAL", ())),
        takes,
        groups,
        tuple(literals.get("SETTINGS", ())),
    )


def _call(verb: str, arguments: list[str], own_process: bool, said: bool) -> int:
    told = declared(verb)
    given = _Given(verb, told)
    for argument in arguments:
        given.add(argument)
    check_files(verb, given.extra)
    if "overrides" in told.takes:
        given.extra |= {"path": given.path or "", "overrides": given.overrides}
        given.path = None
        given.overrides = []
    if "config" not in told.takes:
        given.take_path()
        if verb not in PRINTS and not said:
            first_line(verb, arguments)
        return _module(verb, verb not in PRINTS).run(**given.extra)

    from sftx.data.chat.limits import limit_this_process
    from sftx.settings.load import load_config

    if own_process:
        limit_this_process()
    config = load_config(given.path, given.overrides, told.defaults)
    if config.runtime.progress and not said:
        first_line(verb, arguments)
    return _module(verb, config.runtime.progress).run(config, **given.extra)


def _module(verb: str, shown: bool) -> ModuleType:
    """The module of a verb; a line says so where importing it takes long."""
    from sftx.report.progress import working

    with working("loading libraries", shown):
        return import_module(f"sftx.cli.{verb}")


class _Given:
    """What stands behind a verb: the YAML file, the settings, and the verb's own keys."""

    def __init__(self, verb: str, told: Declared) -> None:
        self.path: str | None = None
        self.overrides: list[str] = []
        self.extra: dict[str, Any] = {}
        self._verb = verb
        self._told = told
        self._waiting = list(told.positional)

    def add(self, argument: str) -> None:
        """Take the next argument."""
        if argument.startswith("-"):
            raise self._wrong(flag_message(argument))
        key, equals, value = argument.partition("=")
        if not equals or "/" in key:  # no setting has a slash, but a path may have an equals sign
            self._add_word(argument)
        else:
            self._add_key(key, value)

    def take_path(self) -> None:
        """Hand the path to a verb that takes one and no settings; UserError for what is left."""
        if self.path is not None and "path" in self._told.takes:
            self.extra["path"] = self.path
            self.path = None
        if self.path is not None or self.overrides:
            known = ", ".join(f"{key}=..." for key in self._told.extra) or "nothing"
            odd = self.path or self.overrides[0]
            raise self._wrong(f"{odd!r} means nothing here; it takes {known}")

    def _add_word(self, word: str) -> None:
        is_settings = word.endswith((".yaml", ".yml"))
        if "paths" in self._told.takes:
            self.extra.setdefault("paths", []).append(word)
        elif self._waiting and not is_settings:
            self.overrides.append(f"{self._waiting.pop(0)}={word}")
        elif self._told.positional and not is_settings:
            known = " ".join(self._told.positional).upper()
            raise self._wrong(f"{word!r} means nothing here; without a key it takes {known}")
        elif self.path is not None:
            raise self._wrong(f"one YAML file at most: {self.path!r}, then {word!r}")
        else:
            self.path = word

    def _add_key(self, key: str, value: str) -> None:
        prefix = key[: key.find(".") + 1]
        group = group_of(key, self._told.groups)
        if key in self.extra or key in self.extra.get(group, {}):
            raise self._wrong(f"{key}: given twice")
        if prefix and prefix in self._told.extra:
            self.extra.setdefault("bounds", {})[key] = value
        elif group:
            self.extra.setdefault(group, {})[key] = value
        elif key in self._told.extra:
            self.extra[key] = value
        elif not prefix and (close := get_close_matches(key, self._told.extra, 1, 0.75)):
            raise self._wrong(f"no key {key!r}; did you mean `{close[0]}`?")
        elif self._is_unread(key):
            known = ", ".join([*self._told.extra, *self._told.settings])
            raise self._wrong(f"no key {key!r}; it takes {known}")
        else:
            self.overrides.append(f"{key}={value}")

    def _is_unread(self, key: str) -> bool:
        """Whether a setting would change nothing of what the verb does."""
        names = self._told.settings
        read = any(key == name or key.startswith(f"{name}.") for name in names)
        return bool(names) and not read

    def _wrong(self, what: str) -> UserError:
        return UserError(f"sftx {self._verb}: {what}")


def _overview() -> str:
    paths = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return overview(_USAGE, map(verb_of, paths))


def _arguments(told: Declared) -> str:
    """The arguments without `=` that a verb takes, as its usage names them."""
    if "config" in told.takes:
        return "".join(f"{key.upper()} " for key in told.positional) or "[file.yaml] "
    if "paths" in told.takes:
        return "RUN [RUN ...] "
    if "overrides" in told.takes:
        return "[file.yaml] "
    return "PATH " if "path" in told.takes else ""


def _verb_help(verb: str, told: Declared) -> str:
    """The verb's docstring, its own keys, and every setting if it reads settings."""
    from textwrap import fill

    def entry(key: str, *texts: str) -> list[str]:
        return [
            f"  {key}",
            *(fill(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6) for text in texts),
        ]

    lines = [f"usage: sftx {verb} {_arguments(told)}[key=value ...]", "", told.doc.strip(), ""]
    for key, meaning in told.extra.items():
        lines += entry(key if key.endswith(".") else f"{key}=...", meaning)
    if "config" in told.takes:
        from sftx.settings.describe import doc, settings
        from sftx.settings.documents import in_words

        lines += ["Settings, as dotted keys here, nested in YAML and Python:", ""]
        for key, field in settings().items():
            lines += entry(key, in_words(field), doc(field))
    return "\n".join(lines)
