"""PPO's numbers, derived by hand or by a plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlx.algorithms.ppo import PPO, PPOConfig
from rlx.core.batch import Prompts, Rollouts, Scores, Sequences
from rlx.core.errors import ConfigError
from rlx.core.functional import whiten
from rlx.core.options import options


class Alone:
    """What ``prepare`` sees when there is one process."""

    def __call__(self, sequences, model="policy"):
        raise AssertionError("PPO needs no further forward")

    def total(self, values):
        return values


def rollouts(counts, score, *, old=None, reference=None, values=None, finished=None, **more):
    n, s = len(counts), sum(counts)
    zeros = torch.zeros(s)
    return Rollouts(
        Sequences.from_lists([[1]] * n, [[2] * c for c in counts]),
        prompts=Prompts([[1]] * n, ["p"] * n, [None] * n, {}, list(range(n))),
        texts=["t"] * n,
        finished=torch.tensor(finished if finished is not None else [True] * n),
        old=zeros if old is None else torch.tensor(old),
        score=torch.tensor(score),
        rewards={},
        reference=zeros if reference is None else torch.tensor(reference),
        values=zeros if values is None else torch.tensor(values),
        **more,
    )


def ppo(**options_):
    return PPO(PPOConfig(**{"whiten_advantages": False, "lam": 1.0, "kl_coef": 0.0} | options_))


def prepared(batch, **options_):
    return ppo(**options_).prepare(batch, Alone())


def test_the_score_lies_on_the_last_completion_token():
    # gamma 1, lam 1, values 0: a token's return is the sum of the rewards from it on, here the score alone.
    # With lam 0 the advantage is the token's own reward: only the last token of each sequence has one.
    batch = rollouts([3, 1], [5.0, 7.0])
    assert prepared(batch).returns.tolist() == [5, 5, 5, 7]
    assert prepared(batch, lam=0.0).advantages.tolist() == [0, 0, 5, 7]


def test_the_kl_penalty_lies_on_every_token():
    # kl_coef 0.1, k1 = old − reference = 1, 2 | 3; rewards −0.1, −0.2 + 5 | −0.3 + 7
    batch = rollouts([2, 1], [5.0, 7.0], old=[-1.0, -1.0, -1.0], reference=[-2.0, -3.0, -4.0])
    got = prepared(batch, kl_coef=0.1, lam=0.0)
    torch.testing.assert_close(got.advantages, torch.tensor([-0.1, 4.8, 6.7]))
    assert got.metrics["kl"].tolist() == [1, 2, 3]
    assert got.metrics["kl/sequence"].tolist() == [3, 3]


@pytest.mark.parametrize(("kind", "kl"), [("k2", 0.5), ("k3", 0.36787944), ("abs", 1.0)])
def test_the_other_estimators_are_used(kind, kl):
    # r = −1: k2 = 1/2, k3 = e⁻¹ − 1 + 1 = e⁻¹, abs = 1
    batch = rollouts([1], [0.0], old=[-1.0], reference=[-2.0])
    got = prepared(batch, kl_coef=1.0, kl_estimator=kind)
    torch.testing.assert_close(got.advantages, torch.tensor([-kl]))


def test_the_exact_kl_takes_the_place_of_the_estimate():
    batch = replace(rollouts([2], [1.0]), reference=None, kl=torch.tensor([0.25, 0.5]))
    assert prepared(batch, kl_coef=1.0, kl_estimator="full", lam=0.0).advantages.tolist() == [-0.25, 0.5]
    assert ppo(kl_coef=1.0, kl_estimator="full").needs == {"values", "kl"}


def test_needs_follow_the_options():
    assert ppo().needs == {"values"}
    assert ppo(kl_coef=0.1, entropy_coef=0.01).needs == {"values", "reference", "entropy"}


def test_advantages_are_whitened_over_all_tokens():
    batch = rollouts([2, 1], [5.0, 7.0], values=[0.5, 1.0, 2.0])
    plain = prepared(batch)
    torch.testing.assert_close(prepared(batch, whiten_advantages=True).advantages, whiten(plain.advantages))
    assert torch.equal(prepared(batch, whiten_advantages=True).returns, plain.returns)


def test_whitened_rewards_keep_their_mean():
    # rewards 0, 4 | 2: mean 2, unbiased variance 4 → divided by 2 around the mean: 1, 3 | 2
    batch = rollouts([2, 1], [4.0, 2.0])
    torch.testing.assert_close(
        prepared(batch, whiten_rewards=True, lam=0.0).advantages,
        torch.tensor([1.0, 3.0, 2.0]),
        atol=1e-6,
        rtol=0,
    )


def test_rewards_for_single_tokens_are_added():
    batch = rollouts([2], [1.0], token_scores=torch.tensor([0.25, 0.5]))
    assert prepared(batch, lam=0.0).advantages.tolist() == [0.25, 1.5]
    assert batch.token_scores.tolist() == [0.25, 0.5]  # the batch itself is not written to


def test_missing_eos_penalty_hits_cut_completions_only():
    batch = rollouts([1, 1], [1.0, 1.0], finished=[True, False])
    assert prepared(batch, missing_eos_penalty=0.75).returns.tolist() == [1.0, 0.25]


def test_scores_are_scaled_by_running_moments():
    # first batch 1, 3: mean 2, std √2. Second batch 5, 7: all four have mean 4, std √(20/3).
    algorithm = ppo(score_scaling="standardise")
    first = algorithm.prepare(rollouts([1, 1], [1.0, 3.0]), Alone()).returns
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]) / 2**0.5)
    second = algorithm.prepare(rollouts([1, 1], [5.0, 7.0]), Alone()).returns
    torch.testing.assert_close(second, torch.tensor([1.0, 3.0]) / (20 / 3) ** 0.5)
    std = ppo(score_scaling="std").prepare(rollouts([1, 1], [1.0, 3.0]), Alone()).returns
    torch.testing.assert_close(std, torch.tensor([1.0, 3.0]) / 2**0.5)


def test_scores_are_clipped_after_scaling():
    batch = rollouts([1, 1], [1.0, -9.0])
    assert prepared(batch, score_clip=2.0).returns.tolist() == [1, -2]
    scaled = prepared(batch, score_clip=0.5, score_scaling="std")  # std √50: 0.14 stays, −1.27 is clipped
    torch.testing.assert_close(scaled.returns, torch.tensor([1 / 50**0.5, -0.5]))


def test_an_empty_completion_neither_fails_nor_shifts_a_reward():
    got = prepared(rollouts([2, 0, 1], [5.0, 100.0, 7.0]), lam=0.0)
    assert got.advantages.tolist() == [0, 5, 7]


def test_a_batch_of_empty_completions_stays_finite():
    got = prepared(rollouts([0, 0], [1.0, 2.0]), whiten_advantages=True, whiten_rewards=True)
    assert got.advantages.shape == (0,) and bool(got.metrics["value/explained_variance"].isfinite())


def test_unscorable_rollouts_are_left_out():
    got = prepared(rollouts([1, 2, 1], [1.0, float("nan"), 3.0]))
    assert got.returns.tolist() == [1, 3] and got.prompts.rows == [0, 2]


def test_adaptive_kl_by_hand():
    # mean KL 12, target 6: error clipped to 0.2; 2 rollouts of a horizon of 10: 1 + 0.2·2/10 = 1.04
    algorithm = ppo(kl_coef=0.5, kl_controller="adaptive", kl_target=6.0, kl_horizon=10.0)
    batch = rollouts([1, 1], [0.0, 0.0], old=[12.0, 12.0], reference=[0.0, 0.0])
    assert algorithm.prepare(batch, Alone()).metrics["kl/coef"].tolist() == [0.5]
    assert algorithm.kl_coef == pytest.approx(0.52)
    # mean KL 5.4: error −0.1: 0.52 · (1 − 0.1·0.2) = 0.5096
    algorithm.prepare(rollouts([1, 1], [0.0, 0.0], old=[5.4, 5.4], reference=[0.0, 0.0]), Alone())
    assert algorithm.kl_coef == pytest.approx(0.5096)


def test_explained_variance_by_hand():
    # returns 1, 3 (variance 2), values 1, 2: returns − values = 0, 1 (variance 1/2): 1 − 0.5/2 = 0.75
    got = prepared(rollouts([1, 1], [1.0, 3.0], values=[1.0, 2.0]))
    torch.testing.assert_close(got.metrics["value/explained_variance"], torch.tensor([0.75]))


def test_loss_adds_policy_value_and_entropy():
    algorithm = ppo(vf_coef=0.5, entropy_coef=0.1)
    batch = replace(
        rollouts([2], [0.0], values=[0.0, 0.0]),
        advantages=torch.tensor([1.0, -1.0]),
        returns=torch.tensor([0.1, 0.1]),
    )
    now = Scores(torch.zeros(2), torch.tensor([2.0, 3.0]), torch.zeros(2))
    # ratio 1: policy −A; value ½·0.01 each; −0.1·entropy
    terms = algorithm.loss(batch, now).terms["tokens"]
    torch.testing.assert_close(terms, torch.tensor([-1 + 0.0025 - 0.2, 1 + 0.0025 - 0.3]))


def test_the_first_step_has_ratio_1_and_the_gradient_of_reinforce():
    algorithm = ppo(vf_coef=0.0)
    advantages = torch.tensor([0.5, -2.0, 1.0])
    batch = replace(rollouts([3], [0.0]), advantages=advantages, returns=torch.zeros(3))
    logps = torch.zeros(3, requires_grad=True)
    loss = algorithm.loss(batch, Scores(logps, None, torch.zeros(3)))
    loss.terms["tokens"].sum().backward()
    assert loss.metrics["policy/ratio"].tolist() == [1, 1, 1]
    torch.testing.assert_close(logps.grad, -advantages)


def test_the_entropy_metric_without_the_bonus_is_minus_the_sampling_log_prob():
    batch = replace(rollouts([2], [0.0], old=[-1.0, -2.0]), advantages=torch.zeros(2), returns=torch.zeros(2))
    loss = ppo().loss(batch, Scores(torch.tensor([-1.0, -2.0]), None, torch.zeros(2)))
    assert loss.metrics["entropy"].tolist() == [1, 2]


def test_verdicts():
    algorithm = ppo(ratio_threshold=10.0, target_kl=0.1)
    assert algorithm.verdict({"policy/ratio": 1.0, "policy/approx_kl": 0.14}) == "step"
    assert algorithm.verdict({"policy/ratio": 1.0, "policy/approx_kl": 0.16}) == "stop"  # 1.5 · 0.1 = 0.15
    assert algorithm.verdict({"policy/ratio": 10.1, "policy/approx_kl": 9.0}) == "skip"
    assert ppo().verdict({"policy/ratio": 1.0, "policy/approx_kl": 99.0}) == "step"


def test_state_round_trip():
    algorithm = ppo(score_scaling="std", kl_coef=0.3)
    algorithm.kl_coef = 0.123
    algorithm.prepare(rollouts([1, 1], [1.0, 3.0]), Alone())
    fresh = ppo(score_scaling="std", kl_coef=0.3)
    fresh.load_state_dict(algorithm.state_dict())
    assert fresh.kl_coef == 0.123 and fresh.seen == algorithm.seen and fresh.seen.count == 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"stop_token": "eos", "stop_token_id": 3}, ("stop_token", "stop_token_id")),
        ({"kl_controller": "adaptive", "kl_coef": 0.0}, ("kl_controller", "kl_coef")),
    ],
)
def test_conflicting_options_are_refused_by_name(wrong, named):
    with pytest.raises(ConfigError) as caught:
        PPOConfig(**wrong)
    assert caught.value.exit_code == 2 and all(name in str(caught.value) for name in named)


def test_every_option_is_explained_and_has_the_default_of_the_field():
    defaults = {name: option.default for name, option in options(PPOConfig).items()}
    assert defaults | {
        "num_ppo_epochs": 4, "num_mini_batches": 1, "kl_coef": 0.05, "kl_estimator": "k1",
        "kl_controller": "fixed", "kl_target": 6.0, "kl_horizon": 10000, "cliprange": 0.2,
        "cliprange_value": 0.2, "vf_coef": 0.1, "entropy_coef": 0.0, "gamma": 1.0, "lam": 0.95,
        "whiten_rewards": False, "whiten_advantages": True,
        "score_scaling": "none", "score_clip": None, "missing_eos_penalty": None, "stop_token": "none",
        "stop_token_id": None, "target_kl": None, "ratio_threshold": 10.0,
    } == defaults  # fmt: skip
    assert PPO.defaults["learning_rate"] == 3e-6
