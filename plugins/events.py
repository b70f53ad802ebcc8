"""Calling hooks: the events of one run, and the global hooks. A failure names plugin, hook and step.

pluggy checks and keeps the implementations; the calls are made here, because pluggy calls the last registered
first and one failure ends the call, where callbacks run in the order in which they were added and an
observer's failure ends nothing but the observer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pluggy

from rlx.core.errors import PluginError
from rlx.core.text import safe_text
from rlx.plugins.hookspecs import PROJECT, RunEvents, arguments, check_hooks
from rlx.plugins.references import origin
from rlx.plugins.registry import registry

log = logging.getLogger(__name__)

# Told on all processes between their common work. on_rollouts and on_save are told inside work that is agreed
# on, on_error and on_run_end when the others may be anywhere.
AGREED = ("on_run_start", "on_loss", "on_step_end", "on_log", "on_evaluate")


class Events:
    """The callbacks of one run.

    Args:
        within: makes the context that an event's callbacks are called in; None for none.
        agreed: makes, of the run and of what is being done, a context after which all processes know whether
            the callbacks failed on one; None for none.

    Attributes:
        begun: whether ``on_run_start`` was told.
        owned: callbacks that were built for the run; the others are somebody's.
        disabled: callback name → why it was switched off, for observers that failed.
    """

    def __init__(
        self,
        within: Callable[[], AbstractContextManager[Any]] | None = None,
        agreed: Callable[[Any, str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._within = within or nullcontext
        self._agreed = agreed
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(RunEvents)
        self._arguments = arguments(RunEvents)
        self._callbacks: dict[str, Any] = {}
        self.owned: list[Any] = []
        self._going = self.begun = False  # the first: between on_run_start and on_run_end
        self.disabled: dict[str, str] = {}

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks that are called, in that order."""
        return list(self._callbacks.values())

    @property
    def named(self) -> dict[str, Any]:
        """Name → callback, in the order in which they are called."""
        return dict(self._callbacks)

    def add(self, callback: Any, name: str | None = None, *, owned: bool = False) -> str:
        """Add a callback; it is called from the next event on, after those that were added before.

        Args:
            callback: an object with methods marked by ``rlx.hookimpl``, each taking any of its event's
                arguments.
            name: for messages and checkpoints; default: its class. One that is taken gets a number.
            owned: it was built for the run.

        Returns:
            The name.

        Raises:
            PluginError: for a misspelt event or argument, a method that lacks the mark, a class in the place
                of an object, a callback without any event, and one that was added before.
        """
        shown = self._free_name(name or type(callback).__name__)
        problems = check_hooks(callback, RunEvents)
        if isinstance(callback, type):
            problems = [f"it is a class; add {callback.__name__}(…)"]
        elif any(callback is other for other in self._callbacks.values()):
            problems = ["it was added before"]
        if problems:
            raise PluginError(
                f"callback {shown!r} cannot be used: {'; '.join(problems)}",
                code="E-PLUGIN-HOOK",
                where=origin(callback),
            )
        self._manager.register(callback, shown)
        self._callbacks[shown] = callback
        self.owned += [callback] if owned else []
        return shown

    def find(self, callback: Any) -> str:
        """The name of a callback.

        Args:
            callback: its name, the object, or its class.

        Raises:
            ValueError: there is none, or there are several of that class.
        """
        found = [
            name
            for name, one in self._callbacks.items()
            if one is callback or name == callback or type(one) is callback
        ]
        if len(found) != 1:
            several = f"{callback!r} means several callbacks: {', '.join(found)}; name one"
            none = f"{callback!r} is no callback of this run; there are {', '.join(self._callbacks)}"
            raise ValueError(safe_text(several if found else none))
        return found[0]

    def heard(self, event: str) -> bool:
        """Whether any callback is called for an event."""
        return bool(self._implementations(event, list(self._callbacks)))

    def begin(self, name: str, run: Any) -> None:
        """Tell ``on_run_start`` to a callback that came late; nothing happens before the run has begun."""
        self._tell_one(name, "on_run_start", run)

    def end(self, name: str, run: Any) -> None:
        """Tell ``on_run_end`` to a callback that leaves early; nothing happens before the run has begun."""
        self._tell_one(name, "on_run_end", run)

    def remove(self, callback: Any) -> None:
        """Remove a callback, by identity; it may be called for the event that is under way.

        Raises:
            ValueError: if it is not there.
        """
        for name, other in self._callbacks.items():
            if other is callback:
                del self._callbacks[name]
                self._manager.unregister(name=name)
                return
        raise ValueError(f"{callback!r} is no callback of this run")

    def emit(self, event: str, **given: Any) -> list[Any]:
        """Tell every callback, in the order in which they were added.

        Args:
            event: a method of ``RunEvents``.
            given: all of the event's arguments.

        Returns:
            What the callbacks returned, None left out.

        Raises:
            TypeError: if the event does not exist or an argument is missing or too many.
            Exception: whatever a callback raises, with a note; an observer's failure only switches it off.
        """
        if set(given) != set(self._arguments.get(event, ())) or event not in self._arguments:
            raise TypeError(
                f"emit({event!r}, {', '.join(given)}): expected {self._arguments.get(event, 'another event')}"
            )
        if event in ("on_run_start", "on_run_end"):
            self._going = event == "on_run_start"
            self.begun = self.begun or self._going
        impls = self._implementations(event, list(self._callbacks))
        with self._within():
            if self._agreed is None or event not in AGREED:
                results = self._told(event, given, impls)
            else:
                results = self._told_together(event, given, impls)
        return [result for result in results if result is not None]

    def _tell_one(self, name: str, event: str, run: Any) -> None:
        if self._going:
            with self._within():
                self._told(event, {"run": run}, self._implementations(event, [name]))

    def _implementations(self, event: str, names: list[str]) -> list[pluggy.HookImpl]:
        return _in_order(getattr(self._manager.hook, event), names)

    def _told_together(self, event: str, given: Mapping[str, Any], impls: list[pluggy.HookImpl]) -> list[Any]:
        """As ``_told``; before and after each callback that waits for other processes all of them agree.

        The agreements are counted by those callbacks alone: others may be there on one process only.
        """
        assert self._agreed is not None
        parts: list[list[pluggy.HookImpl]] = [[]]
        for impl in impls:
            # A callback need not inherit rlx.Callback, so `collective` may be absent.
            if getattr(impl.plugin, "collective", False):
                parts += [[impl], []]
            else:
                parts[-1].append(impl)
        results = []
        for place, part in enumerate(parts):
            with self._agreed(given["run"], f"a callback, in {event}") if place % 2 == 0 else nullcontext():
                results += self._told(event, given, part)
        return results

    def _told(self, event: str, given: Mapping[str, Any], impls: list[pluggy.HookImpl]) -> list[Any]:
        results = []
        for impl in impls:
            try:
                results.append(_call(impl, given))
            except Exception as error:
                # A callback need not inherit rlx.Callback, so `observer` may be absent.
                shown = f"callback {impl.plugin_name!r} of {origin(impl.plugin)}"
                note = f"{shown}, hook {event}, step {given['run'].global_step}"
                if not getattr(impl.plugin, "observer", False):
                    error.add_note(note)
                    raise
                self._switch_off(impl, error, note)
        return results

    def _switch_off(self, impl: pluggy.HookImpl, error: Exception, note: str) -> None:
        reason = f"{type(error).__name__}: {safe_text(error)} ({note})"
        log.warning("%s was switched off; the run goes on: %s", impl.plugin_name, reason)
        self.disabled[impl.plugin_name] = reason
        if impl.plugin_name in self._callbacks:
            self.remove(impl.plugin)

    def _free_name(self, name: str) -> str:
        taken = {*self._callbacks, *self.disabled}
        numbered = (f"{name}_{number}" for number in range(2, len(taken) + 3))
        return name if name not in taken else next(free for free in numbered if free not in taken)


class Hooks:
    """The global hooks of all plugins that are loaded."""

    def rlx_validate(self, *, config: Any) -> None:
        """Let every plugin look at the config; one that raises stops the run before any weight is loaded."""
        self._all("rlx_validate", {"config": config}, lambda result: False)

    def rlx_load_model(self, *, spec: Any) -> Any:
        """The first model that a plugin has for the spec; None if no plugin has one."""
        return self._all("rlx_load_model", {"spec": spec}, lambda result: result is not None)

    def _all(self, hook: str, given: Mapping[str, Any], enough: Callable[[Any], bool]) -> Any:
        plugins = registry().plugins()
        for impl in _in_order(getattr(registry().manager.hook, hook), [plugin.name for plugin in plugins]):
            try:
                result = _call(impl, given)
            except Exception as error:
                seen = next(plugin for plugin in plugins if plugin.name == impl.plugin_name)
                error.add_note(f"plugin {seen.name!r} ({seen.distribution} {seen.version}), hook {hook}")
                raise
            if enough(result):
                return result
        return None


def has_state(callback: Any) -> bool:
    """Whether a callback has state for checkpoints; it need not inherit ``rlx.Callback``."""
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


def global_hooks() -> Hooks:
    """The global hooks: ``global_hooks().rlx_validate(config=…)``, ``.rlx_load_model(spec=…)``."""
    return Hooks()


def _in_order(hook: pluggy.HookCaller, names: list[str]) -> list[pluggy.HookImpl]:
    """The implementations: ``tryfirst`` ones, plain ones, ``trylast`` ones, each in the order of names."""
    wanted = [impl for impl in hook.get_hookimpls() if impl.plugin_name in names]
    return sorted(wanted, key=lambda impl: (impl.trylast - impl.tryfirst, names.index(impl.plugin_name)))


def _call(impl: pluggy.HookImpl, given: Mapping[str, Any]) -> Any:
    """The result of one implementation, called with the arguments that it asks for.

    It gets metrics of its own: what it does to them is seen neither by the next one nor in the run's history.
    """
    asked = {name: given[name] for name in (*impl.argnames, *impl.kwargnames)}
    return impl.function(**{k: dict(v) if k == "metrics" else v for k, v in asked.items()})
