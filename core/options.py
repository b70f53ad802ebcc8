"""Options: frozen dataclasses whose fields carry a doc, bounds, choices, unit and source.

``opt`` declares one field. From these declarations come flags, YAML keys, validation, ``--help`` panels, the
JSON schema and the tables of the docs. Standard library only.

A flag is repeated to give several values. Only two kinds of list are also split at commas: lists of numbers,
and lists of names declared with ``commas=True``; a regular expression, a reference or a stop text may hold a
comma.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rlx.core.errors import ConfigError, ErrorGroup, RlxError
from rlx.core.plain import scalar
from rlx.core.text import redact, safe_text

MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Option:
    """One option of a component, read from its Config class.

    Attributes:
        name: the field's name, also the YAML key; the flag is the same with dashes.
        type: the annotation, resolved: bool, int, float, str, a tuple or list of those, or a union with None.
        default: the value when nobody sets it; ``MISSING`` when it must be set.
        doc: one sentence.
        gt, ge, lt, le: bounds, None for none.
        choices: the values allowed, empty for any.
        unit: unit of the value, empty for none.
        source: paper and equation, empty for none.
        panel: heading in ``--help``.
        commas: whether one text may hold several values, separated by commas.
    """

    name: str
    type: Any
    default: Any
    doc: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[Any, ...] = ()
    unit: str = ""
    source: str = ""
    panel: str = ""
    commas: bool = False

    @property
    def bounds(self) -> str:
        """The bounds in words, for example ``> 0, <= 1``."""
        signs = (("> ", self.gt), (">= ", self.ge), ("< ", self.lt), ("<= ", self.le))
        return ", ".join(f"{sign}{bound:g}" for sign, bound in signs if bound is not None)


def opt(
    default: Any = MISSING,
    doc: str = "",
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Sequence[Any] = (),
    unit: str = "",
    source: str = "",
    panel: str = "",
    commas: bool = False,
) -> Any:
    """Declare an option: a dataclass field with everything that a user should know about it.

    Args:
        default: value when nobody sets it; leave out when it must be set. Lists and dicts are copied.
        doc: one sentence, shown in ``--help`` and in the docs.
        gt: the value must be greater than this.
        ge: the value must be at least this.
        lt: the value must be less than this.
        le: the value must be at most this.
        choices: the only values allowed.
        unit: unit of the value, for example ``tokens`` or ``nats``.
        source: paper and equation.
        panel: heading under which ``--help`` shows it.
        commas: a list of names that may be given as one text, separated by commas.

    Returns:
        A dataclass field (typed Any, as dataclasses.field is).

    Raises:
        TypeError: if the doc is empty.
    """
    if not doc:
        raise TypeError(
            "opt(default, doc): the doc is missing; every option is explained where it is declared"
        )
    meta = {
        "rlx": {
            "doc": doc,
            "gt": gt,
            "ge": ge,
            "lt": lt,
            "le": le,
            "choices": tuple(choices),
            "unit": unit,
            "source": source,
            "panel": panel,
            "commas": commas,
        }
    }
    if isinstance(default, list | dict):
        kept = default
        return dataclasses.field(default_factory=lambda: type(kept)(kept), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def options(config: type) -> dict[str, Option]:
    """The options of a Config class, by name, in order of declaration.

    Args:
        config: a dataclass whose fields were declared with ``opt``.

    Raises:
        TypeError: if it is no dataclass, or a field was declared without ``opt``.
    """
    if not dataclasses.is_dataclass(config):
        named = config.__qualname__
        raise TypeError(f"{named} is no dataclass; write @dataclass(frozen=True) above class Config")
    hints = typing.get_type_hints(config)
    out = {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        if "rlx" not in field.metadata:
            raise TypeError(f"{config.__qualname__}.{field.name} is declared without rlx.opt(default, doc)")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if hints[field.name] is float and type(default) is int:
            default = float(default)
        out[field.name] = Option(field.name, hints[field.name], default, **field.metadata["rlx"])
    return out


def close(name: str, names: Sequence[str]) -> str:
    """``; did you mean 'x'?`` for a near miss, else an empty string."""
    near = get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def type_name(annotation: Any) -> str:
    """The annotation as a user reads it: ``number``, ``whole number``, ``text``, ``list of …``."""
    names = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        type(None): "none",
        Any: "value",
    }
    if annotation in names:
        return names[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(a) for a in args)
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return "mapping"
    if origin is typing.Literal:
        return " | ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in args)
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def is_list(option: Option) -> bool:
    """Whether a flag of this option may be repeated: lists, tuples and mappings, with or without none."""
    kinds = (option.type, *typing.get_args(option.type))
    return any(
        kind in (list, tuple, dict) or typing.get_origin(kind) in (list, tuple, dict) for kind in kinds
    )


def parse(option: Option, value: Any) -> Any:
    """Convert a value from the command line (text), YAML or Python to the option's type and check its bounds.

    Args:
        option: the declaration.
        value: text from a flag, or a YAML or Python value.

    Returns:
        The typed value.

    Raises:
        ValueError: with a sentence that says what is allowed.
    """
    typed = _convert(option.type, value, option.commas)
    for item in typed if isinstance(typed, list | tuple) else (typed,):
        if option.choices and item is not None and item not in option.choices:
            allowed = [str(choice) for choice in option.choices]
            raise ValueError(f"one of {', '.join(allowed)}{close(str(item), allowed)}")
        if isinstance(item, int | float) and not isinstance(item, bool):
            _check_bounds(option, item)
    if not _finite(typed):
        raise ValueError("finite numbers")
    return typed


def _check_bounds(option: Option, number: float) -> None:
    outside = (
        not _finite(number)
        or (option.gt is not None and not number > option.gt)
        or (option.ge is not None and not number >= option.ge)
        or (option.lt is not None and not number < option.lt)
        or (option.le is not None and not number <= option.le)
    )
    if outside:
        raise ValueError(f"a finite number {option.bounds}".rstrip())


def _finite(value: Any) -> bool:
    """False if a NaN or an infinity hides anywhere in value; no option of any component takes one."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return True


def _convert(annotation: Any, value: Any, commas: bool = False) -> Any:
    """Value as the annotation's type; ValueError names the type that was wanted."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return scalar(value)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(annotation, value, commas)
    if origin in (list, tuple):
        return origin(_convert(args[0], item) for item in _items(args[0], value, commas))
    if origin is typing.Literal:
        for choice in args:
            found = _truth(value) is choice if isinstance(choice, bool) else value == choice
            if found or (isinstance(value, str) and value == str(choice)):
                return choice
        raise ValueError(type_name(annotation))
    if annotation is dict or origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError("mapping")
        kinds = args or (str, Any)
        return {_convert(kinds[0], key): _convert(kinds[1], item) for key, item in value.items()}
    return _scalar(annotation, value)


def _convert_union(annotation: Any, value: Any, commas: bool) -> Any:
    args = typing.get_args(annotation)
    if type(None) in args and (
        value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    ):
        return None
    # Narrow types first: '3' for `int | str` is a number, '0.5' for `float | str` too.
    order = [bool, int, float, list, tuple, dict, str]
    given = [arg for arg in args if arg is not type(None)]
    ranks = {
        arg: next((i for i, t in enumerate(order) if t is (typing.get_origin(arg) or arg)), 9)
        for arg in given
    }
    exact = [arg for arg in given if isinstance(arg, type) and type(value) is arg]
    for arg in exact + sorted(given, key=ranks.__getitem__):
        try:
            return _convert(arg, value, commas)
        except ValueError:
            continue
    raise ValueError(type_name(annotation))


def _items(item_type: Any, value: Any, commas: bool) -> list[Any]:
    """The items of a list option; one text is split at commas where that is safe."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if commas or item_type in (int, float):
        parts = [item.split(",") if isinstance(item, str) else [item] for item in items]
        return [
            part.strip() if isinstance(part, str) else part for group in parts for part in group if part != ""
        ]
    return items


TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _scalar(annotation: Any, value: Any) -> Any:
    wrong = ValueError(type_name(annotation))
    if annotation is bool and (truth := _truth(value)) is not None:
        return truth
    if annotation in (int, float):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise wrong
        return _number(annotation, value, wrong)
    if annotation is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise wrong
        return str(value)
    if isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise wrong


def _truth(value: Any) -> bool | None:
    if isinstance(value, str) and value.lower() in TRUE + FALSE:
        return value.lower() in TRUE
    return value if isinstance(value, bool) else None


def _number(annotation: type, value: str | int | float, wrong: ValueError) -> int | float:
    """An int or float; text may be written ``1e-5``, ``1_000`` or ``1e3`` (whole, so an int too)."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise wrong from None
    if annotation is float:
        try:
            return float(value)
        except OverflowError:
            raise wrong from None
    if isinstance(value, float) and (not math.isfinite(value) or value != int(value)):
        raise wrong
    return int(value)


def build(
    config: type, values: Mapping[str, Any], *, owner: str, where: Mapping[str, str] | None = None
) -> Any:
    """An instance of a Config class from raw values; every problem is reported, not only the first.

    Args:
        config: the Config class.
        values: option name → raw value.
        owner: who owns the options, for messages: ``algorithm ppo``, ``reward length``.
        where: option name → where the value was given (``--flag`` or ``file:line:column``).

    Returns:
        The Config, frozen and checked.

    Raises:
        ErrorGroup: with one ConfigError a problem: unknown name, wrong type, out of bounds, missing.
    """
    known, typed = options(config), {}
    problems: list[RlxError] = []
    for name, value in values.items():
        place = (where or {}).get(name, "")
        if name not in known:
            problems.append(
                ConfigError(
                    f"{owner} has no option {safe_text(name, 80)!r}{close(name, list(known))}",
                    code="E-CONFIG-UNKNOWN",
                    where=place,
                    expected=", ".join(known) or "no options at all",
                )
            )
            continue
        try:
            typed[name] = parse(known[name], value)
        except ValueError as error:
            problems.append(
                ConfigError(
                    f"option {name!r} of {owner} has a value that is not allowed",
                    code="E-CONFIG-VALUE",
                    where=place,
                    got=safe_text(repr(redact(value, name)), 80),
                    expected=str(error),
                )
            )
    for name, option in known.items():
        if name not in values and type(option.default) is float:
            typed[name] = option.default  # a default written 10 is 10.0 everywhere
        if option.default is MISSING and name not in values:
            problems.append(
                ConfigError(f"{owner} needs the option {name!r}: {option.doc}", code="E-CONFIG-MISSING")
            )
    if problems:
        raise problems[0] if len(problems) == 1 else ErrorGroup(problems)
    try:
        return config(**typed)
    except ValueError as error:  # a rule between options, stated in __post_init__
        raise ConfigError(
            f"options of {owner} do not fit together: {safe_text(error)}", code="E-CONFIG-CONFLICT"
        ) from error
