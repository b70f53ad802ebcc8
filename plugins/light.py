"""Import a component's module to read its options, without paying for torch.

``with deferred("torch"):`` puts a finder before Python's own ones. It answers ``import torch`` with a proxy
that imports the real module when an attribute of it is first asked for. A module that only mentions torch
inside functions and annotations thus imports in milliseconds, and works as ever once its functions are
called.

A class statement like ``class Head(torch.nn.Module)`` or ``from torch import Tensor`` asks for an attribute
at once: that works, and costs the real import.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets")

# ``from package import name`` binds a submodule or an attribute, and only importing tells which. Packages
# (folders) are taken for submodules; of single files only this one, because files such as
# torch/nn/utils/weight_norm.py are hidden behind a function of the same name.
SINGLE_FILES = frozenset({"torch.nn.functional"})


class Proxy(ModuleType):
    """Stands for a module that was not imported yet."""

    def __getattr__(self, name: str) -> Any:
        """Attribute of the real module, which is imported now."""
        if name.startswith("__") and name not in ("__version__", "__all__"):
            raise AttributeError(f"module {self.__name__!r} was not imported yet: it has no {name!r}")
        finder: _Finder = self.__spec__.loader  # type: ignore[union-attr, assignment]  # set by the import system
        submodule = f"{self.__name__}.{name}"
        if finder.stands_in(submodule):
            return importlib.import_module(submodule)
        return getattr(finder.real(self.__name__), name)


class _Finder:
    """Finder and loader of proxies; one a ``deferred`` block."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.before: set[str] = set()
        self.users: list[ModuleType] = []  # modules imported in the block, whose globals may be proxies

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a proxy comes from: this loader, if the module exists and its package is not imported."""
        root = name.partition(".")[0]
        if root not in self.names or (root in sys.modules and not isinstance(sys.modules[root], Proxy)):
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        found = next(filter(None, (finder.find_spec(name, path) for finder in others)), None)
        if found is None:
            return None
        spec = ModuleSpec(name, self, origin=found.origin)  # type: ignore[arg-type]  # duck-typed, as importlib allows
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A proxy; the import system gives it its name and spec."""
        return Proxy(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: that is the point."""

    def stands_in(self, submodule: str) -> bool:
        """Whether ``from package import submodule`` gives a proxy too: in the block, for packages."""
        parent = sys.modules.get(submodule.rpartition(".")[0])
        if self not in sys.meta_path or not isinstance(parent, Proxy):
            return False
        spec = self.find_spec(submodule, parent.__spec__.submodule_search_locations)  # type: ignore[union-attr]
        return spec is not None and (spec.submodule_search_locations is not None or submodule in SINGLE_FILES)

    def enter(self) -> None:
        """Put the finder before all others."""
        self.before = set(sys.modules)
        sys.meta_path.insert(0, self)

    def leave(self) -> None:
        """Take the finder and all proxies out of the import system."""
        sys.meta_path.remove(self)
        for name in set(sys.modules) - self.before:
            if isinstance(sys.modules[name], Proxy):
                del sys.modules[name]
            elif isinstance(sys.modules[name], ModuleType):
                self.users.append(sys.modules[name])

    def real(self, name: str) -> ModuleType:
        """Import the real module, and put it in the place of its proxies in the modules of the block."""
        inside = self in sys.meta_path
        if inside:
            self.leave()
        try:
            module = importlib.import_module(name)
        finally:
            if inside:
                self.enter()
        for user in self.users:
            for key, value in list(vars(user).items()):
                if isinstance(value, Proxy):
                    vars(user)[key] = sys.modules.get(value.__name__, value)
        return module


@contextlib.contextmanager
def deferred(*names: str) -> Iterator[None]:
    """Within the block, importing one of the named top-level modules, or a submodule, gives a proxy.

    Nothing changes for a module that is imported already. On leaving, no proxy is left in ``sys.modules``;
    those that other modules hold go on working. A block within another one is part of that one.

    Args:
        names: top-level modules, for example ``torch``; default ``HEAVY``.
    """
    wanted = names or HEAVY
    if any(isinstance(finder, _Finder) and {*wanted} <= {*finder.names} for finder in sys.meta_path):
        yield
        return
    finder = _Finder(wanted)
    finder.enter()
    try:
        yield
    finally:
        finder.leave()
