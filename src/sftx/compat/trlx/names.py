"""Names of trlx: what is found by name (`Registry`), what imports by name, and what is refused.

Names of reinforcement learning and of NeMo have no trainer here. They import and construct, and
training with them is refused. `INSTEAD` is the one table of them. A module in it exists by its line
alone, and so does every name in such a module.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any, NoReturn, Self

from sftx.types import UserError

PACKAGE = "sftx.compat.trlx"
RL = (
    "sftx does supervised fine-tuning, not reinforcement learning; train on `samples` here, then "
    "give the folder that `save_pretrained` writes (an adapter is merged first, by `sftx export`) "
    "to an RL or preference library (TRL, verl, OpenRLHF) as its first model"
)
NEMO = (
    "NeMo is not used here; set train.trainer to AccelerateSFTTrainer, model.model_path and "
    "tokenizer.tokenizer_path to a Hugging Face model"
)
INSTEAD: dict[str, str] = {
    **dict.fromkeys(
        (
            "data.accelerate_base_datatypes",
            "data.dpo_types",
            "data.ilql_types",
            "data.ppo_types",
            "models.modeling_base",
            "models.modeling_ilql",
            "models.modeling_ppo",
            "pipeline.ppo_pipeline",
            "trainer.accelerate_dpo_trainer",
            "trainer.accelerate_ilql_trainer",
            "trainer.accelerate_ppo_trainer",
            "trainer.accelerate_rft_trainer",
            "utils.modeling",
            "AccelerateDPOTrainer",
            "AccelerateILQLTrainer",
            "AcceleratePPOTrainer",
            "AccelerateRFTTrainer",
            "BaseRLTrainer",
            "DPOConfig",
            "ILQLConfig",
            "ILQLRolloutStorage",
            "ILQLSeq2SeqRolloutStorage",
            "PPOConfig",
            "RFTConfig",
        ),
        RL,
    ),
    **dict.fromkeys(
        (
            "models.modeling_nemo_ilql",
            "models.modeling_nemo_ppo",
            "models.modeling_nemo_sft",
            "trainer.nemo_ilql_trainer",
            "trainer.nemo_ppo_trainer",
            "trainer.nemo_sft_trainer",
            "NeMoILQLTrainer",
            "NeMoPPOTrainer",
            "NeMoSFTTrainer",
            "default_nemo_1_3b_config",
            "default_nemo_20b_config",
            "default_nemo_2b_config",
        ),
        NEMO,
    ),
}
"""What to do instead, by name of a module (with a dot) and of what scripts import from others."""


class RefusedAttribute(UserError, AttributeError):
    """A refusal that `hasattr` takes for an attribute that is not there."""


def refuse(what: str, instead: str = RL) -> NoReturn:
    """Raise UserError: `what` is not done here, and what to do instead."""
    raise UserError(f"{what}: {instead}.")


class StandIn:
    """A class of trlx that is here by name: it keeps the values it is given, and does nothing."""

    INSTEAD = RL

    def __init__(self, *_: object, **values: object) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python looks for such names, and may not find them
            raise AttributeError(name)
        raise RefusedAttribute(f"{type(self).__name__}.{name}: {self.INSTEAD}.")

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> Self:
        """Construct from the values in `config`, whatever they are called."""
        return cls(**config)

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> NoReturn:
        """Refused: no model of this class is loaded or made."""
        refuse(f"{cls.__name__}.from_pretrained", cls.INSTEAD)

    from_config = from_pretrained


@cache
def stand_in(name: str, instead: str) -> Any:
    """What is there for `name`: a class that constructs, or, for a function's name, a refusal."""
    if name[0].isupper():
        return type(name, (StandIn,), {"INSTEAD": instead})

    def refused(*_: object, **__: object) -> NoReturn:
        refuse(name, instead)

    return refused


def by_name(name: str) -> Any:
    """The stand-in for a name in the table, in any case of letters; AttributeError for others."""
    for known, instead in INSTEAD.items():
        if known.lower() == name.lower() and "." not in known:
            return stand_in(known, instead)
    raise AttributeError(name)


class Registry:
    """The classes that configurations name (method, trainer, pipeline), in any case of letters."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.classes: dict[str, Any] = {}

    def register(self, name: Any) -> Any:
        """A class decorator: `@register_method("mine")`, or without a name `@register_method`."""
        if not isinstance(name, str):
            return self.register(name.__name__)(name)

        def add(cls: Any) -> Any:
            self.classes[name.lower()] = cls
            return cls

        return add

    def get(self, name: str) -> Any:
        """The class registered under `name`, or its stand-in; UserError if there is none."""
        if name.lower() in self.classes:
            return self.classes[name.lower()]
        try:
            return by_name(name)
        except AttributeError:
            known = ", ".join(self.classes)
            raise UserError(f"{self.what} {name} has not been registered; known: {known}") from None


class _Finder(MetaPathFinder, Loader):
    """Finds `trlx.X` as this package's X, under a second name, and the modules in the table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the modules named above; None for all others."""
        begin, _, name = fullname.partition(f"{PACKAGE}.")
        stands_in = not begin and "." in name and name in INSTEAD
        is_ours = sys.modules.get("trlx") is sys.modules.get(PACKAGE)
        if stands_in or (is_ours and fullname.startswith("trlx.")):
            return spec_from_loader(fullname, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """This package's module, or one whose names are all stand-ins."""
        if spec.name.startswith("trlx."):
            module = import_module(PACKAGE + spec.name.removeprefix("trlx"))
            spec.loader_state = module.__spec__
            return module
        path = spec.name.removeprefix(f"{PACKAGE}.")
        module = ModuleType(spec.name, f"trlx's `{path}`, by name alone.")
        vars(module)["__getattr__"] = partial(_name_in, path)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Put the module's own spec back: the import system has put the alias's into it."""
        own = module.__spec__ and module.__spec__.loader_state
        module.__spec__ = own or module.__spec__


def _name_in(path: str, name: str) -> object:
    """The stand-in for a name of the module `path`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return stand_in(name, INSTEAD.get(name, INSTEAD[path]))


def install() -> None:
    """Make `import trlx` give this package, unless another trlx is installed.

    Where one is, `sys.modules["trlx"] = sftx.compat.trlx` decides.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    installed = PathFinder.find_spec("trlx")
    if installed is None or installed.loader is None:  # a folder of that name is no package
        sys.modules.setdefault("trlx", sys.modules[PACKAGE])
