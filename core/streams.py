"""Named random streams: every consumer of random numbers has its own, seeded from what it is for.

A stream's seed depends on the run's seed, the stream's name and counters (step, mini-batch, process), never
on what was drawn before. So a resumed run needs no saved generator state to be exact, and a plugin that draws
numbers changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def stream_seed(seed: int, stream: str, *keys: int) -> int:
    """The seed of one stream.

    Args:
        seed: the run's seed.
        stream: its name, for example ``generate``.
        keys: counters that tell one use from the next: step, epoch, position.

    Returns:
        A whole number of 63 bits.
    """
    text = ":".join(map(str, (seed, stream, *keys)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, *keys: int) -> torch.Generator:
    """A CPU generator at the beginning of one stream."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, *keys))


@contextmanager
def rng_scope(seed: int, stream: str, *keys: int) -> Iterator[None]:
    """Run code that draws from the global generators (python, numpy, torch) on a stream; restore them."""
    start = stream_seed(seed, stream, *keys)
    python, arrays = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(start)
        np.random.seed(start % 2**32)
        torch.manual_seed(start)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
