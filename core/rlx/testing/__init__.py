"""The kit for plugin authors: a registry of their own for tests, and the named conformance cases.

``test_conformance = conformance(MyReward)`` in a test file makes one test of each case; ``rlx plugins check
REF`` runs the same ones. pytest is imported by ``conformance`` alone, torch by the cases that need it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rlx.plugins.discovery import Plugin, admit, load_builtins
from rlx.plugins.registry import Registry, using
from rlx.testing.kit import Case, NotApplicable, Outcome, Subject, cases, check, conformance


@contextlib.contextmanager
def isolated(*plugins: object) -> Iterator[Registry]:
    """Within the block, the registry is a fresh one; the old one is back afterwards, also after an exception.

    Args:
        plugins: modules or objects with hooks, to be registered as if they were installed. What is installed
            is not seen: the fresh registry has the built-ins and these.

    Yields:
        The fresh registry.

    Raises:
        PluginError: if a plugin does not load.
    """
    with using(Registry()) as fresh:
        load_builtins(fresh)
        for plugin in plugins:
            name = getattr(plugin, "__name__", type(plugin).__name__)  # a module's name, or an object's class
            with fresh.loading(Plugin(name, "", "", name)):
                admit(fresh, plugin, name)
        yield fresh


__all__ = ["Case", "NotApplicable", "Outcome", "Subject", "cases", "check", "conformance", "isolated"]
