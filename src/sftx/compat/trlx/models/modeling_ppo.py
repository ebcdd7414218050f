"""PPO is reinforcement learning: every name here is refused."""

from sftx.compat.trlx.rl import refuse_import as __getattr__  # noqa: F401
