"""The program `sftx`, which `python -m sftx` is too: a first line at once, then the command line.

What comes after the line takes half a second to import, and torch takes seconds.
"""

import sys
from pathlib import Path

from sftx.first_line import first_line


def main() -> int:
    """Run the command line of this process; returns its exit code."""
    said = _say_at_once(sys.argv[1:])
    from sftx.cli import main as run

    return run(said=said)


def _say_at_once(arguments: list[str]) -> bool:
    """Show the first line, unless the settings may forbid it; whether it was shown."""
    if not arguments or {"-h", "--help"} & {*arguments}:
        return False
    verb, *rest = arguments
    if (
        verb in ("completion", "schema")
        or not (Path(__file__).parent / "cli" / f"{verb}.py").is_file()
    ):
        return False
    if any(map(_may_be_silent, rest)):
        return False
    return first_line(verb, rest)


def _may_be_silent(argument: str) -> bool:
    """Whether a setting, or a file of them, speaks of `runtime.progress`."""
    if argument.endswith((".yaml", ".yml")) and "=" not in argument:
        try:
            argument = Path(argument).read_text(encoding="utf-8")
        except (OSError, ValueError):  # the command line says what is wrong with it
            return True
    return "progress" in argument


if __name__ == "__main__":
    sys.exit(main())
