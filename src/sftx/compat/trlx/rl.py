"""Names of trlx that have no trainer here: they import and construct, and training with them is
refused.

`INSTEAD` is the one table: what to do instead, by module of trlx (with a dot) and by name. A module
in it exists by its line alone, and every name in such a module too.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, NoReturn, Self

from sftx.types import UserError

RL = (
    "sftx does supervised fine-tuning, not reinforcement learning; train on `samples` here, then "
    "give the folder that "
    "`save_pretrained` writes (an adapter is merged first, by `sftx export`) to an RL or "
    "preference library (TRL, "
    "verl, OpenRLHF) as its first model"
)
NEMO = (
    "NeMo is not used here; set train.trainer to AccelerateSFTTrainer, model.model_path and "
    "tokenizer.tokenizer_path "
    "to a Hugging Face model"
)

INSTEAD = {
    "data.accelerate_base_datatypes": RL,
    "data.dpo_types": RL,
    "data.ilql_types": RL,
    "data.ppo_types": RL,
    "models.modeling_base": RL,
    "models.modeling_ilql": RL,
    "models.modeling_nemo_ilql": NEMO,
    "models.modeling_nemo_ppo": NEMO,
    "models.modeling_nemo_sft": NEMO,
    "models.modeling_ppo": RL,
    "pipeline.ppo_pipeline": RL,
    "trainer.accelerate_dpo_trainer": RL,
    "trainer.accelerate_ilql_trainer": RL,
    "trainer.accelerate_ppo_trainer": RL,
    "trainer.accelerate_rft_trainer": RL,
    "trainer.nemo_ilql_trainer": NEMO,
    "trainer.nemo_ppo_trainer": NEMO,
    "trainer.nemo_sft_trainer": NEMO,
    "utils.modeling": RL,
    # Names that stand in other modules too, or in a configuration.
    "AccelerateDPOTrainer": RL,
    "AccelerateILQLTrainer": RL,
    "AcceleratePPOTrainer": RL,
    "AccelerateRFTTrainer": RL,
    "DPOConfig": RL,
    "ILQLConfig": RL,
    "ILQLRolloutStorage": RL,
    "ILQLSeq2SeqRolloutStorage": RL,
    "NeMoILQLTrainer": NEMO,
    "NeMoPPOTrainer": NEMO,
    "NeMoSFTTrainer": NEMO,
    "PPOConfig": RL,
    "RFTConfig": RL,
    "default_nemo_1_3b_config": NEMO,
    "default_nemo_20b_config": NEMO,
    "default_nemo_2b_config": NEMO,
}


class RefusedAttribute(UserError, AttributeError):
    """A refusal that `hasattr` takes for an attribute that is not there."""


def refuse(what: str, instead: str = RL) -> NoReturn:
    """Raise UserError: `what` is not done here, and what to do instead."""
    raise UserError(f"{what}: {instead}.")


class StandIn:
    """A class of trlx that exists here by name: it keeps the values it is given, and does nothing."""

    INSTEAD = RL

    def __init__(self, *_: Any, **values: Any) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python looks for such names, and may not find them
            raise AttributeError(name)
        raise RefusedAttribute(f"{type(self).__name__}.{name}: {self.INSTEAD}.")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Construct from the values in `config`, whatever they are called."""
        return cls(**config)

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        """Refused: no model of this class is loaded."""
        refuse(f"{cls.__name__}.from_pretrained", cls.INSTEAD)

    @classmethod
    def from_config(cls, *_: Any, **__: Any) -> NoReturn:
        """Refused: no model of this class is made."""
        refuse(f"{cls.__name__}.from_config", cls.INSTEAD)


@cache
def stand_in(name: str, instead: str = RL) -> Any:
    """What stands for `name`: a class that constructs, or, for the name of a function, one that
    refuses.
    """
    if name[0].isupper():
        return type(name, (StandIn,), {"INSTEAD": instead})

    def refused(*_: Any, **__: Any) -> NoReturn:
        refuse(name, instead)

    return refused


def by_name(name: str) -> Any:
    """The stand-in for a name in the table, whatever its letters' case. Raises AttributeError for
    any other name.
    """
    for known, instead in INSTEAD.items():
        if known.lower() == name.lower() and "." not in known:
            return stand_in(known, instead)
    raise AttributeError(name)


def module(fullname: str, path: str) -> ModuleType:
    """The module that stands for `path` in the table, under its full name."""
    made = ModuleType(fullname, f"trlx's `{path}`, by name alone.")

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name, INSTEAD.get(name, INSTEAD[path]))

    made.__getattr__ = find
    return made
