"""`python -m sftx.demo [FOLDER]` runs the quick start; FOLDER is `runs/demo` unless given."""

import sys

from sftx.demo.quickstart import run
from sftx.types import UserError

if len(sys.argv) > 2 or any(argument.startswith("-") for argument in sys.argv[1:]):
    sys.exit(__doc__)
try:
    run(*sys.argv[1:])
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
