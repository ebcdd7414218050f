"""The first line of a command, which comes before anything slow."""

import os
import sys


def first_line(verb: str, arguments: list[str]) -> bool:
    """One line on stderr with the command; of the processes of torchrun none says it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        shown = [argument if argument.isprintable() else ascii(argument) for argument in arguments]
        line = " ".join(["start    sftx", verb, *shown])
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            line = line if len(line) <= width else line[: width - 3] + "..."
        print(line, file=sys.stderr, flush=True)
    return True
