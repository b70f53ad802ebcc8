"""Losses and advantages of sampled completions, called with tensors and worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlx.core.policy_gradient import (
    capped_loss,
    clipped_loss,
    group_advantages,
    joint_advantages,
    leave_one_out,
    value_loss,
)

NAN = math.nan


def test_the_clipped_loss_by_hand():
    # clip 0.2. A = 1: ratio 1.5 → max(−1.5, −1.2) = −1.2 clipped; 0.5 → max(−0.5, −0.8) = −0.5 free
    # A = −1: ratio 1.5 → max(1.5, 1.2) = 1.5 free; 0.5 → max(0.5, 0.8) = 0.8 clipped
    ratio, advantages = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, clipped = clipped_loss(ratio, advantages, low=0.2, high=0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, -0.5, 1.5, 0.8]))
    assert clipped.tolist() == [True, False, False, True]
    # wider above: 1.5 is free there; most 1.2: −A·1.2 = 1.2 instead of 1.5
    loss, clipped = clipped_loss(ratio, advantages, low=0.2, high=0.6, most=1.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, -0.5, 1.5, 0.8]))
    loss, _ = clipped_loss(ratio, advantages, low=0.2, high=0.1, most=1.2)
    torch.testing.assert_close(loss, torch.tensor([-1.1, -0.5, 1.2, 0.8]))


def test_value_loss_by_hand():
    # clip 0.2, old 0. V = 1, R = 1: free 0, near 0.2 → (0.2 − 1)² = 0.64 → 0.32 clipped
    # V = 1, R = 0: free 1, near 0.04 → 0.5 free;  V = 0.1, R = 1: both 0.81 → 0.405
    loss, clipped = value_loss(
        torch.tensor([1.0, 1.0, 0.1]), torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), 0.2
    )
    torch.testing.assert_close(loss, torch.tensor([0.32, 0.5, 0.405]))
    assert clipped.tolist() == [True, False, False]


def test_the_capped_loss_by_hand():
    """The ratio is a constant: the gradient is that of A·log p, times the ratio up to its cap."""
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    ratio = (logps - torch.tensor([-1.0, -4.0])).exp()  # 1 and e² = 7.39
    loss, cut = capped_loss(ratio, torch.tensor([2.0, -3.0]), logps, most=5.0)
    torch.testing.assert_close(loss, torch.tensor([2.0, -30.0]))
    assert cut.tolist() == [False, True]
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([-2.0, 15.0]))


def test_advantages_by_hand():
    """Groups are found by their numbers; what does not apply is in no mean."""
    rewards, groups = torch.tensor([1.0, 10, 3, NAN, 5]), torch.tensor([7, 2, 7, 7, 7])
    a = 2 / (2 + 1e-4)  # 1, 3, 5: mean 3, deviation 2
    wanted = torch.tensor([-a, 0, 0, NAN, a])
    torch.testing.assert_close(group_advantages(rewards, groups), wanted, equal_nan=True)
    wanted = torch.tensor([-2.0, 0, 0, NAN, 2])
    torch.testing.assert_close(group_advantages(rewards, groups, "none"), wanted, equal_nan=True)
    deviation = torch.tensor([1.0, 10, 3, 5]).std() + 1e-4
    torch.testing.assert_close(group_advantages(rewards, groups, "batch"), wanted / deviation, equal_nan=True)
    wanted = torch.tensor([1 - 4.0, NAN, 3 - 3.0, NAN, 5 - 2.0])
    torch.testing.assert_close(leave_one_out(rewards, groups), wanted, equal_nan=True)


def test_two_rewards_are_scaled_each_by_itself():
    """However large one is: both count by their weights, and one that does not apply counts nothing."""
    rewards = torch.tensor([[0.0, 300], [2, 100], [4, NAN], [6, 5], [NAN, NAN]])
    got = joint_advantages(rewards, torch.tensor([1.0, 3.0]), torch.tensor([0, 0, 1, 1, 1]))
    x, y = 1 / (2**0.5 + 1e-4), 100 / (20000**0.5 + 1e-4)
    combined = torch.tensor([-x + 3 * y, x - 3 * y, -x, x])
    torch.testing.assert_close(got[:4], combined / (combined.std() + 1e-4))
    assert got[4].isnan()


def test_a_reward_that_only_measures_makes_nothing_scorable():
    """Of weight 0: the third completion has that one alone, and so no advantage, as without it."""
    rewards = torch.tensor([[1.0, 5.0], [2.0, 6.0], [NAN, 7.0], [4.0, NAN]])
    groups = torch.tensor([0, 0, 0, 0])
    got = joint_advantages(rewards, torch.tensor([1.0, 0.0]), groups)
    torch.testing.assert_close(
        got, joint_advantages(rewards[:, :1], torch.tensor([1.0]), groups), equal_nan=True
    )
    assert got.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_no_completion_has_no_advantage(scale):
    nothing, nowhere = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert group_advantages(nothing, nowhere, scale).shape == (0,)
    assert joint_advantages(torch.zeros(0, 2), torch.ones(2), nowhere).shape == (0,)
