"""Components as a config names them: what is chosen, under which name, with which options.

Accepted: a reference, ``{name: length, weight: 0.2, target: 50}``, the object itself in Python; options also
as dotted flags (``--length.target 50``). A component's module is imported here, without torch, to check its
options.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlx.core.errors import ConfigError, ErrorGroup, PluginError, RlxError
from rlx.core.options import build, close, options
from rlx.core.plain import scalar
from rlx.core.text import safe_text
from rlx.plugins import references
from rlx.plugins.contract import NoOptions

REFERENCE_OFF: Mapping[str, Any] = {"beta": 0, "kl_coef": 0, "reference_free": True}
"""Options of algorithms, each with the value at which no reference is asked."""


@dataclass(frozen=True)
class Component:
    """One chosen component.

    Attributes:
        kind: ``reward``, ``transform``, …
        ref: a reference, or the object itself.
        options: every option of its Config with its typed value.
        where: where it was chosen.
        name: short and unique among the components of its kind; metrics and dotted flags use it.
    """

    kind: str
    ref: Any
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    name: str = ""

    def make(self) -> Any:
        """The component itself, built with its options."""
        return references.make(self.kind, self.ref, self.options)

    def written(self) -> Any:
        """As a config writes it: the reference, or a mapping with the options."""
        return {"name": self.ref, **self.options} if self.options else self.ref


@dataclass
class Spec:
    """A component before its options were checked.

    Attributes:
        kind, ref, name, where: as of ``Component``.
        given: raw options.
        places: option → where it was given.
        weight: of a reward, None when it is not given here.
    """

    kind: str
    ref: Any
    name: str
    where: str
    given: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    weight: Any = None


def short_name(kind: str, ref: Any) -> str:
    """The last part of a reference: ``MyReward`` of ``my_pkg.rewards:MyReward`` or ``./file.py:MyReward``."""
    shown = references.describe(kind, ref)
    return re.split(r"[:/.]", shown)[-1] or shown


def read_specs(kind: str, raw: Any, path: str, where: Mapping[str, str]) -> tuple[list[Spec], list[RlxError]]:
    """The components named under one option.

    Args:
        kind: of the components.
        raw: one spec or a list of them.
        path: the option, ``reward``.
        where: path → place.

    Returns:
        The specs, each with a name of its own, and the problems found.
    """
    items = raw if isinstance(raw, list | tuple) else [raw]
    specs: list[Spec] = []
    problems: list[RlxError] = []
    for i, item in enumerate(items):
        at = f"{path}[{i}]" if isinstance(raw, list | tuple) else path
        place = where.get(at, where.get(path, ""))
        if isinstance(item, Mapping):
            given = {str(key).replace("-", "_"): value for key, value in item.items()}
            ref = given.pop("name", None)
            if ref is None:
                problems.append(
                    ConfigError(
                        f"a {kind} without a name", where=place, expected=f"{{name: a {kind}, option: value}}"
                    )
                )
                continue
            spec = Spec(kind, ref, "", place, given, {key: where.get(f"{at}.{key}", place) for key in given})
            spec.weight = given.pop("weight", None) if kind == "reward" else None
        elif item is None or item == "":
            problems.append(ConfigError(f"an empty {kind}", where=place, expected="a name or a reference"))
            continue
        else:
            spec = Spec(kind, item, "", place)
        if isinstance(spec.ref, str):
            spec.ref, held = references.spelt_out(kind, str(spec.ref))
            problems += [_twice(f"{spec.ref} {name}", spec.where) for name in held if name in spec.given]
            spec.given |= held
            spec.places |= dict.fromkeys(held, place)
        spec.name = _unique(short_name(kind, spec.ref), [other.name for other in specs])
        specs.append(spec)
    return specs, problems


def _unique(name: str, taken: list[str]) -> str:
    count = 2
    unique = name
    while unique in taken:
        unique, count = f"{name}_{count}", count + 1
    return unique


def take_dotted(dotted: Mapping[str, Any], where: Mapping[str, str], specs: list[Spec]) -> list[RlxError]:
    """Hand ``length.target: 50`` to the component called ``length``.

    Args:
        dotted: dotted option → raw value.
        where: dotted option → place.
        specs: all chosen components; the options land in them.

    Returns:
        The problems: a component that was not chosen, a name that two kinds share, an option given twice.
    """
    problems: list[RlxError] = []
    for key, value in dotted.items():
        name, _, option = key.partition(".")
        place = where.get(key, "")
        found = [spec for spec in specs if spec.name.replace("-", "_") == name]
        if len(found) != 1:
            what = f"no component called {safe_text(name, 60)!r} is chosen"
            if found:
                what = f"{name!r} is the {' and the '.join(spec.kind for spec in found)}"
            names = [spec.name for spec in specs]
            problems.append(
                ConfigError(
                    f"option {safe_text(key, 80)!r}: {what}{'' if found else close(name, names)}",
                    code="E-CONFIG-UNKNOWN",
                    where=place,
                    expected=f"one of {', '.join(names)}" if names else "",
                    hint=f"choose it too, for example --reward {safe_text(name, 60)}"
                    if not found
                    else "give its options in YAML: {name: …, option: value}",
                )
            )
        elif option in found[0].given:
            problems.append(_twice(key, place))
        else:
            found[0].given[option] = value
            found[0].places[option] = place
    return problems


def _twice(option: str, place: str) -> ConfigError:
    return ConfigError(f"option {option!r} is given twice", code="E-CONFIG-CONFLICT", where=place)


def check_spec(spec: Spec) -> Component:
    """Resolve a component and check its options against its Config.

    Args:
        spec: what was given.

    Raises:
        ConfigError: unknown name; unknown option or unfit value, all of them at once.
        PluginError: a reference that does not load; a Config that does not keep the contract.
    """
    owner = f"{spec.kind} {safe_text(spec.name, 80)}"
    try:
        found = references.resolve(spec.kind, spec.ref)
    except RlxError as error:
        error.where = error.where or spec.where
        raise
    if isinstance(found, type) and not hasattr(found, "Config"):
        # Its constructor is all there is to know: the values keep the types that they look like.
        return Component(
            spec.kind, spec.ref, {k: scalar(v) for k, v in spec.given.items()}, spec.where, spec.name
        )
    config = config_class(found, owner) if isinstance(found, type) else NoOptions
    checked = build(config, spec.given, owner=owner, where=spec.places)
    return Component(spec.kind, spec.ref, shallow(checked), spec.where, spec.name)


def choose_judge(judge: Any, rewards: list[Any], options: Mapping[str, Any] | None = None) -> Component:
    """A judge, or the judge ``reward`` with the rewards that are given in its place.

    Args:
        judge: a reference, a mapping with options, or None.
        rewards: the higher weighted sum of them wins.
        options: further options of the judge.

    Raises:
        ConfigError: neither is given, or both; or as ``check_spec``.
        PluginError: as ``check_spec``.
    """
    if judge is None and not rewards:
        raise ConfigError(
            "nothing says which answer is better",
            code="E-CONFIG-MISSING",
            expected="a reward, such as exact_match, or a judge",
        )
    if judge is not None and rewards:
        raise ConfigError(
            "a judge and rewards are both given; one decides",
            code="E-CONFIG-CONFLICT",
            hint="leave out the judge, or the rewards: the judge 'reward' is what they are given to",
        )
    named = {"name": "reward", "rewards": rewards} if rewards else judge
    if not isinstance(named, Mapping):
        named = {"name": named}
    specs, problems = read_specs("judge", {**named, **(options or {})}, "judge", {})
    if problems:
        raise problems[0]
    return check_spec(specs[0])


def config_class(component: Any, owner: str) -> type:
    """The component's Config, known to declare its options properly.

    Raises:
        PluginError: if it does not.
    """
    config = references.config_of(component)
    try:
        options(config)
    except (TypeError, NameError) as error:  # NameError: an annotation that does not resolve
        raise PluginError(
            f"the options of {owner} are not declared properly", got=safe_text(error)
        ) from error
    return config


def shallow(config: Any) -> dict[str, Any]:
    """Options and values of a Config instance, one level deep."""
    return {name: getattr(config, name) for name in options(type(config))}


def flatten(problems: Iterable[RlxError]) -> list[RlxError]:
    """Groups opened, in order."""
    return [
        inner
        for error in problems
        for inner in (error.problems if isinstance(error, ErrorGroup) else [error])
    ]
