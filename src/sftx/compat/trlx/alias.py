"""Lets scripts import `trlx` and its modules: they are this package, or stand in for what it does
not do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from types import ModuleType

from sftx.compat.trlx import rl


class _Alias(MetaPathFinder, Loader):
    """Finds `trlx.X` as `PACKAGE.X`: the same module object under a second name, so registries stay
    single.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.originals: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for `trlx`, for its modules, and for this package's modules that are in
        `rl.INSTEAD`.
        """
        if self._stands_in(fullname):
            return spec_from_loader(fullname, self)
        if fullname == "trlx":
            return None if _installed() else spec_from_loader(fullname, self)
        aliased = sys.modules.get("trlx") is sys.modules.get(self.package)
        return (
            spec_from_loader(fullname, self) if aliased and fullname.startswith("trlx.") else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """This package's module of that name."""
        if self._stands_in(spec.name):
            return rl.module(spec.name, spec.name.removeprefix(f"{self.package}."))
        module = import_module(self.package + spec.name.removeprefix("trlx"))
        self.originals[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs: the module is whole. The import system has just put the alias's spec in it."""
        alias = module.__spec__
        if alias is not None and alias.name in self.originals:
            module.__spec__ = self.originals.pop(alias.name)

    def _stands_in(self, fullname: str) -> bool:
        begin, _, path = fullname.partition(f"{self.package}.")
        return not begin and "." in path and path in rl.INSTEAD


def _installed() -> bool:
    """Whether there is another package called trlx. A mere folder of that name is none."""
    found = PathFinder.find_spec("trlx")
    return found is not None and found.loader is not None


def install(package: str) -> None:
    """Make the alias available: `import trlx` gives `package` where no other trlx is installed.

    Where one is, `sys.modules["trlx"] = package` decides.
    """
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias(package))
