"""Named random streams."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rlx.core.streams import generator, rng_scope, stream_seed


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_every_use_has_a_seed_of_its_own_that_never_changes():
    seeds = {
        stream_seed(seed, stream, *keys)
        for seed in (0, 1)
        for stream in ("data", "dropout")
        for keys in ((), (0,), (1,), (0, 1), (1, 0), (10,), (1, 0, 0))
    }
    assert len(seeds) == 2 * 2 * 7 and all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(0, "data", 1) == 7133000291902627116  # checkpoints of earlier versions rely on it
    assert torch.rand((), generator=generator(3, "x", 1)) == torch.rand((), generator=generator(3, "x", 1))


def test_a_scope_draws_its_own_numbers_and_gives_the_others_back():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with rng_scope(0, "dropout", 5):
        inside = draw()
    assert draw() == expected
    with rng_scope(0, "dropout", 5):
        assert draw() == inside
    with rng_scope(0, "dropout", 6):
        assert draw() != inside


def test_a_scope_is_left_by_an_exception_too():
    torch.manual_seed(1)
    expected = draw()[2]
    torch.manual_seed(1)
    with pytest.raises(KeyError), rng_scope(0, "x"):
        torch.rand(3)
        raise KeyError
    assert float(torch.rand(())) == expected
