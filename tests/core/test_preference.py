"""Tensor maths of preference optimisation: against float64, plain loops and numbers derived by hand."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlx.core import functional, policy_gradient
from rlx.core import preference as P


def test_sides_and_tokens_of_chosen():
    assert [x.tolist() for x in P.sides(torch.arange(6))] == [[0, 2, 4], [1, 3, 5]]
    # chosen: tokens 0 1 | (none); rejected: 2 | 3 4
    assert P.of_chosen(torch.arange(5), torch.tensor([2, 1, 0, 2])).tolist() == [0, 1]


def test_places_count_from_0_in_each_sequence():
    assert P.places(torch.tensor([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]


@given(st.floats(-80, -2e-7))
def test_log1mexp_is_accurate_in_float32(x):
    x = float(torch.tensor(x, dtype=torch.float32))
    value = torch.tensor(x, requires_grad=True)
    P.log1mexp(value).backward()
    exact = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    assert float(P.log1mexp(value.detach())) == pytest.approx(exact, rel=2e-6, abs=1e-30)
    assert float(value.grad) == pytest.approx(1 / math.expm1(-x) * -1, rel=2e-6, abs=1e-30)


@pytest.mark.parametrize("x", [0.0, -1e-30, -1e-8])
def test_log1mexp_stays_finite_at_probability_1(x):
    value = torch.tensor(x, requires_grad=True)
    result = P.log1mexp(value)
    result.backward()
    assert -16 < float(result.detach()) < -15.9 and bool(value.grad.isfinite())  # log of float32's epsilon


def test_power_by_hand_and_at_its_limits():
    x = torch.tensor([0.0, math.log(2)])
    torch.testing.assert_close(P.power(x, 2.0), torch.tensor([0.0, 1.5]))  # (4 − 1) / 2
    torch.testing.assert_close(P.power(x, -1.0), torch.tensor([0.0, 0.5]))  # (1/2 − 1) / −1
    torch.testing.assert_close(P.power(x, 1e-5), x, rtol=1e-4, atol=0)
    assert torch.equal(P.power(x, 0.0), x)
    assert bool(P.power(torch.tensor([1e4, -1e4]), 3.0).isfinite().all())


def test_f_scores_by_hand():
    r = torch.tensor([math.log(3)])  # the ratio is 3
    for kind, value in (
        ("reverse_kl", math.log(3)),
        ("forward_kl", 1 - 1 / 3),
        ("js_divergence", math.log(2 * 3 / 4)),
        ("alpha_divergence", (3**-0.5 - 1) / -0.5),
    ):
        torch.testing.assert_close(P.f_score(r, kind), torch.tensor([value]))
    with pytest.raises(ValueError, match="js_divergence, alpha_divergence, not 'js'"):
        P.f_score(r, "js")


def test_smoothed_by_hand():
    # −log σ(1) = 0.31326169, −log σ(−1) = 1.31326169
    x = torch.tensor([1.0])
    torch.testing.assert_close(P.smoothed(x, 0.0), torch.tensor([0.31326169]))
    torch.testing.assert_close(P.smoothed(x, 0.1), torch.tensor([0.9 * 0.31326169 + 0.1 * 1.31326169]))


@pytest.mark.parametrize("kind", P.PAIR_LOSSES)
def test_every_loss_asks_for_more_of_the_chosen_and_less_of_the_rejected(kind):
    # At the reference; discopop is not monotonic near it, so a little further on.
    start = 5.0 if kind == "discopop" else 0.0
    counts, strength = torch.tensor([2, 2]), torch.tensor([start], requires_grad=True)
    loss = P.preference_loss(kind, strength, -strength, counts, beta=0.1, smoothing=0.01)
    loss.sum().backward()
    assert float(strength.grad) < 0


def test_verbosity_weights_by_hand():
    # 3 against 1 token: the last two of the chosen one; 0 against 2: both of the rejected one
    got = P.verbosity_weights(torch.tensor([3, 1, 0, 2]), 0.25)
    assert got.tolist() == [1, 0.25, 0.25, 1, 0.25, 0.25]


def test_policy_weights_by_hand():
    # chosen: mean of (−1 − −2, −3 − −2) = 0 → 1; rejected: −1 − −1.5 = 0.5 → e^0.5. An empty pair counts 1.
    logps = torch.tensor([-1.0, -3.0, -1.0], requires_grad=True)
    got = P.policy_weights(logps, torch.tensor([-2.0, -2.0, -1.5]), torch.tensor([2, 1, 0, 0]))
    torch.testing.assert_close(got, torch.tensor([math.exp(0.5), 1.0]))
    assert not got.requires_grad


@given(st.lists(st.integers(-3, 3), min_size=0, max_size=8), st.randoms())
def test_partners_are_those_of_a_sort(values, random):
    others = [random.random() for _ in values]
    got = P.partners(torch.tensor(values, dtype=torch.float32), torch.tensor(others, dtype=torch.float32))
    pairs = sorted(zip(values, got.tolist(), strict=True))
    assert [partner for _, partner in pairs] == pytest.approx(sorted(others))


def test_comparison_metrics_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([0.0, 0.0])
    got = P.comparison_metrics(chosen, rejected)
    assert {name: values.tolist() for name, values in got.items()} == {
        "rewards/chosen": [1, 0],
        "rewards/rejected": [0, 0],
        "rewards/margins": [1, 0],
        "rewards/accuracies": [1, 0],  # a tie is not right
    }
    assert not any(values.requires_grad for values in got.values())


# Log-probs of two chosen and of two rejected completions.
PAIR = torch.tensor([-1.0, -0.5]), torch.tensor([-2.0, -0.25])


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("kind", "options", "term"),
    [
        ("sigmoid", {}, lambda c, r: -math.log(sigma(0.5 * (c - r)))),
        (
            "sigmoid",
            {"smoothing": 0.1},
            lambda c, r: -0.9 * math.log(sigma((c - r) / 2)) - 0.1 * math.log(sigma((r - c) / 2)),
        ),
        ("hinge", {}, lambda c, r: max(0.0, 1 - 0.5 * (c - r))),
        ("ipo", {}, lambda c, r: (c - r - 1) ** 2),
        ("simpo", {"gamma": 0.3}, lambda c, r: -math.log(sigma(0.5 * (c - r) - 0.3))),
        (
            "sigmoid",
            {"alpha": 0.2},
            lambda c, r: (
                -math.log(sigma(0.5 * ((1 - math.exp(c) ** -0.2) - (1 - math.exp(r) ** -0.2)) / 0.2))
            ),
        ),
    ],
)
def test_losses_without_a_reference_by_hand(kind, options, term):
    got = P.contrastive_loss(kind, *PAIR, beta=0.5, **options)
    wanted = [term(c, r) for c, r in zip(*(side.tolist() for side in PAIR), strict=True)]
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_a_loss_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="sigmoid, hinge, ipo or simpo, not 'sigmoide'"):
        P.contrastive_loss("sigmoide", *PAIR, beta=1.0)


def test_the_odds_ratio_by_hand():
    loss, odds = P.odds_ratio_loss(*PAIR, beta=0.3)
    p, q = [[math.exp(x) for x in side.tolist()] for side in PAIR]
    wanted = [math.log(a / (1 - a) / (b / (1 - b))) for a, b in zip(p, q, strict=True)]
    torch.testing.assert_close(odds, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    terms = [-0.3 * math.log(sigma(x)) for x in wanted]
    torch.testing.assert_close(loss, torch.tensor(terms), rtol=1e-5, atol=1e-6)


def test_single_completions_by_hand():
    ratio, good = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([True, False, False])
    got = P.labelled_loss(
        ratio, good, torch.tensor(0.5), beta=0.2, desirable_weight=3.0, undesirable_weight=2.0
    )
    wanted = [3 * (1 - sigma(0.2 * 1.5)), 2 * (1 - sigma(-0.2 * 1.5)), 2 * (1 - sigma(0.2 * 1.5))]
    torch.testing.assert_close(got, torch.tensor(wanted))
    wanted = [1 - sigma(0.4), sigma(0.4), sigma(-0.2)]  # apo_zero_unpaired
    torch.testing.assert_close(P.labelled_loss(ratio, good, beta=0.2), torch.tensor(wanted))


def test_scores_of_a_pair_by_hand():
    chosen, rejected, margin = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.0])
    wanted = [-math.log(sigma(0.5)), -math.log(sigma(-3.0))]
    torch.testing.assert_close(P.reward_loss(chosen, rejected, margin), torch.tensor(wanted))
    wanted = [wanted[0] + 0.1 * 1, wanted[1] + 0.1 * 4]
    torch.testing.assert_close(P.reward_loss(chosen, rejected, margin, centering=0.1), torch.tensor(wanted))


@pytest.mark.parametrize("module", [functional, policy_gradient, P])
def test_every_function_says_the_shapes_of_what_it_takes_and_gives(module):
    for name, member in vars(module).items():
        if not inspect.isfunction(member) or member.__module__ != module.__name__ or name[0] == "_":
            continue
        doc = inspect.getdoc(member) or ""
        assert name == "alone" or re.search(r"\([A-Z0-9]+,[^()]*\)|\(\) |any shape", doc), name
