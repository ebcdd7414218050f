"""Regular expressions in the settings of an adapter, tried before peft uses them.

peft matches them against the name of every module. One that goes back and forth without end would
hang the run, and nothing in this process can stop it: so a process of its own tries it first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sftx.types import UserError

SECONDS = 10.0
_PLAIN = re.compile(r"[\w.\-]*")  # a name; it takes no time
_WHOLE = "fullmatch", "%s"
_KEY = "match", r"(.*\.)?(%s)$"
_FORMS = {
    "target_modules": _WHOLE,
    "exclude_modules": _WHOLE,
    "modules_to_save": ("match", r"(^|.*\.)%s($|\..*)"),
    "layers_pattern": ("match", r"(?:^|.*?\.)%s\.(?P<idx>\d+)\."),
    "rank_pattern": _KEY,
    "alpha_pattern": _KEY,
}
"""The settings of peft that hold patterns, and how it uses them."""
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, (function, pattern) in enumerate(patterns):
    print(number, flush=True)
    match = getattr(re.compile(pattern), function)
    for name in names:
        match(name)
"""


def check_patterns(place: object, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse patterns in an adapter's `config` that cannot be matched with `names` in time.

    Raises:
        UserError: naming `place`, the setting and the pattern.
    """
    found = list(_patterns(config))
    if not found:
        return
    patterns = []
    for setting, text in found:
        function, form = _FORMS[setting]
        patterns.append((function, form % text))
    given = json.dumps([patterns, list(names)])
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode()
        setting, text = found[len(said.split()) - 1]
        raise UserError(
            f"{place}: {setting}: {text[:80]!r} takes more than {SECONDS:g} s to match with the "
            "names of the model's modules; list the names instead"
        ) from error
    if done.returncode:
        setting, text = found[len(done.stdout.split()) - 1]
        problem = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"{place}: {setting}: {text[:80]!r} is no pattern: {problem}")


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting, text) of all that peft takes for a regular expression, and that is no mere name."""
    for setting, (function, _) in _FORMS.items():
        value = config.get(setting) or []
        if isinstance(value, str):
            value = [value]
        elif function == "fullmatch":  # a list of names is compared as it is
            continue
        for text in value:
            if isinstance(text, str) and not _PLAIN.fullmatch(text):
                yield setting, text
