"""What to say where somebody writes a flag: sftx has settings, written key=value, and verbs."""

from __future__ import annotations

_BY_VERB = {
    "dry-run": "`sftx plan` shows the settings, the steps, the memory and the time of a run "
    "without taking a step",
    "check": "`sftx plan` checks a run and shows what it will do; `sftx lint` checks its data",
    "validate": "`sftx plan` checks a run and shows what it will do; `sftx lint` checks its data",
    "version": "write `sftx --version`",
    "config": "name the YAML file as it is: `sftx train run.yaml`",
    "config-file": "name the YAML file as it is: `sftx train run.yaml`",
    "nproc": "write nproc=2: `sftx train run.yaml nproc=2`",
    "nproc-per-node": "write nproc=2: `sftx train run.yaml nproc=2`",
    "resume": "the same command continues a run that was stopped; checkpoint.resume says when",
    "quiet": "write runtime.progress=false",
    "q": "write runtime.progress=false",
}
"""Flags of other tools, and what does the same here."""


def message(argument: str) -> str:
    """What is wrong with a flag, what the settings are called, and where to look."""
    name, equals, value = argument.lstrip("-").partition("=")
    plain = name.replace("_", "-").lower()
    said = f"{argument!r}: settings are written key=value, for example batch.epochs=2"
    if plain in _BY_VERB:
        return f"{said}; {_BY_VERB[plain]}"
    from sftx.settings.describe import settings, suggestion

    if name in settings():
        return f"{said}; write {name}={value if equals else '...'}"
    hint = suggestion(name) if len(name) > 1 else ""
    if not hint or hint.startswith("known here"):
        return f"{said}; `sftx VERB --help` lists them"
    return f"{said}; {hint}"
