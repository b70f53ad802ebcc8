"""Which kind a component is of: from its registered name, or from its shape."""

from __future__ import annotations

import inspect
from typing import Any

from rlx.core.errors import ConfigError, PluginError
from rlx.plugins import contract, loading
from rlx.plugins.contract import KINDS
from rlx.plugins.registry import registry

BASES: dict[str, type] = {
    "algorithm": contract.Algorithm,
    "reward": contract.Reward,
    "transform": contract.Transform,
    "callback": contract.Callback,
}


def kind_of(ref: Any) -> str:
    """The kind of a component.

    Args:
        ref: a registered name, ``plugin/name``, a reference to code, or the component itself.

    Raises:
        ConfigError: an unknown name; or several kinds fit, and it has to be said which one is meant.
        PluginError: it does not load, or is no component of any kind.
    """
    if isinstance(ref, str) and ":" not in ref:
        found = registry()
        kinds = [kind for kind in KINDS if any(ref in (e.name, e.qualified) for e in found.list(kind))]
        if not kinds:
            raise found.unknown("component", ref, found.list())
        return _only(kinds, ref)
    component = loading.load(ref) if isinstance(ref, str) else ref
    shown = ref if isinstance(ref, str) else getattr(ref, "__qualname__", type(ref).__qualname__)
    owner = component if isinstance(component, type) else type(component)
    for kind, base in BASES.items():
        if issubclass(owner, base):
            return kind
    kinds = [kind for kind in KINDS if _fits(kind, component, shown)]
    if "callback" in kinds:  # hooks are marked; nothing else has them
        return "callback"
    if not kinds:
        raise PluginError(
            f"{shown!r} is no component of any kind",
            code="E-PLUGIN-PROTOCOL",
            where=loading.source(component),
            expected=", ".join(KINDS),
            hint="--kind KIND says what is missing",
        )
    return _only(_by_arguments(component, kinds), shown)


def _fits(kind: str, component: Any, shown: str) -> bool:
    try:
        loading.check(kind, component, shown)
    except PluginError:
        return False
    return True


def _by_arguments(component: Any, kinds: list[str]) -> list[str]:
    """Rewards and transforms are both called; a reward takes completions by name, a transform its rows."""
    if not {"reward", "transform"} <= set(kinds):
        return kinds
    called = component.__call__ if isinstance(component, type) else component
    names = set(inspect.signature(called).parameters)
    if names & {"completions", "completion_ids"}:
        return ["reward"]
    members = dir(component)
    if {"takes", "gives"} <= set(members) or "rows" in names:
        return ["transform"]
    return kinds


def _only(kinds: list[str], shown: str) -> str:
    if len(kinds) == 1:
        return kinds[0]
    raise ConfigError(
        f"{shown!r} may be of several kinds",
        code="E-CONFIG-KIND",
        got=", ".join(kinds),
        hint=f"say which one is meant: --kind {kinds[0]}",
    )
