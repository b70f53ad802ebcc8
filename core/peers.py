"""What one process of several does alone may fail there alone: the others hear of it, none waits for ever."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from rlx.core.errors import PeerError
from rlx.core.meter import total

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.loop import Run


def connect(mixed_precision: str = "no") -> Accelerator:
    """Accelerate's view of this process, its device and its peers.

    Args:
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    if is_initialized() and AcceleratorState().mixed_precision != mixed_precision:
        # Accelerate keeps one precision a process and refuses another; runs one after the other may differ.
        AcceleratorState._reset_state()
    # Without being told that there is only the CPU, accelerate lets each process of torchrun train alone; and
    # counts and moments are summed in float64, which Apple's GPUs do not have.
    alone = not torch.accelerator.is_available() or torch.backends.mps.is_available()
    joined = _has_group()
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=alone)
    if _has_group() and not joined:
        # A thread of gloo may still hold tensors of the last reduction. If it lets them go while the
        # interpreter is being taken down, the process aborts, whatever it had achieved.
        atexit.register(_leave)
    return accelerator


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _leave() -> None:
    if _has_group():
        torch.distributed.destroy_process_group()


@contextmanager
def agreed(run: Run, what: str) -> Iterator[None]:
    """Within it each process works alone; after it all of them know whether it worked on each.

    Nothing within may wait for another process, but in ``run.score.total``: who waits there hears of a
    failure, too. A failure that all have heard of leaves them at the same place, so that a checkpoint can
    still be taken: ``run.together`` says so.

    Args:
        run: any.
        what: what is being done, for the message.

    Raises:
        PeerError: it failed on another process, whose own error is raised there.
        Exception: whatever was raised within.
    """
    if run.accelerator.num_processes == 1:
        yield
        return
    run.together = run.score.heard = False
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # raised again below, once the others know
        error = raised
    # Where one heard of a failure by an addition, the process that failed tells it no second time; it does
    # to what stands around this.
    heard, run.score.heard = run.score.heard, False
    if not heard and not some_failed(run.accelerator, error is not None):
        return
    run.together = True
    raise error if error is not None and not heard else elsewhere(run.accelerator, what)


def some_failed(accelerator: Accelerator, mine: bool) -> bool:
    """Whether any process has failed, as all of them then know."""
    return bool(total(accelerator, torch.tensor(float(mine), device=accelerator.device)))


def heed_all(run: Run) -> None:
    """What was asked for on any process holds on all: the end of the run, a checkpoint.

    A callback may have asked on one process alone; the others would wait for it for ever.
    """
    if run.accelerator.num_processes == 1:
        return
    asked = torch.tensor([run.stopping, run.saving], dtype=torch.float32, device=run.accelerator.device)
    stopping, run.saving = (total(run.accelerator, asked) > 0).tolist()
    if stopping:
        run.stop("another process asked for it")  # where this one did, its reason stays


def elsewhere(accelerator: Accelerator, what: str) -> PeerError:
    """The error of a process that did nothing wrong."""
    return PeerError(
        f"another process failed in {what}",
        where=f"process {accelerator.process_index} of {accelerator.num_processes}",
        hint="its own message says why; this process did nothing wrong",
    )
