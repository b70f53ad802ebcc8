"""Seconds that the phases of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent in each phase since the last reading, under ``time/<phase>``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time that the block takes to ``time/<phase>``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            name = f"time/{phase}"
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
