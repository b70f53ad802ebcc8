"""CPO, SimPO and AlphaPO against their formulas in plain float64, and numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlx.algorithms.cpo import CPO, KINDS, CPOConfig
from rlx.core.batch import Pairs, Scores, Sequences
from rlx.core.errors import ConfigError
from rlx.core.options import build, options

COUNTS = [3, 2, 1, 4, 2, 2]


def pairs(counts=COUNTS):
    return Pairs(Sequences.from_lists([[1]] * len(counts), [[2] * n for n in counts]))


def given_logps(counts=COUNTS, seed=0):
    return -2 * torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed))


def cpo(**values):
    return CPO(CPOConfig(**values))


def loss_of(algorithm, batch, logps, whole=None):
    """The loss as the loop takes it."""
    terms = algorithm.loss(batch, Scores(logps)).terms
    assert set(terms) == set(algorithm.loss_per)
    return sum(t.sum() / algorithm.size(whole or batch, by).clamp(min=1) for by, t in terms.items())


def trained(algorithm, batch, policy):
    logps = policy.clone().requires_grad_()
    loss = loss_of(algorithm, batch, logps)
    loss.backward()
    return float(loss.detach()), logps.grad


def by_hand(
    policy, counts, kind, *, beta=0.1, label_smoothing=0.0, cpo_alpha=1.0, simpo_gamma=0.5, alpha=0.0
):
    """The definition, pair by pair in float64."""
    logps = policy.double().requires_grad_()
    parts, terms, nll = logps.split(counts), [], []
    for chosen, rejected in zip(parts[0::2], parts[1::2], strict=True):
        nll += [-x for x in chosen]
        means = kind in ("ipo", "simpo")
        c, r = (x.sum() / max(len(x), 1) if means else x.sum() for x in (chosen, rejected))
        if alpha:
            c, r = ((1 - x.exp() ** -alpha) / alpha for x in (c, r))
        x = beta * (c - r) - (simpo_gamma if kind == "simpo" else 0)
        if kind == "hinge":
            terms.append(torch.relu(1 - x))
        elif kind == "ipo":
            terms.append((c - r - 1 / (2 * beta)) ** 2)
        else:
            right, wrong = (1 / (1 + (-sign * x).exp()) for sign in (1, -1))
            terms.append(-(1 - label_smoothing) * right.log() - label_smoothing * wrong.log())
    loss = sum(terms) / len(terms) + cpo_alpha * sum(nll) / max(len(nll), 1)
    loss.backward()
    return float(loss.detach()), logps.grad.float()


def close(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"beta": 2.0},
        {"cpo_alpha": 0.0},
        {"cpo_alpha": 0.3, "simpo_gamma": 1.4},
        {"alpha": 0.25},
        {"alpha": -0.5, "cpo_alpha": 0.0},
        {"label_smoothing": 0.2},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_equals_its_formula(kind, values):
    if "label_smoothing" in values and kind in ("hinge", "ipo"):
        return
    policy = given_logps()
    close(trained(cpo(loss_type=kind, **values), pairs(), policy), by_hand(policy, COUNTS, kind, **values))


@pytest.mark.parametrize(
    ("kind", "values", "value"),
    [
        # chosen −1, −1 (sum −2, mean −1), rejected −4 (sum and mean −4); β = 0.5
        ("sigmoid", {}, math.log(1 + math.exp(-1))),  # β(−2 + 4) = 1
        ("hinge", {}, 0.0),
        ("ipo", {}, 4.0),  # −1 + 4 − 1 = 2
        ("simpo", {}, math.log(1 + math.exp(-1))),  # 0.5 · 3 − 0.5 = 1
        ("simpo", {"simpo_gamma": 1.5}, math.log(2)),
        ("sigmoid", {"cpo_alpha": 2.0}, math.log(1 + math.exp(-1)) + 2.0),  # nll 1
        # AlphaPO with α = −1: r = p − 1: e⁻¹ − e⁻⁴ = 0.34956381, halved
        ("simpo", {"alpha": -1.0, "simpo_gamma": 0.0}, math.log(1 + math.exp(-0.17478190))),
    ],
)
def test_numbers_by_hand(kind, values, value):
    algorithm = cpo(loss_type=kind, beta=0.5, **{"cpo_alpha": 0.0} | values)
    loss = trained(algorithm, pairs([2, 1]), torch.tensor([-1.0, -1.0, -4.0]))[0]
    assert loss == pytest.approx(value, abs=1e-6)


def test_a_long_completion_does_not_underflow_with_alpha():
    # p = e^−300 is 0 in float32, but p^−0.1 = e^30 is not
    policy = torch.full((200,), -3.0)
    loss, gradient = trained(cpo(alpha=0.1, cpo_alpha=0.0), pairs([100, 100]), policy)
    assert loss == pytest.approx(math.log(2)) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_one_token_completions_stay_finite(kind):
    for counts in ([0, 1, 1, 0, 0, 0], [0, 0], [1, 1]):
        policy = given_logps(counts)
        close(trained(cpo(loss_type=kind), pairs(counts), policy), by_hand(policy, counts, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_sides_pull_to_neither(kind):
    policy = given_logps([2, 2])[:2].repeat(2)
    _, gradient = trained(cpo(loss_type=kind, cpo_alpha=0.0), pairs([2, 2]), policy)
    torch.testing.assert_close(gradient[:2], -gradient[2:])


@pytest.mark.parametrize("sizes", [[1, 2], [2, 1], [1, 1, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_does_not_depend_on_micro_batches(kind, sizes):
    algorithm, batch, policy = cpo(loss_type=kind), pairs(), given_logps()
    logps, loss = policy.clone().requires_grad_(), 0.0
    owners = torch.repeat_interleave(batch.sequences.counts) // 2
    for rows in torch.arange(3).flip(0).split(sizes):
        tokens = torch.cat([(owners == row).nonzero()[:, 0] for row in rows])
        part = loss_of(algorithm, batch.take(rows), logps[tokens], batch)
        part.backward()
        loss += float(part.detach())
    close((loss, logps.grad), trained(algorithm, batch, policy))


def test_metrics_by_hand():
    logps = torch.tensor([-1.0, -1.0, -4.0], requires_grad=True)
    metrics = cpo(beta=0.5, loss_type="ipo").loss(pairs([2, 1]), Scores(logps)).metrics
    assert {name: values.tolist() for name, values in metrics.items()} == {
        "rewards/chosen": [-0.5],
        "rewards/rejected": [-2.0],
        "rewards/margins": [1.5],
        "rewards/accuracies": [1.0],
        "logps/chosen": [-1.0],
        "logps/rejected": [-4.0],
        "loss/ipo": [4.0],
        "loss/nll": [1.0, 1.0],
    }
    assert not any(values.requires_grad for values in metrics.values())


def test_options():
    assert {name: option.default for name, option in options(CPOConfig).items()} == {
        "beta": 0.1,
        "loss_type": "sigmoid",
        "label_smoothing": 0.0,
        "cpo_alpha": 1.0,
        "simpo_gamma": 0.5,
        "alpha": 0.0,
    }
    assert CPO.defaults["learning_rate"] == 1e-6 and cpo().needs == frozenset()
    for wrong in ({"beta": 0}, {"loss_type": "dpo"}, {"label_smoothing": 1}, {"cpo_alpha": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(CPOConfig, wrong, owner="algorithm cpo")
    with pytest.warns(UserWarning, match="label_smoothing has no effect on loss_type hinge"):
        cpo(loss_type="hinge", label_smoothing=0.1)
