"""Options: frozen dataclasses whose fields carry a doc, bounds, choices, unit and source.

``opt`` declares one field. From these declarations come flags, YAML keys, validation, ``--help`` panels, the JSON
schema and the tables of the docs. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rlx.core.errors import ConfigError, ErrorGroup

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
) -> Any:
    """Declare an option: a dataclass field with everything that a user should know about it.

    Args:
        default: value when nobody sets it; leave out when it must be set. Lists and dicts are copied per instance.
        doc: one sentence, shown in ``--help`` and in the docs.
        gt: the value must be greater than this.
        ge: the value must be at least this.
        lt: the value must be less than this.
        le: the value must be at most this.
        choices: the only values allowed.
        unit: unit of the value, for example ``tokens`` or ``nats``.
        source: paper and equation.
        panel: heading under which ``--help`` shows it.

    Returns:
        A dataclass field (typed Any, as dataclasses.field is).

    Raises:
        TypeError: if the doc is empty.
    """
    if not doc:
        raise TypeError("opt(default, doc): the doc is missing; every option is explained where it is declared")
    meta = {"rlx": dict(doc=doc, gt=gt, ge=ge, lt=lt, le=le, choices=tuple(choices), unit=unit, source=source,
                        panel=panel)}
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
        raise TypeError(f"{config!r} is no dataclass; write @dataclass(frozen=True) above class Config")
    hints = typing.get_type_hints(config)
    out = {}
    for field in dataclasses.fields(config):
        if "rlx" not in field.metadata:
            raise TypeError(f"{config.__qualname__}.{field.name} is declared without rlx.opt(default, doc)")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        out[field.name] = Option(field.name, hints[field.name], default, **field.metadata["rlx"])
    return out


def close(name: str, names: Sequence[str]) -> str:
    """``; did you mean 'x'?`` for a near miss, else an empty string."""
    near = get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def type_name(annotation: Any) -> str:
    """The annotation as a user reads it: ``number``, ``whole number``, ``text``, ``true or false``, ``list of …``."""
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "none"}
    if annotation in names:
        return names[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(a) for a in args)
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}"
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    return getattr(annotation, "__name__", str(annotation))


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
    typed = _convert(option.type, value)
    for item in typed if isinstance(typed, list | tuple) else (typed,):
        if option.choices and item not in option.choices and item is not None:
            raise ValueError(f"choose one of {', '.join(map(str, option.choices))}{close(str(item), list(map(str, option.choices)))}")
        if isinstance(item, int | float) and not isinstance(item, bool):
            _check_bounds(option, item)
    return typed


def _check_bounds(option: Option, number: float) -> None:
    outside = (
        not math.isfinite(number)
        or (option.gt is not None and not number > option.gt)
        or (option.ge is not None and not number >= option.ge)
        or (option.lt is not None and not number < option.lt)
        or (option.le is not None and not number <= option.le)
    )
    if outside:
        raise ValueError(f"a finite number {option.bounds}".rstrip())


def _convert(annotation: Any, value: Any) -> Any:
    """Value as the annotation's type; ValueError names the type that was wanted."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        # Narrow types first: '3' for `int | str` is a number, '0.5' for `float | str` too.
        rank = [bool, int, float, list, tuple, str]
        for arg in sorted((a for a in args if a is not type(None)), key=lambda a: _rank(a, rank)):
            try:
                return _convert(arg, value)
            except ValueError:
                continue
        raise ValueError(type_name(annotation))
    if origin in (list, tuple):
        items = [v for v in value.split(",") if v] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            items = [items]
        return origin(_convert(args[0], item) for item in items)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(type_name(annotation))
        return value
    return _scalar(annotation, value)


def _rank(annotation: Any, order: list[Any]) -> int:
    kind = typing.get_origin(annotation) or annotation
    return order.index(kind) if kind in order else len(order)


def _scalar(annotation: Any, value: Any) -> Any:
    if annotation is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return value.lower() in ("true", "yes", "on", "1")
    elif annotation in (int, float):
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                raise ValueError(type_name(annotation)) from None
            if annotation is float:
                return number
            if math.isfinite(number) and number == int(number):
                return int(number)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if annotation is float:
                return float(value)
            if math.isfinite(value) and value == int(value):
                return int(value)
    elif annotation is str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    elif annotation is dict or typing.get_origin(annotation) is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise ValueError(type_name(annotation))


def build(config: type, values: Mapping[str, Any], *, owner: str, where: Mapping[str, str] | None = None) -> Any:
    """An instance of a Config class from raw values; every problem is reported, not only the first.

    Args:
        config: the Config class.
        values: option name → raw value.
        owner: who owns the options, for messages: ``algorithm ppo``, ``reward length``.
        where: option name → where the value was given (``--flag`` or ``file:line:column``).

    Raises:
        ErrorGroup: with one ConfigError a problem: unknown name, wrong type, out of bounds, missing.
    """
    known, problems, typed = options(config), [], {}
    for name, value in values.items():
        place = (where or {}).get(name, "")
        if name not in known:
            problems.append(ConfigError(f"{owner} has no option {name!r}{close(name, list(known))}",
                                        code="E-CONFIG-UNKNOWN", where=place,
                                        expected=", ".join(known) or "no options at all"))
            continue
        try:
            typed[name] = parse(known[name], value)
        except ValueError as error:
            problems.append(ConfigError(f"option {name!r} of {owner} has a value that is not allowed",
                                        code="E-CONFIG-VALUE", where=place, got=repr(value)[:80], expected=str(error)))
    for name, option in known.items():
        if option.default is MISSING and name not in values:
            problems.append(ConfigError(f"{owner} needs the option {name!r}: {option.doc}", code="E-CONFIG-MISSING"))
    if problems:
        raise ErrorGroup(problems)
    return config(**typed)
