"""The reward model's loss, derived by hand and by a plain loop over pairs."""

from __future__ import annotations

import math

import pytest
import torch

from rlx.algorithms.reward import RewardModel, RewardModelConfig
from rlx.core.batch import Pairs, Scores, Sequences
from rlx.core.options import options


def pairs(rows, margin=None):
    sequences = Sequences.from_lists([[1]] * 2 * rows, [[2]] * 2 * rows)
    return Pairs(sequences, margin=None if margin is None else torch.tensor(margin))


def loss(batch, rewards, **chosen):
    now = Scores(torch.empty(0), reward=rewards)
    return RewardModel(RewardModelConfig(**chosen)).loss(batch, now)


def test_by_hand():
    # 2 − 1 = 1: log(1 + e⁻¹); with margin 1: log 2; with coefficient 0.1: + 0.1·3² = 0.9
    rewards = torch.tensor([2.0, 1.0])
    plain = math.log1p(math.exp(-1))
    assert loss(pairs(1), rewards).terms["rows"].tolist() == pytest.approx([plain])
    assert loss(pairs(1, [1.0]), rewards).terms["rows"].tolist() == pytest.approx([math.log(2)])
    centred = loss(pairs(1), rewards, center_rewards_coefficient=0.1)
    assert centred.terms["rows"].tolist() == pytest.approx([plain + 0.9])


def test_gradient_equals_a_plain_loop_however_it_is_cut():
    margin, draw = [0.0, 0.5, 2.0, 0.1], torch.Generator().manual_seed(0)
    leaf = torch.randn(8, generator=draw).requires_grad_()
    want = sum(
        -torch.log(torch.sigmoid(leaf[2 * i] - leaf[2 * i + 1] - m))
        + 0.2 * (leaf[2 * i] + leaf[2 * i + 1]) ** 2
        for i, m in enumerate(margin)
    )
    want.backward()
    batch = pairs(4, margin)
    for parts in ([[0, 1, 2, 3]], [[3], [0, 2], [1]]):
        other, total = leaf.detach().clone().requires_grad_(), 0.0
        for rows in map(torch.tensor, parts):
            index = torch.stack([2 * rows, 2 * rows + 1], 1).flatten()
            terms = loss(batch.take(rows), other[index], center_rewards_coefficient=0.2).terms["rows"]
            terms.sum().backward()
            total += float(terms.detach().sum())
        assert total == pytest.approx(float(want.detach()), rel=1e-5)
        torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-5, atol=1e-6)


def test_metrics():
    got = loss(pairs(3), torch.tensor([1.0, 0.0, 1.0, 3.0, 2.0, 2.0])).metrics
    assert got["rewards/accuracies"].tolist() == [1, 0, 0]  # a tie is no success
    assert got["rewards/margins"].tolist() == [1, -2, 0]
    assert got["reward/min"].tolist() == [0, 1, 2] and got["reward/max"].tolist() == [1, 3, 2]
    assert got["reward/mean"].tolist() == [1, 0, 1, 3, 2, 2]


def test_large_gaps_stay_finite():
    got = loss(pairs(2), torch.tensor([-1e4, 1e4, 1e4, -1e4])).terms["rows"]
    assert got.tolist() == [2e4, 0]


def test_defaults():
    found = {name: option.default for name, option in options(RewardModelConfig).items()}
    assert found == {"center_rewards_coefficient": None}
    assert RewardModel.defaults["learning_rate"] == 1e-4
    assert RewardModel.needs == {"reward"} and RewardModel.eats == "pairs"
