"""Settings of the process the tests run in."""

import os

# Tiny models spend more time waiting for threads than computing; waiting threads must not take the
# other core's time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
