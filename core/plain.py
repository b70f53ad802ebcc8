"""Text written without quotes, whose type is decided where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Plain(str):
    """Text written without quotes, in YAML or as a flag: its type is decided where it is used."""


def scalar(value: Any) -> Any:
    """A value whose option declares no type: plain text that reads as a number or truth value becomes one.

    Args:
        value: anything; lists and mappings are gone through.
    """
    if isinstance(value, Mapping):
        return {str(key): scalar(item) for key, item in value.items()}
    if isinstance(value, list):
        return [scalar(item) for item in value]
    if not isinstance(value, Plain):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value.lower() in ("null", "none", "~"):
        return None
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return str(value)
