"""RLOO's numbers, derived by hand or by a plain loop over completions."""

from __future__ import annotations

import math

import pytest
import torch

from rlx.algorithms.rloo import RLOO, RLOOConfig
from rlx.core.batch import Scores
from rlx.core.errors import ConfigError
from rlx.core.options import options
from rlx.core.policy_gradient import leave_one_out

NAN = math.nan


def rloo(**chosen):
    return RLOO(RLOOConfig(**{"beta": 0.0} | chosen))


def test_the_baseline_is_the_mean_of_the_others_of_the_group_wherever_they_stand():
    # group 5: 1, 4, 7 → 1 − 5.5, 4 − 4, 7 − 2.5; group 2: 10, 20 → ∓10
    got = leave_one_out(torch.tensor([1.0, 10, 4, 20, 7]), torch.tensor([5, 2, 5, 2, 5]))
    assert got.tolist() == [-4.5, -10, 0, 10, 4.5]


def test_unscorable_rewards_are_left_out_of_the_baseline(rollouts, alone):
    # group 0: 1, None, 3 → ∓2 and 0; group 1: one reward alone has no baseline; group 2: nothing at all
    batch = rollouts([1] * 7, [1, NAN, 3, 5, NAN, NAN, NAN], [0, 0, 0, 1, 1, 2, 2])
    assert rloo().prepare(batch, alone()).advantages.tolist() == [-2, 0, 2, 0, 0, 0, 0]


def test_equal_rewards_have_advantage_0_exactly(rollouts, alone):
    got = rloo().prepare(rollouts([2] * 3, [0.1] * 3, [0] * 3), alone())
    assert got.advantages.tolist() == [0] * 6 and got.metrics["advantages/zero"].tolist() == [1, 1, 1]


def test_the_kl_of_the_whole_completion_is_subtracted_after_the_clip(rollouts, alone):
    # rewards 9, 0 clipped to 1, 0; KL 0.5 + 1.5 = 2 and −1; beta 0.1: 0.8 and 0.1: difference 0.7
    batch = rollouts([2, 1], [9.0, 0.0], [0, 0], old=[-1.0, -1.0, -1.0], reference=[-1.5, -2.5, 0.0])
    got = rloo(beta=0.1, reward_clip_range=(-1.0, 1.0)).prepare(batch, alone())
    torch.testing.assert_close(got.advantages, torch.tensor([0.7, 0.7, -0.7]))
    assert got.metrics["kl/sequence"].tolist() == [2, -1]


def test_missing_eos_penalty_and_rewards_of_tokens(rollouts, alone):
    batch = rollouts([2, 1], [1.0, 1.0], [0, 0], finished=[True, False], token_scores=[0.5, 0.25, 0.0])
    got = rloo(missing_eos_penalty=0.25).prepare(batch, alone())  # 1.75 against 0.75
    assert got.advantages.tolist() == [1, 1, -1]


def test_advantages_are_normalised_over_scorable_completions(rollouts, alone):
    # advantages −2, 2, −4, 4, and one that has none: mean 0, variance 40/3
    batch = rollouts([1] * 5, [1, 3, 0, 4, NAN], [0, 0, 1, 1, 1])
    got = rloo(normalize_advantages=True).prepare(batch, alone()).advantages
    scale = (40 / 3) ** 0.5 + 1e-4
    torch.testing.assert_close(got, torch.tensor([-2, 2, -4, 4, 0]) / scale)


def plain_loss(batch, logps, low, high):
    """One completion after the other, as the paper writes it."""
    terms, at = [], 0
    for count in batch.sequences.counts.tolist():
        part = slice(at, at + count)
        at += count
        ratio = torch.exp(logps[part].sum() - batch.old[part].sum())
        advantage = float(batch.advantages[part][0]) if count else 0.0
        terms.append(-min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("high", [None, 0.4])
def test_value_and_gradient_equal_a_plain_loop_however_it_is_cut(rollouts, alone, value_and_gradient, high):
    counts, score = [3, 1, 0, 5, 2, 4, 1, 2], [1, 0, 2, 0.5, 3, 1, NAN, 0]
    algorithm = rloo(beta=0.05, epsilon_high=high)
    batch = algorithm.prepare(rollouts(counts, score, [0, 0, 0, 0, 1, 1, 1, 1]), alone())
    logps = batch.old + 0.2 * torch.randn(len(batch.old), generator=torch.Generator().manual_seed(1))
    leaf = logps.clone().requires_grad_()
    want = plain_loss(batch, leaf, 0.2, 0.2 if high is None else high)
    want.backward()
    for parts in (None, [[0, 3], [1, 2, 4, 5], [6], [7]]):
        value, gradient = value_and_gradient(algorithm, batch, logps, parts)
        torch.testing.assert_close(value, want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)
    assert 0 < int((leaf.grad == 0).sum()) < len(leaf.grad)  # clipped and free ones are both there


def test_the_first_step_has_ratio_1_and_the_gradient_of_reinforce(rollouts, alone, value_and_gradient):
    batch = rloo().prepare(rollouts([3, 2], [1.0, 0.0], [0, 0]), alone())
    assert rloo().loss(batch, Scores(batch.old)).metrics["policy/ratio"].tolist() == [1, 1]
    _, gradient = value_and_gradient(rloo(), batch, batch.old)
    torch.testing.assert_close(gradient, -batch.advantages / 2)  # two completions


def test_defaults_and_needs():
    defaults = {name: option.default for name, option in options(RLOOConfig).items()}
    assert defaults == {
        "num_generations": 2, "num_iterations": 1, "num_mini_batches": 1, "beta": 0.05, "epsilon": 0.2,
        "epsilon_high": None, "normalize_advantages": False, "reward_clip_range": None,
        "missing_eos_penalty": None,
    }  # fmt: skip
    assert RLOO.defaults["learning_rate"] == 1e-6
    assert RLOO(RLOOConfig()).needs == {"reference"} and rloo().needs == frozenset()
    assert rloo(num_generations=4, num_iterations=3).completions_per_prompt == 4


@pytest.mark.parametrize("wrong", [(1.0, -1.0), (1.0,), (1.0, 1.0)])
def test_a_clip_range_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="reward_clip_range"):
        RLOOConfig(reward_clip_range=wrong)
