"""GRPO's numbers, derived by hand or by a plain loop over completions and tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlx.algorithms.grpo import GRPO, GRPOConfig
from rlx.core.batch import Scores
from rlx.core.errors import ConfigError
from rlx.core.functional import group_moments, quantile
from rlx.core.options import options

NAN = math.nan
COUNTS, GROUPS = [3, 1, 0, 5, 2, 4, 1, 2], [7, 7, 4, 7, 4, 4, 7, 4]
SCORE = [1, 0, 2, 0.5, 3, 1, NAN, 0]
FINISHED = [True, True, True, False, True, True, True, False]


def grpo(**chosen):
    return GRPO(GRPOConfig(**chosen))


def first_tokens(batch):
    return [float(p[0]) if len(p) else 0.0 for p in batch.advantages.split(batch.sequences.counts.tolist())]


def test_advantages_of_groups_that_are_not_adjacent(rollouts, alone):
    # group 3: 1, 3, 5 (mean 3, deviation 2); group 1: 10, 20 (mean 15, deviation √50)
    batch = rollouts([1] * 5, [1, 10, 3, 20, 5], [3, 1, 3, 1, 3])
    got = grpo().prepare(batch, alone()).advantages
    a, b = 2 / (2 + 1e-4), 5 / (50**0.5 + 1e-4)
    torch.testing.assert_close(got, torch.tensor([-a, -b, 0, b, a]))
    assert grpo(scale_rewards="none").prepare(batch, alone()).advantages.tolist() == [-2, -5, 0, 5, 2]
    # the batch: mean 7.8, squared deviations 46.24 + 4.84 + 23.04 + 148.84 + 7.84 = 230.8, / 4
    got = grpo(scale_rewards="batch").prepare(batch, alone()).advantages
    torch.testing.assert_close(got, torch.tensor([-2.0, -5, 0, 5, 2]) / (57.7**0.5 + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_unscorable_rewards_and_equal_ones_have_advantage_0(rollouts, alone, scale, aggregation):
    score = [1.0, NAN, 3.0, NAN, NAN, 7.0, NAN, 0.1, 0.1]
    batch = rollouts([2] * 9, score, [0, 0, 0, 1, 1, 2, 2, 3, 3], rewards={"r": torch.tensor(score)})
    algorithm = grpo(scale_rewards=scale, multi_objective_aggregation=aggregation)
    got = algorithm.prepare(batch, alone(weights={"r": 1.0}))
    advantages = first_tokens(got)
    assert advantages[0] == -advantages[2] < 0
    assert [abs(a) for a in advantages[1:2] + advantages[3:]] == [0] * 7
    assert got.metrics["advantages/zero"].tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 1]


def test_normalize_then_sum_by_hand(rollouts, alone):
    # a: 0, 2 (mean 1, deviation √2): ∓1/√2; b: 30, 10: ±1/√2, weight 3; one b is None in group 1
    # group 0: −x + 3x = 2x and −2x, x ≈ 1/√2; group 1: a 4, 6: ∓x; b alone: 0
    a, b = [0.0, 2, 4, 6], [30.0, 10, NAN, 5]
    batch = rollouts(
        [1] * 4, [90.0, 32, 4, 21], [0, 0, 1, 1], rewards={"a": torch.tensor(a), "b": torch.tensor(b)}
    )
    algorithm = grpo(multi_objective_aggregation="normalize_then_sum")
    got = algorithm.prepare(batch, alone(weights={"a": 1.0, "b": 3.0})).advantages
    x, y = 1 / (2**0.5 + 1e-4), 10 / (200**0.5 + 1e-4)
    combined = torch.tensor([-x + 3 * y, x - 3 * y, -x, x])
    torch.testing.assert_close(got, combined / (combined.std() + 1e-4))


def test_moments_of_groups():
    mean, deviation = group_moments(torch.tensor([1.0, NAN, 5, 9]).double(), torch.tensor([2, 2, 2, 0]))
    assert mean.tolist() == [3, 3, 3, 9]
    assert deviation.tolist() == pytest.approx([8**0.5] * 3 + [0], rel=1e-15)  # processors round roots apart


def test_quantile_equals_torch_and_knows_nothing_of_nothing():
    x = torch.rand(37, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.2, 0.5, 0.93, 1.0):
        assert quantile(x, q) == pytest.approx(float(x.quantile(q)), abs=1e-7)
    assert quantile(x[:0], 0.5) == math.inf


def plain_terms(c, batch, logps, entropy, threshold):
    """(policy term, KL term, entropy or None) of each token of each completion; None: masked."""
    rows, at = [], 0
    for i, count in enumerate(batch.sequences.counts.tolist()):
        part = slice(at, at + count)
        at += count
        lp, old, ref = logps[part], batch.old[part], batch.reference[part]
        row = []
        for t in range(count):
            if c.mask_truncated_completions and not batch.finished[i]:
                row.append(None)
                continue
            log_ratio = (lp - old).mean() if c.importance_sampling_level == "sequence" else lp[t] - old[t]
            ratio, a = log_ratio.exp(), float(batch.advantages[part][t])
            high = c.epsilon if c.epsilon_high is None else c.epsilon_high
            if c.loss_type == "cispo":
                policy = -min(float(ratio), high) * a * lp[t]
            else:
                free = ratio if c.delta is None else ratio.clamp(max=c.delta)
                policy = -min(free * a, ratio.clamp(1 - c.epsilon, 1 + high) * a)
            drift = float((old - lp).detach().mean())
            if c.off_policy_mask_threshold is not None and a < 0 and drift > c.off_policy_mask_threshold:
                policy = policy * 0
            chosen = float(batch.entropy[at - count + t]) >= threshold if threshold is not None else True
            r = ref[t] - lp[t]
            kl = (r.exp() - r - 1) * (ratio if c.use_bias_correction_kl else 1)
            row.append((policy * chosen, kl, entropy[at - count + t] if chosen else None))
        rows.append(row)
    return rows


def plain_loss(c, batch, logps, entropy, threshold=None, longest=16):
    rows = plain_terms(c, batch, logps, entropy, threshold)
    kept = [[x for x in row if x is not None] for row in rows]
    each = [[policy + c.beta * kl for policy, kl, _ in row] for row in kept]
    if c.loss_type == "grpo":
        counts = batch.sequences.counts.tolist()
        loss = sum(sum(row) / n for row, n in zip(each, counts, strict=True) if row) / len(rows)
    elif c.loss_type == "dr_grpo":
        loss = sum(sum(row) for row in each) / (len(rows) * longest)
    else:
        loss = sum(sum(row) for row in each) / sum(len(row) for row in each)
    bonus = [h for row in kept for _, _, h in row if h is not None]
    return loss - c.entropy_coef * sum(bonus) / len(bonus)


VARIANTS = {
    "dapo": {},
    "bnpo": {"loss_type": "bnpo", "epsilon_high": 0.4},
    "grpo": {"loss_type": "grpo", "beta": 0.1},
    "dr_grpo": {
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "beta": 0.1,
        "use_bias_correction_kl": False,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "beta": 0.1},
    "gspo of tokens": {"importance_sampling_level": "sequence", "epsilon_high": 0.1},
    "delta": {"delta": 1.05},
    "masked": {"mask_truncated_completions": True, "beta": 0.1, "entropy_coef": 0.2},
    "masked grpo": {"mask_truncated_completions": True, "loss_type": "grpo", "beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.3, "loss_type": "dr_grpo"},
    "entropy quantile": {"top_entropy_quantile": 0.4, "entropy_coef": 0.3, "beta": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 0.02, "beta": 0.1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradient_equal_a_plain_loop_however_it_is_cut(rollouts, alone, value_and_gradient, name):
    draw = torch.Generator().manual_seed(2)
    algorithm, total = grpo(**VARIANTS[name]), sum(COUNTS)
    sampled = torch.rand(total, generator=draw)
    batch = rollouts(COUNTS, SCORE, GROUPS, finished=FINISHED)
    batch = algorithm.prepare(batch, alone(entropy=sampled))
    logps = batch.old + 0.3 * torch.randn(total, generator=draw)
    entropy = torch.rand(total, generator=draw)
    threshold = None
    if algorithm.config.top_entropy_quantile < 1:
        threshold = float(sampled.quantile(0.6))
        assert batch.entropy is sampled
    leaf = logps.clone().requires_grad_()
    want = plain_loss(algorithm.config, batch, leaf, entropy, threshold)
    want.backward()
    more = {"entropy": entropy} if algorithm.config.entropy_coef else {}
    for parts in (None, [[0, 3], [1, 2, 4, 5], [6], [7]]):
        value, gradient = value_and_gradient(algorithm, batch, logps, parts, **more)
        torch.testing.assert_close(value, want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)
    assert float(leaf.grad.abs().max()) > 0.005


def test_every_option_of_the_variants_changes_the_loss(rollouts, alone, value_and_gradient):
    """Otherwise the comparisons above would hold for an option without effect."""
    seen = {}
    sampled = torch.linspace(0, 1, sum(COUNTS))
    logps = None
    for name, chosen in VARIANTS.items():
        algorithm = grpo(**chosen)
        batch = algorithm.prepare(rollouts(COUNTS, SCORE, GROUPS, finished=FINISHED), alone(entropy=sampled))
        noise = torch.randn(len(sampled), generator=torch.Generator().manual_seed(5))
        logps = batch.old + 0.3 * noise
        more = {"entropy": sampled} if algorithm.config.entropy_coef else {}
        seen[name] = float(value_and_gradient(algorithm, batch, logps, **more)[0])
    assert len({round(value, 6) for value in seen.values()}) == len(VARIANTS)


def test_delta_bounds_the_loss_of_a_bad_completion(rollouts, alone):
    # ratio e² = 7.39 of a bad completion: the clip does not act there, delta does
    batch = replace(rollouts([1], [0.0]), advantages=torch.tensor([-1.0]), old=torch.tensor([-3.0]))
    now = Scores(torch.tensor([-1.0]))
    torch.testing.assert_close(grpo().loss(batch, now).terms["tokens"], torch.tensor([math.e**2]))
    assert grpo(delta=4.0).loss(batch, now).terms["tokens"].tolist() == [4]


def test_the_off_policy_mask_spares_good_completions(rollouts):
    # old − new = 1 nat a token for both; only the bad one is passed over
    batch = replace(
        rollouts([1, 1], [0.0, 0.0]), advantages=torch.tensor([1.0, -1.0]), old=torch.tensor([-1.0, -1.0])
    )
    now = Scores(torch.tensor([-2.0, -2.0]))
    terms = grpo(off_policy_mask_threshold=0.5).loss(batch, now).terms["tokens"]
    torch.testing.assert_close(terms, torch.tensor([-math.exp(-1), 0.0]))


def test_the_entropy_threshold_is_that_of_the_whole_batch_of_tokens_that_count(rollouts, alone):
    # tokens 0…4; the last two belong to a cut completion. The upper half of 0, 1, 2 begins at 1.
    entropy = torch.tensor([0.0, 1, 2, 30, 40])
    algorithm = grpo(top_entropy_quantile=0.5, mask_truncated_completions=True)
    batch = rollouts([3, 2], [1.0, 0.0], [0, 0], finished=[True, False])
    batch = algorithm.prepare(batch, alone(entropy=entropy))
    assert algorithm.threshold == 1
    assert algorithm.chosen(batch).tolist() == [False, True, True, False, False]
    assert algorithm.size(batch, "tokens") == 3  # of the loss's denominator, entropies do not matter


def test_the_first_step_has_ratio_1_and_the_gradient_of_reinforce(rollouts, alone, value_and_gradient):
    algorithm = grpo()
    batch = algorithm.prepare(rollouts([3, 2], [1.0, 0.0], [0, 0]), alone())
    assert algorithm.loss(batch, Scores(batch.old)).metrics["policy/ratio"].tolist() == [1] * 5
    _, gradient = value_and_gradient(algorithm, batch, batch.old)
    torch.testing.assert_close(gradient, -batch.advantages / 5)
    cispo = grpo(loss_type="cispo", epsilon_high=5.0)
    torch.testing.assert_close(value_and_gradient(cispo, batch, batch.old)[1], gradient)


@pytest.mark.parametrize("name", VARIANTS)
def test_batches_without_a_token_or_without_a_score_stay_finite(rollouts, alone, value_and_gradient, name):
    algorithm = grpo(**VARIANTS[name])
    for counts, score in (([0, 0], [1.0, 2.0]), ([1, 0], [NAN, NAN])):
        entropy = torch.ones(sum(counts))
        batch = algorithm.prepare(rollouts(counts, score, [0, 0]), alone(entropy=entropy))
        value, gradient = value_and_gradient(algorithm, batch, batch.old, entropy=entropy)
        assert bool(value.isfinite()) and gradient.shape == batch.old.shape
        assert bool(gradient.isfinite().all())


def test_defaults_and_needs():
    defaults = {name: option.default for name, option in options(GRPOConfig).items()}
    assert defaults == {
        "num_generations": 8, "num_iterations": 1, "num_mini_batches": 1, "beta": 0.0, "epsilon": 0.2,
        "use_bias_correction_kl": True, "epsilon_high": None, "delta": None, "loss_type": "dapo",
        "importance_sampling_level": "token", "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize", "mask_truncated_completions": False,
        "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "off_policy_mask_threshold": None,
    }  # fmt: skip
    assert GRPO.defaults["learning_rate"] == 1e-6
    assert grpo().needs == frozenset() and grpo(beta=0.1, entropy_coef=0.1).needs == {"reference", "entropy"}
    assert grpo().loss_per == ("tokens",) and grpo(loss_type="dr_grpo").loss_per == ("sequences",)


def test_options_without_effect_are_told(recwarn):
    grpo(loss_type="cispo", epsilon_high=5.0)
    grpo(multi_objective_aggregation="normalize_then_sum")
    grpo(delta=2.0, scale_rewards="none")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="delta has no effect on loss_type cispo"):
        grpo(loss_type="cispo", epsilon_high=5.0, delta=2.0)
    with pytest.warns(UserWarning, match="scale_rewards none has no effect on normalize_then_sum"):
        grpo(multi_objective_aggregation="normalize_then_sum", scale_rewards="none")


def test_cispo_without_epsilon_high_is_refused_with_a_recommendation():
    with pytest.raises(ConfigError, match=r"epsilon_high: 5\.0") as caught:
        GRPOConfig(loss_type="cispo")
    assert caught.value.exit_code == 2
