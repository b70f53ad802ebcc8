"""Giving back what several parts hold: each is asked to, also where another one fails at it."""

from __future__ import annotations

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
