"""Tensor maths on flat batches, against plain loops and numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlx.core import functional as F

COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=6)


def flat(counts: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(counts), generator=g), torch.tensor(counts)


def rows(x: torch.Tensor, counts: list[int]) -> list[list[float]]:
    return [part.tolist() for part in x.split(counts)]


@given(COUNTS)
def test_segment_sum_and_mean_equal_a_loop(counts):
    x, n = flat(counts)
    torch.testing.assert_close(
        F.segment_sum(x, n), torch.tensor([sum(r) for r in rows(x, counts)], dtype=torch.float32)
    )
    means = [sum(r) / len(r) if r else 0.0 for r in rows(x, counts)]
    torch.testing.assert_close(F.segment_mean(x, n), torch.tensor(means))


def test_segment_sum_refuses_counts_that_do_not_add_up():
    with pytest.raises(ValueError, match="add up to 4, but there are 3"):
        F.segment_sum(torch.zeros(3), torch.tensor([2, 2]))


@given(COUNTS)
def test_padded_and_flat_are_inverse(counts):
    x, n = flat(counts)
    assert torch.equal(F.to_flat(F.to_padded(x, n), n), x)


def test_last_token_skips_empty_sequences():
    # tokens 0 1 | (none) | 2 3 4: the last ones are 1 and 4
    assert F.last_token(torch.tensor([2, 0, 3])).tolist() == [1, 4]


def test_spread_repeats_each_value_for_its_tokens():
    assert F.spread(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0, 1])).tolist() == [5, 5, 7]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # policy −1, reference −1.5: r = −0.5
        ("k1", 0.5),
        ("k2", 0.125),
        ("k3", math.exp(-0.5) - 1 + 0.5),
        ("abs", 0.5),
    ],
)
def test_kl_estimates_by_hand(kind, expected):
    got = F.kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), kind)
    torch.testing.assert_close(got, torch.tensor([expected]))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased(kind):
    # Over an enumerable distribution: E_p[estimate] is the KL, exactly.
    g = torch.Generator().manual_seed(3)
    p, q = (torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * F.kl_estimate(p, q, kind)).sum(), exact)


def test_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2, k3 or abs, not 'k9'"):
        F.kl_estimate(torch.zeros(1), torch.zeros(1), "k9")


def test_gae_by_hand():
    # gamma 0.5, lam 0.5, one sequence: r = 1, 2, 4; V = 1, 2, 3 (and 0 after the end)
    # δ3 = 4 + 0 − 3 = 1            A3 = 1
    # δ2 = 2 + 0.5·3 − 2 = 1.5      A2 = 1.5 + 0.25·1 = 1.75
    # δ1 = 1 + 0.5·2 − 1 = 1        A1 = 1 + 0.25·1.75 = 1.4375
    advantages, returns = F.gae(
        torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3]), gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [1.4375, 1.75, 1.0]
    assert returns.tolist() == [2.4375, 3.75, 4.0]


@given(COUNTS, st.floats(0.1, 1), st.floats(0, 1))
def test_gae_equals_a_loop(counts, gamma, lam):
    rewards, n = flat(counts, 1)
    values, _ = flat(counts, 2)
    expected = []
    for r, v in zip(rows(rewards, counts), rows(values, counts), strict=True):
        after, out = 0.0, []
        for t in reversed(range(len(r))):
            following = v[t + 1] if t + 1 < len(r) else 0.0
            after = r[t] + gamma * following - v[t] + gamma * lam * after
            out.insert(0, after)
        expected += out
    advantages, returns = F.gae(rewards, values, n, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, advantages + values)


def test_gae_with_lam_1_is_the_discounted_return():
    rewards, n = flat([4], 5)
    values, _ = flat([4], 6)
    _, returns = F.gae(rewards, values, n, gamma=0.9, lam=1.0)
    expected = [sum(0.9 ** (k - t) * float(rewards[k]) for k in range(t, 4)) for t in range(4)]
    torch.testing.assert_close(returns, torch.tensor(expected))


def test_whiten_by_hand():
    # 1, 2, 3, 6: mean 3, unbiased variance (4 + 1 + 0 + 9) / 3 = 14/3
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    scale = 1 / math.sqrt(14 / 3 + 1e-8)
    torch.testing.assert_close(F.whiten(x), (x - 3) * scale)
    torch.testing.assert_close(F.whiten(x, shift_mean=False), (x - 3) * scale + 3)


@pytest.mark.parametrize("x", [[], [5.0], [2.0, 2.0]])
def test_whiten_of_nothing_one_value_or_equal_values_is_finite(x):
    white = F.whiten(torch.tensor(x))
    assert white.shape == (len(x),) and bool((white == 0).all())


def test_whiten_over_two_processes_equals_one():
    x = torch.randn(10, generator=torch.Generator().manual_seed(0))
    mine, theirs = x[:3], x[3:]
    # The other process's contributions, in the order in which moments asks for them.
    mean = x.double().mean()
    others = iter(
        [
            torch.stack([torch.tensor(7.0, dtype=torch.float64), theirs.double().sum()]),
            (theirs.double() - mean).square().sum(),
        ]
    )
    torch.testing.assert_close(F.whiten(mine, lambda v: v + next(others)), F.whiten(x)[:3])


@given(st.lists(st.lists(st.floats(-5, 5), min_size=0, max_size=5), min_size=1, max_size=5))
def test_running_moments_equal_the_moments_of_all(batches):
    running = F.RunningMoments()
    for batch in batches:
        running.update(*F.moments(torch.tensor(batch, dtype=torch.float64)))
    everything = torch.tensor([x for batch in batches for x in batch], dtype=torch.float64)
    if len(everything) > 1:
        assert running.mean == pytest.approx(float(everything.mean()), abs=1e-9)
        assert running.std == pytest.approx(float(everything.std()), abs=1e-9)
    else:
        assert running.std == 1.0


def test_group_sums_and_sizes_go_by_number_not_by_adjacency():
    groups = torch.tensor([7, 3, 7, 3, 3])
    assert F.group_sum(torch.tensor([1.0, 10.0, 2.0, 20.0, 30.0]), groups).tolist() == [3, 60, 3, 60, 60]
    assert F.group_size(groups).tolist() == [2, 3, 2, 3, 3]


def test_gather_rows_of_one_process_is_what_it_was_given():
    values = torch.arange(6.0).view(3, 2)
    found, first = F.gather_rows(values, F.alone)
    assert torch.equal(found, values) and first == 0
    assert F.gather_rows(values[:0], F.alone)[0].shape == (0, 2)
