"""Find plugins: entry points of the group ``rlx.v1``, one by one, each failing for itself.

Not pluggy's own loop: that one stops at the first failure, passes over duplicates in silence, and follows the
order of the file system. The group carries the API's major version, so a plugin for another one is seen
without importing it.
"""

from __future__ import annotations

import importlib.metadata
import re
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlx.core.errors import PluginError, RlxError
from rlx.core.text import safe_text
from rlx.plugins import loading
from rlx.plugins.hookspecs import GlobalHooks, check_hooks

if TYPE_CHECKING:
    from rlx.plugins.registry import Registry

API = 1
GROUP = re.compile(r"rlx\.v(\d+)")
BUILTIN = "rlx"


@dataclass(frozen=True)
class Plugin:
    """A plugin that was seen.

    Attributes:
        name: the entry point's name.
        distribution: the installed package.
        version: its version.
        value: the entry point's value, ``pkg.mod`` or ``pkg.mod:object``.
        api: major version of the plugin API, the number in the entry point's group.
    """

    name: str
    distribution: str
    version: str
    value: str
    api: int = API


@dataclass(frozen=True)
class Broken:
    """A plugin that failed to load.

    Attributes:
        plugin: which one.
        reason: one or a few sentences.
        traceback: Python's, empty if nothing was raised.
        error: what was raised.
    """

    plugin: Plugin
    reason: str
    traceback: str = ""
    error: BaseException | None = None

    def __str__(self) -> str:
        return self.reason


def load_builtins(registry: Registry) -> None:
    """Let the catalogue of built-ins register; a failure here is a bug and is raised."""
    with registry.loading(Plugin(BUILTIN, "rlx", importlib.metadata.version("rlx"), "rlx.plugins.catalogue")):
        admit(registry, loading.load_module("rlx.plugins.catalogue"), BUILTIN)


def load_plugins(registry: Registry, blocked: Collection[str]) -> None:
    """Add every installed plugin to a registry, in alphabetical order; one that fails goes into ``broken``.

    Args:
        registry: one with the built-ins.
        blocked: names of plugins or distributions that are not imported; ``*`` for all.
    """
    installed = _installed()
    registry.blocked += [p for p in installed if {"*", p.name, p.distribution} & set(blocked)]
    wanted = [p for p in installed if p not in registry.blocked]
    for plugin in wanted:
        same = [f"{p.distribution} {p.version}" for p in wanted if (p.name, p.api) == (plugin.name, API)]
        reason = ""
        if plugin.api != API:
            reason = f"needs plugin API {plugin.api}, this rlx has {API}"
        elif plugin.name == BUILTIN:
            reason = f"the plugin name {BUILTIN!r} belongs to the built-ins"
        elif len(same) > 1:
            reason = f"several distributions offer a plugin of this name: {', '.join(same)}"
        if reason:
            name = plugin.distribution if plugin.name == BUILTIN else plugin.name
            registry.broken[name] = Broken(plugin, reason)
        else:
            _load(registry, plugin)


def admit(registry: Registry, found: object, name: str) -> None:
    """Check a plugin's hooks and register it, which calls its ``rlx_register``.

    Raises:
        PluginError: for a misspelt hook or argument, or a plugin without any hook.
        Exception: whatever its ``rlx_register`` raises.
    """
    problems = check_hooks(found, GlobalHooks)
    if problems:
        raise PluginError("; ".join(problems), code="E-PLUGIN-HOOK")
    try:
        registry.manager.register(found, name)
    except BaseException:
        if registry.manager.has_plugin(name):
            registry.manager.unregister(name=name)
        raise


def _installed() -> list[Plugin]:
    """The entry points of every group ``rlx.v<number>``, in alphabetical order."""
    found, plugins = importlib.metadata.entry_points(), []
    for group in found.groups:
        if not (match := GROUP.fullmatch(group)):
            continue
        for point in found.select(group=group):
            assert point.dist is not None  # it was read from an installed distribution
            seen = Plugin(point.name, point.dist.name, point.dist.version, point.value, int(match[1]))
            plugins.append(seen)
    # A distribution may serve several APIs; then what it has for the others does not matter.
    served = {(plugin.name, plugin.distribution) for plugin in plugins if plugin.api == API}
    plugins = [p for p in plugins if p.api == API or (p.name, p.distribution) not in served]
    return sorted(plugins, key=lambda plugin: (plugin.name, plugin.distribution))


def _load(registry: Registry, plugin: Plugin) -> None:
    """Import one plugin and let it register; a failure is recorded, and nothing of the plugin stays."""
    try:
        with registry.loading(plugin):
            load = loading.load if ":" in plugin.value else loading.load_module
            admit(registry, load(plugin.value), plugin.name)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, RlxError):
            reason = f"{error.what} ({error.got})" if error.got else error.what
        registry.broken[plugin.name] = Broken(plugin, safe_text(reason), traceback.format_exc(), error)
