"""The registry: which component a name stands for, and who offers it.

Components are strings ``"pkg.mod:Attribute"``, imported on first use, or objects. Two plugins may offer one
name; it is an error when the name is used, and ``plugin/name`` says which one is meant.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import pluggy

from rlx.core.errors import ConfigError, ErrorGroup, PluginError, RlxError
from rlx.core.options import close
from rlx.plugins import loading
from rlx.plugins.contract import KINDS
from rlx.plugins.discovery import Broken, Plugin, load_builtins, load_plugins
from rlx.plugins.hookspecs import PROJECT, GlobalHooks

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One component on offer.

    Attributes:
        kind: one of ``rlx.plugins.contract.KINDS``.
        name: what users write.
        target: ``"pkg.mod:Attribute"``, or the object itself.
        plugin: the plugin that offers it; ``rlx`` for built-ins, the top-level module for ``rlx.register``.
        distribution: the installed package that the plugin belongs to; empty for ``rlx.register``.
        version: the distribution's version.
        summary: one line.
    """

    kind: str
    name: str
    target: str | object
    plugin: str
    distribution: str = ""
    version: str = ""
    summary: str = ""

    @property
    def qualified(self) -> str:
        """``plugin/name``: this entry and no other."""
        return f"{self.plugin}/{self.name}"

    @property
    def address(self) -> str:
        """``pkg.mod:Attribute``, also of a target that is the object itself."""
        return self.target if isinstance(self.target, str) else ":".join(_definition(self.target))

    @property
    def offered_by(self) -> str:
        """The qualified name and the distribution, for messages."""
        return (
            f"{self.qualified} ({self.distribution} {self.version})" if self.distribution else self.qualified
        )


Entries = list[Entry]  # inside the class, ``list`` is its method
Plugins = list[Plugin]


class Registry:
    """Components by kind and name, and the plugins that offer them.

    Attributes:
        broken: plugin name → why it failed to load.
        blocked: plugins that were not imported because the user said so.
        manager: pluggy's, with the global hooks.
    """

    def __init__(self) -> None:
        self.broken: dict[str, Broken] = {}
        self.blocked: Plugins = []
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(GlobalHooks)
        self.manager.hook.rlx_register.call_historic(
            kwargs={"registry": self}
        )  # also for plugins still to come
        self._entries: Entries = []
        self._plugins: Plugins = []
        self._loading: Plugin | None = None

    def add(self, kind: str, name: str, target: str | object, summary: str = "") -> None:
        """Offer a component under a name.

        Args:
            kind: one of ``algorithm, reward, transform, callback, generator, judge, dataset``.
            name: letters, digits, ``_``, ``-`` and ``.``.
            target: ``"pkg.mod:Attribute"``, imported on first use, or the object itself.
            summary: one line for ``rlx plugins``.

        Raises:
            PluginError: for an unknown kind, an unfit name or target, or a name that the same plugin gave
                before.
        """
        where = f"registry.add({kind!r}, {name!r}, …)"
        if kind not in KINDS:
            raise PluginError(
                f"there is no kind {kind!r}{close(str(kind), KINDS)}",
                code="E-PLUGIN-REGISTER",
                where=where,
                expected=", ".join(KINDS),
            )
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PluginError(
                f"{name!r} is not a component's name",
                code="E-PLUGIN-REGISTER",
                where=where,
                expected="letters, digits, '_', '-' and '.'",
            )
        if isinstance(target, str) and not all(target.rpartition(":")[::2]):
            raise PluginError(
                f"{target!r} does not say which attribute",
                code="E-PLUGIN-REGISTER",
                where=where,
                expected="'pkg.module:Attribute'",
            )
        plugin = self._loading or Plugin(_home(target), "", "", "")
        entry = Entry(kind, name, target, plugin.name, plugin.distribution, plugin.version, summary)
        same = [o for o in self._entries if (o.kind, o.qualified) == (kind, entry.qualified)]
        # The same definition run once more, as when a notebook's cell is, takes the place of the old one.
        if any(type(o.target) is not type(target) or o.address != entry.address for o in same):
            raise PluginError(
                f"{kind} {entry.qualified!r} is offered twice",
                code="E-PLUGIN-REGISTER",
                got=f"{entry.address} after {same[0].address}",
            )
        self._entries = [other for other in self._entries if other not in same]
        self._entries.append(entry)

    def list(self, kind: str | None = None) -> Entries:
        """The entries of a kind, or all, sorted by kind, name and plugin.

        Raises:
            ConfigError: for an unknown kind.
        """
        if kind is not None and kind not in KINDS:
            raise ConfigError(
                f"there is no kind {kind!r}{close(kind, KINDS)}",
                code="E-CONFIG-KIND",
                expected=", ".join(KINDS),
            )
        chosen = [entry for entry in self._entries if kind in (None, entry.kind)]
        return sorted(chosen, key=lambda entry: (KINDS.index(entry.kind), entry.name, entry.plugin))

    def find(self, kind: str, ref: str) -> Entry:
        """The entry behind ``name`` or ``plugin/name``.

        Raises:
            ConfigError: if the name is unknown, or several plugins offer it.
            PluginError: if ``plugin/name`` names a plugin that failed to load.
        """
        entries = self.list(kind)
        plugin, _, name = ref.rpartition("/")
        found = [entry for entry in entries if entry.name == name and plugin in ("", entry.plugin)]
        if len(found) > 1:
            raise ConfigError(
                f"{len(found)} plugins offer a {kind} {ref!r}",
                code="E-PLUGIN-AMBIGUOUS",
                got=", ".join(entry.offered_by for entry in found),
                hint=f"write which one you mean: {' or '.join(entry.qualified for entry in found)}",
            )
        if not found:
            raise self.unknown(kind, ref, entries)
        return found[0]

    def get(self, kind: str, ref: str) -> Any:
        """The component behind ``name`` or ``plugin/name``, imported and checked.

        Raises:
            ConfigError: as ``find``.
            PluginError: if it does not import, or is not what its kind asks for.
        """
        entry = self.find(kind, ref)
        try:
            component = loading.load(entry.target) if isinstance(entry.target, str) else entry.target
            return loading.check(kind, component, entry.name)
        except PluginError as error:
            error.add_note(f"{kind} {entry.name!r} is offered by {entry.offered_by}")
            raise

    def plugins(self) -> Plugins:
        """The plugins that were loaded, built-ins first, then in alphabetical order."""
        return list(self._plugins)

    def failure(self, plugin: str) -> PluginError:
        """The error for using a broken plugin, with what it raised as its cause."""
        broken = self.broken[plugin]
        seen = broken.plugin
        told = broken.error.hint if isinstance(broken.error, RlxError) else ""
        repair = f"{told}; repair" if told else "repair"
        error = PluginError(
            f"plugin {plugin!r} failed to load",
            code="E-PLUGIN-BROKEN",
            got=broken.reason,
            where=f"{seen.distribution} {seen.version}, entry point {seen.value}",
            hint=f"{repair} or uninstall {seen.distribution}, or leave it out: --no-plugin {plugin}",
        )
        error.__cause__ = broken.error
        return error

    @contextlib.contextmanager
    def loading(self, plugin: Plugin) -> Iterator[None]:
        """Within the block, what is added belongs to the plugin; if the block fails, nothing of it stays."""
        entries, outer = list(self._entries), self._loading
        self._loading = plugin
        try:
            yield
        except BaseException:
            self._entries = entries
            raise
        finally:
            self._loading = outer
        self._plugins.append(plugin)

    def unknown(self, kind: str, ref: str, entries: Iterable[Entry]) -> RlxError:
        """The error for a name that none of the entries has, with the plugins that are missing and why."""
        if ref.rpartition("/")[0] in self.broken:
            return self.failure(ref.rpartition("/")[0])
        names = sorted({entry.name for entry in entries})
        hint = ""
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", ref):
            hint = f"for an attribute of a module write {':'.join(ref.rsplit('.', 1))}"
        elsewhere = [entry for entry in self._entries if entry.name == ref]
        if elsewhere:
            hint = f"{ref!r} is of kind {elsewhere[0].kind}"
        elif any(plugin.name == ref for plugin in self._plugins):
            offered = [f"{entry.kind} {entry.name}" for entry in self._entries if entry.plugin == ref]
            what = ", ".join(offered) or "nothing: its rlx_register adds nothing to the registry"
            hint = f"{ref!r} is a plugin, and offers {what}"
        error = ConfigError(
            f"there is no {kind} {ref!r}{close(ref.rpartition('/')[2], names)}",
            code="E-PLUGIN-UNKNOWN",
            expected=f"{', '.join(names) or 'none is registered'}; or module:Attribute, ./file.py:Attribute",
            hint=hint,
        )
        for name, broken in list(self.broken.items())[:3]:
            error.add_note(f"plugin {name!r} failed to load: {broken.reason}"[:200])
        if self.broken:
            error.add_note("rlx plugins list shows every plugin that failed to load")
        if self.blocked:
            blocked = ", ".join(plugin.name for plugin in self.blocked)
            error.add_note(f"not loaded, because of --no-plugin or RLX_NO_PLUGINS: {blocked}")
        return error


_current: Registry | None = None


def registry() -> Registry:
    """The registry of this process; plugins are discovered at the first call."""
    return _current if _current is not None else discover()


def discover(*, no_plugins: Iterable[str] = (), strict: bool = False) -> Registry:
    """Look for plugins anew, for the registry of this process; entries of ``rlx.register`` are kept.

    Args:
        no_plugins: plugins, by name or distribution, that are not even imported; ``*`` for all but the
            built-ins. The environment variable ``RLX_NO_PLUGINS=a,b`` adds to them.
        strict: a plugin that fails to load is an error.

    Raises:
        ConfigError: if no_plugins names a plugin that is not there.
        PluginError: with strict, for the plugins that failed to load.
    """
    named = list(no_plugins)
    environment = [name.strip() for name in os.environ.get("RLX_NO_PLUGINS", "").split(",")]
    fresh, before = Registry(), _current
    # A plugin that calls rlx.register while it is imported must find the registry that is being filled.
    with using(fresh):
        load_builtins(fresh)
        load_plugins(fresh, {*named, *filter(None, environment)})
    fresh._entries += [entry for entry in (before._entries if before else ()) if not entry.distribution]
    for name in named:
        if name != "*" and not any(name in (plugin.name, plugin.distribution) for plugin in fresh.blocked):
            seen = [plugin.name for plugin in fresh.plugins()[1:]]
            raise ConfigError(
                f"--no-plugin {name!r}: there is no such plugin{close(name, seen)}",
                code="E-CONFIG-UNKNOWN",
                expected=", ".join(seen) or "no plugin is installed",
            )
    if strict and fresh.broken:
        failures = [fresh.failure(name) for name in fresh.broken]
        raise failures[0] if len(failures) == 1 else ErrorGroup(list(failures))
    _use(fresh)
    return fresh


def _use(fresh: Registry | None) -> None:
    global _current
    _current = fresh


@contextlib.contextmanager
def using(fresh: Registry) -> Iterator[Registry]:
    """Within the block, the given registry is the one of this process; the old one is back afterwards."""
    before = _current
    _use(fresh)
    try:
        yield fresh
    finally:
        _use(before)


@overload
def register(kind: str, name: str, obj: T, summary: str = "") -> T: ...
@overload
def register(kind: str, name: str, obj: None = None, summary: str = "") -> Callable[[T], T]: ...
def register(kind: str, name: str, obj: T | None = None, summary: str = "") -> T | Callable[[T], T]:
    """Offer a component in this process: ``rlx.register("reward", "brevity", fn)``, or as a decorator.

    Args:
        kind: one of ``algorithm, reward, transform, callback, generator, judge, dataset``.
        name: what you will write, ``--reward brevity``.
        obj: the component, or ``"pkg.mod:Attribute"``; leave out to use the call as a decorator.
        summary: one line for ``rlx plugins``; default: the first line of the docstring.

    Returns:
        obj, or the decorator.

    Raises:
        PluginError: as ``Registry.add``.
    """

    def add(component: T) -> T:
        doc = "" if isinstance(component, str) else (getattr(component, "__doc__", None) or "")
        registry().add(kind, name, component, summary or doc.strip().partition("\n")[0])
        return component

    return add if obj is None else add(obj)


def get(kind: str, ref: str) -> Any:
    """The registered component behind ``name`` or ``plugin/name``; see ``Registry.get``."""
    return registry().get(kind, ref)


def available(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted({entry.name for entry in registry().list(kind)})


def _home(target: str | object) -> str:
    """The plugin name of something registered from Python: its top-level module."""
    module = target if isinstance(target, str) else _definition(target)[0]
    return module.replace(":", ".").partition(".")[0]


def _definition(target: object) -> tuple[str, str]:
    """Module and qualified name of a class or function, or of an instance's class."""
    owner: Any = target if hasattr(target, "__qualname__") else type(target)
    return owner.__module__, owner.__qualname__
