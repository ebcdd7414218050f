"""`python -m sftx.demo [FOLDER]` runs the quick start; FOLDER is `runs/demo` unless given."""

import sys

from sftx.demo.quickstart import run
from sftx.types import UserError

match sys.argv[1:] or ["runs/demo"]:
    case [folder] if not folder.startswith("-"):
        try:
            run(folder)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    case _:
        sys.exit(__doc__)
