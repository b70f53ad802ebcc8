"""The kit for plugin authors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rlx.plugins.discovery import Plugin, admit, load_builtins
from rlx.plugins.registry import Registry, using


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


__all__ = ["isolated"]
