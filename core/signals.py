"""SIGINT and SIGTERM: the first one asks the run to save and end, the second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """The signal that arrived, or None.

    Attributes:
        received: its number.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signum

    def agreed(self, accelerator: Accelerator) -> int | None:
        """The signal that any process received, the same answer on all of them."""
        if accelerator.num_processes == 1:
            return self.received
        import torch

        mine = torch.tensor([self.received or 0], device=accelerator.device)
        return int(accelerator.gather(mine).max()) or None

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catch both signals inside the block, and give the old handlers back after it.

        Outside the main thread Python cannot catch signals; there the block changes nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {number: signal.signal(number, self._handle) for number in CAUGHT}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
