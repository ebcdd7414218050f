"""Lets `import trlx.data.configs` find this package's modules once `sys.modules["trlx"]` is this package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType


class _Alias(MetaPathFinder, Loader):
    """Finds `trlx.X` as `PACKAGE.X`: the same module object under a second name, so registries stay single."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        aliased = sys.modules.get("trlx") is sys.modules.get(self.package)
        return spec_from_loader(fullname, self) if aliased and fullname.startswith("trlx.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.package + spec.name.removeprefix("trlx"))
        self.original = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.original  # the import system has just put the alias there


def install(package: str) -> None:
    """Make the alias available. It does nothing while `sys.modules["trlx"]` is not `package`."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias(package))
