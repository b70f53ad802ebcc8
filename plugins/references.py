"""One grammar for every reference to a component, on the command line, in YAML and in Python.

``dpo`` is a registered name, ``rlx-grpo/dpo`` the one of a certain plugin, ``my_pkg.rewards:MyReward`` any
importable attribute, ``./rewards.py:MyReward`` an attribute of a file; in Python also the object itself.
A reward may be the address of a server: ``http://host:8000/score`` is ``http`` with that ``url``;
or an adapter of the policy's base: ``lora:DIR`` is ``lora`` with that ``path``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import build, close
from rlx.plugins import loading
from rlx.plugins.contract import KINDS, NoOptions
from rlx.plugins.registry import registry


def resolve(kind: str, ref: Any) -> Any:
    """The component that a reference means: a class, a function or an instance.

    Args:
        kind: one of ``algorithm, reward, transform, callback, generator, judge, dataset``.
        ref: a reference, or the component itself.

    Raises:
        ConfigError: for a name that is unknown or offered by several plugins, and for text that is no
            reference.
        PluginError: for a module, file or attribute that is missing, a module that fails while it is
            imported, and a component that lacks what its kind asks for.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; the kinds are {', '.join(KINDS)}")
    if not isinstance(ref, str):
        return loading.check(kind, ref, describe(kind, ref))
    ref, _ = spelt_out(kind, ref)
    if ":" in ref:
        return loading.check(kind, loading.load(ref), ref)
    if ref.endswith(".py"):
        raise ConfigError(
            f"{ref!r} does not say which {kind} in the file", code="E-REFERENCE", expected=f"{ref}:Attribute"
        )
    return registry().get(kind, ref)


def spelt_out(kind: str, ref: str) -> tuple[str, dict[str, str]]:
    """A reference in full: the URL of a reward server is ``http``, and ``lora:DIR`` ``lora``, with an option.

    Args:
        kind: of the component.
        ref: as given.

    Returns:
        The name and the options that the reference holds.
    """
    if kind == "reward" and ref.lower().startswith(("http://", "https://")):
        return "http", {"url": ref}
    if kind == "reward" and ref.startswith("lora:"):
        return "lora", {"path": ref.removeprefix("lora:")}
    return ref, {}


def config_of(component: Any) -> type:
    """The component's Config dataclass; ``NoOptions`` for one that has none, as a plain function."""
    return component.Config if hasattr(component, "Config") else NoOptions


def make(
    kind: str, ref: Any, options: Mapping[str, Any] | None = None, *, where: Mapping[str, str] | None = None
) -> Any:
    """The component, built with its options.

    A class with a Config is called with it, a class without one with the options as keywords; a function or
    an instance is what it is and takes none.

    Args:
        kind: one of ``algorithm, reward, transform, callback, generator, judge, dataset``.
        ref: a reference, or the component itself.
        options: option name → raw value.
        where: option name → where it was given, for messages.

    Raises:
        ConfigError: for an option that is unknown or has a value that is not allowed, and as ``resolve``.
        PluginError: as ``resolve``.
    """
    held: dict[str, str] = {}
    if isinstance(ref, str):
        ref, held = spelt_out(kind, ref)
    component, given = resolve(kind, ref), {**held, **(options or {})}
    owner = f"{kind} {describe(kind, ref)}"
    if not isinstance(component, type):
        if given:
            raise ConfigError(
                f"{owner} has no option {next(iter(given))!r}: it is no class, and takes none",
                code="E-CONFIG-UNKNOWN",
                where=(where or {}).get(next(iter(given)), ""),
            )
        return component
    try:
        if hasattr(component, "Config"):
            return component(build(component.Config, given, owner=owner, where=where))
        _check_keywords(component, given, owner, where or {})
        return component(**given)
    except Exception as error:
        if not isinstance(error, ConfigError):
            error.add_note(f"while {owner} was built, of {origin(component)}")
        raise


def describe(kind: str, ref: Any) -> str:
    """A short name for messages and metrics: ``length``, ``my_pkg:MyReward``."""
    if isinstance(ref, str):
        return ref
    owner = ref if hasattr(ref, "__qualname__") else type(ref)
    target = f"{owner.__module__}:{owner.__qualname__}"
    for entry in registry().list(kind):
        if entry.target is ref or entry.target == target:  # the text, where it is not loaded by name
            return entry.name
    return target


def origin(component: Any) -> str:
    """Who a component belongs to, for messages: its plugin and distribution, or else its file and line."""
    owner = component if hasattr(component, "__qualname__") else type(component)
    target = f"{owner.__module__}:{owner.__qualname__}"
    for entry in registry().list():
        if entry.target in (owner, component) or entry.target == target:
            distribution = f" ({entry.distribution} {entry.version})" if entry.distribution else ""
            return f"plugin {entry.plugin!r}{distribution}"
    return loading.source(component) or target


def _check_keywords(component: type, given: Mapping[str, Any], owner: str, where: Mapping[str, str]) -> None:
    """A ConfigError for options that the constructor of a class without Config does not take, or lacks."""
    parameters = inspect.signature(component).parameters
    try:
        inspect.signature(component).bind(**given)
    except TypeError as error:
        unknown = next((name for name in given if name not in parameters), "")
        raise ConfigError(
            f"{owner} cannot be built with these options: {error}{close(unknown, list(parameters))}",
            code="E-CONFIG-UNKNOWN",
            where=where.get(unknown, ""),
            expected=", ".join(map(str, parameters.values())) or "no options at all",
        ) from None
