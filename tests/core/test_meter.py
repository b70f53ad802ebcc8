"""Metrics between two log lines."""

from __future__ import annotations

import pytest
import torch

from rlx.core.meter import Meter


class One:
    num_processes = 1
    device = torch.device("cpu")


def test_values_count_one_by_one_and_meters_add_up():
    one, other = Meter(), Meter()
    one.add("a", torch.tensor([1.0, 2.0]))
    one.add("a", 6.0)
    one.add("nothing", torch.tensor([]))
    other.add("a", torch.tensor([[3.0], [8.0]]))
    other.add("b", torch.tensor([True, False]))
    one.merge(other)
    assert one.means(One()) == {"a": pytest.approx(20 / 5), "b": 0.5}
    assert Meter().means(One()) == {}


def test_many_small_values_do_not_round_away():
    meter = Meter()
    meter.add("x", torch.full((1,), 2.0**24))
    for _ in range(10):
        meter.add("x", torch.ones(1))
    assert meter.means(One())["x"] == (2.0**24 + 10) / 11  # float32 would have lost all ten


def test_a_meter_comes_back_bit_for_bit():
    meter = Meter()
    meter.add("x", torch.tensor([0.1, 0.2]))
    again = Meter.of(meter.state_dict())
    for each in (meter, again):
        each.add("x", 0.3)
    assert torch.equal(meter.sums["x"], again.sums["x"]) and meter.counts == again.counts
