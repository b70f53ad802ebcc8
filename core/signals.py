"""Signals: the first SIGINT, SIGTERM or SIGHUP asks the run to save and end, the second one ends it at once.

SIGUSR1 asks for a checkpoint without an end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

# A closed terminal counts as SIGTERM: schedulers know its exit code.
STOPPING = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
if hasattr(signal, "SIGHUP"):  # not on Windows
    STOPPING[signal.SIGHUP] = signal.SIGTERM
SAVING = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()


class Signals:
    """What signals asked for.

    Attributes:
        received: number of the signal that asked for the end, or None.
        save: True once a checkpoint was asked for.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.save = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum in SAVING:
            self.save = True
            return
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = int(STOPPING[signal.Signals(signum)])
        # Not print: the signal may have come in the middle of one.
        os.write(
            2, f"{signal.Signals(signum).name}: saving after this step; once more stops at once\n".encode()
        )

    def agreed(self, accelerator: Accelerator) -> tuple[int | None, bool]:
        """The signal that any process received, and whether any was asked to save: the same on all."""
        stop, save, self.save = self.received, self.save, False
        if accelerator.num_processes == 1:
            return stop, save
        import torch

        mine = torch.tensor([[stop or 0, int(save)]], device=accelerator.device)
        stop, save = accelerator.gather(mine).amax(dim=0).tolist()
        return stop or None, bool(save)

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catch the signals inside the block, and give the old handlers back after it.

        Outside the main thread Python cannot catch signals; there the block changes nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {number: signal.signal(number, self._handle) for number in (*STOPPING, *SAVING)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
