"""OnlineDPO: which completions make a pair, and the loss of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlx.algorithms.online_dpo import OnlineDPO, OnlineDPOConfig, best_and_worst
from rlx.core.batch import Pairs, Scores
from rlx.core.options import options

NAN = math.nan


def online(**chosen):
    return OnlineDPO(OnlineDPOConfig(**chosen))


@pytest.mark.parametrize(
    ("rewards", "groups", "chosen", "rejected"),
    [
        ([1, 0, 0, 1], [0, 0, 1, 1], [0, 3], [1, 2]),
        ([0.5, 0.5], [3, 3], [0], [1]),  # a tie keeps the first
        ([1, 5, 3, 2], [9, 2, 9, 2], [1, 2], [3, 0]),  # groups by number, not by place
        ([2, 7, 7, 1, 1], [0] * 5, [1], [4]),  # best and worst of five: the first best, the last worst
        ([NAN, 1, NAN, NAN, 0, 3], [0, 0, 1, 1, 2, 2], [5], [4]),  # nothing to compare: no pair
        ([], [], [], []),
    ],
)
def test_which_completions_make_a_pair(rewards, groups, chosen, rejected):
    got = best_and_worst(torch.tensor(rewards, dtype=torch.float32), torch.tensor(groups, dtype=torch.long))
    assert [x.tolist() for x in got] == [chosen, rejected]


def test_pairs_carry_their_tokens_and_reference_log_probs(rollouts, alone):
    batch = rollouts([2, 1, 0, 3], [0.0, 1.0, 2.0, 2.0], [0, 0, 1, 1], reference=[-1.0, -2, -3, -4, -5, -6])
    pairs = online().prepare(batch, alone())
    assert isinstance(pairs, Pairs) and len(pairs) == 2
    assert pairs.sequences.counts.tolist() == [1, 2, 0, 3]
    assert pairs.reference.tolist() == [-3, -1, -2, -4, -5, -6]
    assert pairs.metrics["pairs/ties"].tolist() == [0, 1]
    assert pairs.metrics["pairs/reward_gap"].tolist() == [1, 0]


def test_missing_eos_penalty_and_rewards_of_tokens_decide(rollouts, alone):
    batch = rollouts([1, 1, 1, 1], [1.0, 0.8, 0, 0], [0, 0, 1, 1], finished=[False, True, True, True])
    assert online().prepare(batch, alone()).reference[0] == batch.reference[0]
    assert online(missing_eos_penalty=0.5).prepare(batch, alone()).reference[0] == batch.reference[1]
    batch = rollouts([1, 2], [0.0, 0.0], [0, 0], token_scores=[0.5, 0.5, 0.5])
    assert online().prepare(batch, alone()).sequences.counts.tolist() == [2, 1]


def test_what_a_judge_says_decides_in_the_place_of_rewards(rollouts, alone):
    reference = [-1.0, -2, -3, -4, -5, -6]
    batch = rollouts([1] * 6, [9.0, 0, 9, 0, 9, 0], [0, 0, 1, 1, 2, 2], reference=reference)
    # The judge: against the reward, with it, and no verdict at all: then there is no pair.
    pairs = online().prepare(replace(batch, wins=torch.tensor([0.0, 1, 1, 0, NAN, NAN])), alone())
    assert pairs.reference.tolist() == [-2, -1, -3, -4]
    assert pairs.metrics["pairs/reward_gap"].tolist() == [1, 1]
    cut = replace(
        batch, wins=torch.tensor([0.0, 1, 1, 0, 1, 0]), finished=torch.tensor([True, False] + [True] * 4)
    )
    punished = online(missing_eos_penalty=1.5).prepare(cut, alone())
    assert punished.reference.tolist() == [-1, -2, -3, -4, -5, -6]


def test_a_batch_without_a_pair(rollouts, alone):
    pairs = online().prepare(rollouts([1, 1], [NAN, 1.0], [0, 0]), alone())
    assert len(pairs) == 0 and pairs.reference.shape == (0,)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_value_and_gradient_equal_a_plain_loop_however_it_is_cut(rollouts, alone, value_and_gradient, kind):
    score = [1, 0, 2, 0.5, 3, 3, 0, 1]
    algorithm = online(loss_type=kind, beta=0.3)
    pairs = algorithm.prepare(rollouts([3, 1, 0, 5, 2, 4, 1, 2], score, [0, 0, 1, 1, 2, 2, 3, 3]), alone())
    draw = torch.Generator().manual_seed(0)
    logps = pairs.reference + torch.randn(len(pairs.reference), generator=draw)
    leaf, losses = logps.clone().requires_grad_(), []
    parts = list(
        zip(*(x.split(pairs.sequences.counts.tolist()) for x in (leaf, pairs.reference)), strict=True)
    )
    for (chosen, base_c), (rejected, base_r) in zip(parts[0::2], parts[1::2], strict=True):
        delta = (chosen.sum() - base_c.sum()) - (rejected.sum() - base_r.sum())
        losses.append(torch.log(1 + torch.exp(-0.3 * delta)) if kind == "sigmoid" else (delta - 1 / 0.6) ** 2)
    want = sum(losses) / 4
    want.backward()
    for cut in (None, [[0, 2], [3], [1]]):
        value, gradient = value_and_gradient(algorithm, pairs, logps, cut)
        torch.testing.assert_close(value, want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-6)


def test_the_first_step_by_hand(rollouts, alone):
    # policy = reference: Δ = 0: −log σ(0) = log 2, and (1/(2·0.1))² = 25
    pairs = online().prepare(rollouts([2, 1], [1.0, 0.0], [0, 0]), alone())
    loss = online().loss(pairs, Scores(pairs.reference))
    torch.testing.assert_close(loss.terms["rows"], torch.tensor([math.log(2)]))
    assert loss.metrics["rewards/margins"].tolist() == [0]
    ipo = online(loss_type="ipo").loss(pairs, Scores(pairs.reference))
    torch.testing.assert_close(ipo.terms["rows"], torch.tensor([25.0]))


def test_a_pair_of_empty_completions_stays_finite(rollouts, alone, value_and_gradient):
    pairs = online().prepare(rollouts([0, 0], [1.0, 1.0], [0, 0]), alone())
    value, gradient = value_and_gradient(online(), pairs, pairs.reference)
    assert float(value) == pytest.approx(math.log(2))
    assert gradient.shape == (0,)


def test_defaults():
    found = {name: option.default for name, option in options(OnlineDPOConfig).items()}
    assert found == {"beta": 0.1, "loss_type": "sigmoid", "num_generations": 2, "missing_eos_penalty": None}
    assert OnlineDPO.defaults == {"learning_rate": 5e-7, "temperature": 0.9, "max_completion_length": 64}
    assert online().needs == {"reference"} and online().completions_per_prompt == 2
