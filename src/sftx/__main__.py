"""`python -m sftx` is `sftx`."""

import sys

from sftx.cli import main

sys.exit(main())
