"""Trains one run after the other in the same processes: `python several_runs.py a.yaml,b.yaml`."""

import sys

from sftx.settings.load import load_config
from sftx.training.loop import train

for path in sys.argv[1].split(","):
    train(load_config(path))
