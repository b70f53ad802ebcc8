"""Giving back what several parts hold: each is asked to, also where another one fails at it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any


def close_all(*parts: Any) -> None:
    """Close the parts in their order; what has no ``close`` holds nothing.

    Raises:
        Exception: what one of them raised, once all were asked.
    """
    with ExitStack() as stack:
        for part in reversed(parts):
            if hasattr(part, "close"):
                stack.callback(part.close)


def made(parts: Iterable[Any], components: Iterable[Any]) -> list[Any]:
    """Those of the parts that were made of a component; an object given in its place is its owner's to close.

    Args:
        parts: what there is.
        components: what the config has; the ``ref`` of one is its name, or the object.
    """
    given = [component.ref for component in components]
    return [part for part in parts if not any(part is one for one in given)]
