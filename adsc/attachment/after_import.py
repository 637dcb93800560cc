"""What is to be done at the end of another package's first import, or at once where that is over.

Python has no hook for this. Importing the package instead would cost whoever needs none of it
seconds, and 200 MB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Act = Callable[[ModuleType], None]


def after_import(name: str, act: Act) -> None:
    """Call `act` with the module of that name as soon as it has been imported."""
    if name in sys.modules:
        act(sys.modules[name])
        return
    finder = next((one for one in sys.meta_path if isinstance(one, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.acts.setdefault(name, []).append(act)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, with a loader that acts afterwards."""

    def __init__(self) -> None:
        self.acts: dict[str, list[Act]] = {}

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.acts:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self.acts)
                return spec
        return None


class _Loader(Loader):
    """The module's own loader, followed by what is to be done."""

    def __init__(self, loader: Any, acts: dict[str, list[Act]]):
        self.loader, self.acts = loader, acts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        for act in self.acts.pop(module.__name__, ()):
            act(module)
