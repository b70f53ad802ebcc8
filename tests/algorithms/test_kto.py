"""KTO against its formula in plain float64, and numbers derived by hand."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

from rlx.algorithms.kto import KTO, KTOConfig
from rlx.core.batch import Labeled, Scores, Sequences
from rlx.core.errors import ConfigError
from rlx.core.options import build, options

COUNTS, GOOD = [3, 1, 2, 4, 0], [True, False, True, True, False]


class Given:
    """A scorer that knows the log-probs of the mismatched sequences under both models."""

    def __init__(self, policy=None, reference=None, others=None):
        self.known, self.others = {"policy": policy, "reference": reference}, others

    def __call__(self, sequences, model="policy", needs=()):
        return Scores(self.known[model])

    def total(self, values):
        """This process plus what the others hold, in the order of the calls."""
        return values if self.others is None else values + self.others.pop(0).to(values.dtype)


def case(counts=COUNTS, good=GOOD, seed=0, scale=2.0):
    """A batch, its policy log-probs, and a scorer for its mismatched sequences."""
    g = torch.Generator().manual_seed(seed)
    policy, reference, first, second = (-scale * torch.rand(sum(counts), generator=g) for _ in range(4))
    sequences = Sequences.from_lists([[1]] * len(counts), [[2] * n for n in counts])
    turned = [*counts[1:], counts[0]]
    mismatched = Sequences.from_lists([[1]] * len(counts), [[2] * n for n in turned])
    batch = Labeled(
        sequences,
        desirable=torch.tensor(good),
        mismatched=mismatched if len(counts) > 1 else None,
        reference=reference,
    )
    return batch, policy, Given(first, second)


def kto(**values):
    return KTO(KTOConfig(**values))


def trained(algorithm, batch, policy, scorer):
    logps = policy.clone().requires_grad_()
    batch = algorithm.prepare(batch, scorer)
    terms = algorithm.loss(batch, Scores(logps)).terms
    assert set(terms) == set(algorithm.loss_per)
    loss = sum(t.sum() / algorithm.size(batch, by) for by, t in terms.items())
    loss.backward()
    return float(loss.detach()), logps.grad


def by_hand(batch, policy, scorer, kind="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """The definition, completion by completion in float64."""
    counts, logps = batch.sequences.counts.tolist(), policy.double().requires_grad_()
    kl = float((scorer.known["policy"].double() - scorer.known["reference"].double()).sum()) / len(counts)
    kl = max(0.0, kl) if kind == "kto" else 0.0
    terms = []
    for lp, base, good in zip(
        logps.split(counts), batch.reference.double().split(counts), batch.desirable.tolist(), strict=True
    ):
        r = lp.sum() - base.sum()
        x = beta * (r - kl) if good else beta * (kl - r)
        terms.append((desirable_weight if good else undesirable_weight) * (1 - 1 / (1 + (-x).exp())))
    loss = sum(terms) / len(terms)
    loss.backward()
    return float(loss.detach()), logps.grad.float()


def close(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))  # the KL estimate is above and below 0 among them
@pytest.mark.parametrize("values", [{}, {"beta": 0.8}, {"desirable_weight": 1.3, "undesirable_weight": 0.4}])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_loss_and_gradient_equal_the_definition(kind, values, seed):
    batch, policy, scorer = case(seed=seed)
    got = trained(kto(loss_type=kind, **values), batch, policy, scorer)
    close(got, by_hand(batch, policy, scorer, kind, **values))


@pytest.mark.parametrize("good", [[True] * 5, [False] * 5])
def test_labels_of_one_kind_alone(good):
    batch, policy, scorer = case(good=good)
    close(trained(kto(), batch, policy, scorer), by_hand(batch, policy, scorer))
    metrics = kto().loss(kto().prepare(batch, scorer), Scores(policy)).metrics
    assert len(metrics["rewards/chosen" if good[0] else "rewards/rejected"]) == 5
    assert len(metrics["rewards/rejected" if good[0] else "rewards/chosen"]) == 0
    assert "rewards/margins" not in metrics


def test_numbers_by_hand():
    # KL: gaps 3 and −1, mean 1. r: desirable 2, undesirable 2; β = 1:
    # 1 − σ(2 − 1) = 0.26894142 and 1 − σ(1 − 2) = 0.73105858; mean ½
    batch, _, _ = case([1, 1], [True, False])
    batch = replace(batch, reference=torch.tensor([-3.0, -3.0]))
    scorer = Given(torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -1.0]))
    algorithm = kto(beta=1.0)
    prepared = algorithm.prepare(batch, scorer)
    assert prepared.kl.tolist() == [1, 1] and prepared.metrics["kl"].tolist() == [1, 1]
    loss = algorithm.loss(prepared, Scores(torch.tensor([-1.0, -1.0], requires_grad=True)))
    torch.testing.assert_close(loss.terms["sequences"], torch.tensor([0.26894142, 0.73105858]))
    assert {name: values.tolist() for name, values in loss.metrics.items()} == {
        "rewards/chosen": [2.0],
        "rewards/rejected": [2.0],
        "rewards/accuracies": [1.0, 0.0],
        "logps/chosen": [-1.0],
        "logps/rejected": [-1.0],
        "rewards/margins": [4.0, -4.0],
    }
    assert not any(values.requires_grad for values in loss.metrics.values())


def test_the_margin_is_the_difference_of_the_means():
    batch, policy, scorer = case()
    algorithm = kto()
    metrics = algorithm.loss(algorithm.prepare(batch, scorer), Scores(policy)).metrics
    difference = metrics["rewards/chosen"].mean() - metrics["rewards/rejected"].mean()
    torch.testing.assert_close(metrics["rewards/margins"].mean(), difference)


def test_the_kl_is_a_mean_over_the_rows_of_all_processes():
    # here: gaps 3, 3 of 2 rows; elsewhere 4 rows with a sum of −3: 3/6
    batch, _, _ = case([1, 1], [True, False])
    others = [torch.tensor([2, 2]), torch.tensor([4.0, -3.0]), torch.tensor(0.0)]
    scorer = Given(torch.tensor([-1.0, -1.0]), torch.tensor([-4.0, -4.0]), others)
    assert kto().prepare(batch, scorer).kl.tolist() == [0.5, 0.5]


def test_the_kl_carries_no_gradient_and_is_never_below_0():
    batch, _, _ = case([1, 1], [True, False])
    low = Given(torch.tensor([-9.0, -9.0]), torch.tensor([-1.0, -1.0]))
    prepared = kto().prepare(batch, low)
    assert prepared.kl.tolist() == [0, 0] and not prepared.kl.requires_grad


def test_a_batch_of_one_says_that_its_kl_is_0():
    batch, _, scorer = case([2], [True])
    algorithm = kto()
    with pytest.warns(
        UserWarning, match="one row has no other row to estimate the KL on; it counts as 0"
    ) as told:
        prepared = algorithm.prepare(batch, scorer)
        algorithm.prepare(batch, scorer)
    assert len(told) == 1 and prepared.kl.tolist() == [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kto(loss_type="apo_zero_unpaired").prepare(batch, scorer)


def balance_told(counts, **values):
    """What is said of a batch with these counts of desirable and undesirable rows."""
    good = [True] * counts[0] + [False] * counts[1]
    batch, _, scorer = case([1] * len(good), good)
    algorithm = kto(**values)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepared = algorithm.prepare(batch, scorer)
        algorithm.prepare(batch, scorer)
    return [str(warning.message) for warning in told], float(prepared.metrics["kto/balance"])


def test_lopsided_labels_are_told_once_with_the_weights_that_mend_it():
    told, ratio = balance_told((150, 50))
    assert len(told) == 1 and "150 desirable and 50 undesirable rows" in told[0]
    assert ratio == pytest.approx(150.5 / 50.5)
    assert "desirable_weight between 0.34 and 0.45" in told[0]  # 50.5 / 150.5 · (1 … 1.33)
    assert balance_told((150, 50), desirable_weight=0.4)[0] == []
    assert balance_told((150, 50), undesirable_weight=2.5)[0] == []
    assert len(balance_told((50, 150))[0]) == 1


def test_labels_of_one_kind_are_told():
    assert "Add rows of the kind that is missing" in balance_told((24, 0))[0][0]
    assert "Add rows of the kind that is missing" in balance_told((0, 24))[0][0]


@pytest.mark.parametrize("counts", [(2, 2), (3, 1), (1, 3), (100, 100), (120, 100)])
def test_balanced_labels_and_chance_are_no_reason_to_warn(counts):
    assert balance_told(counts)[0] == []


@pytest.mark.parametrize("sizes", [[1, 4], [2, 3], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_the_loss_does_not_depend_on_micro_batches(kind, sizes):
    batch, policy, scorer = case(seed=1)
    algorithm = kto(loss_type=kind, beta=0.5)
    whole = algorithm.prepare(batch, scorer)
    logps, loss = policy.clone().requires_grad_(), 0.0
    owners = torch.repeat_interleave(batch.sequences.counts)
    for rows in torch.arange(5).flip(0).split(sizes):
        tokens = torch.cat([(owners == row).nonzero()[:, 0] for row in rows])
        terms = algorithm.loss(whole.take(rows), Scores(logps[tokens])).terms["sequences"]
        part = terms.sum() / algorithm.size(whole, "sequences")
        part.backward()
        loss += float(part.detach())
    close((loss, logps.grad), trained(algorithm, batch, policy, scorer))


def test_empty_completions_stay_finite():
    batch, policy, scorer = case([0, 0, 0], [True, False, True])
    loss, gradient = trained(kto(), batch, policy, scorer)
    assert loss == 0.5 and gradient.shape == (0,)


def test_state_round_trip():
    algorithm, fresh = kto(), kto()
    batch, _, scorer = case([1] * 24, [True] * 24)
    with pytest.warns(UserWarning):
        algorithm.prepare(batch, scorer)
    fresh.load_state_dict(algorithm.state_dict())
    assert fresh.state_dict() == {"seen": [24, 0], "told": ["balance"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.prepare(batch, scorer)


def test_options():
    assert {name: option.default for name, option in options(KTOConfig).items()} == {
        "beta": 0.1,
        "loss_type": "kto",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }
    assert KTO.defaults["learning_rate"] == 1e-6 and kto().needs == {"reference", "mismatched"}
    for wrong in ({"beta": 0}, {"loss_type": "bco"}, {"desirable_weight": 0}, {"undesirable_weight": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(KTOConfig, wrong, owner="algorithm kto")


def test_the_first_step_by_hand():
    # policy = reference and no KL: every term ½; d/dr of 1 − σ(βr) is −β/4, over 2 sequences
    batch, _, scorer = case([2, 1], [True, False])
    same = Given(scorer.known["policy"], scorer.known["policy"])
    loss, gradient = trained(kto(beta=0.4), batch, batch.reference, same)
    assert loss == pytest.approx(0.5) and math.isclose(loss, 0.5, rel_tol=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([-0.05, -0.05, 0.05]))
