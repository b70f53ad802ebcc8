"""ORPO against its formula in plain float64, and numbers derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlx.algorithms.orpo import ORPO, ORPOConfig
from rlx.core.batch import Pairs, Scores, Sequences
from rlx.core.errors import ConfigError
from rlx.core.options import build, options

PROMPTS, COUNTS = [2, 2, 1, 1, 4, 4], [3, 1, 2, 2, 1, 4]


def pairs(prompts=PROMPTS, counts=COUNTS):
    return Pairs(Sequences.from_lists([[1] * n for n in prompts], [[2] * n for n in counts]))


def loss_of(algorithm, batch, logps, whole=None):
    """The loss as the loop takes it; batch is prepared."""
    terms = algorithm.loss(batch, Scores(logps)).terms
    assert set(terms) == set(algorithm.loss_per)
    return sum(t.sum() / algorithm.size(whole or batch, by).clamp(min=1) for by, t in terms.items())


def given_logps(batch, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(int(batch.sequences.scored.sum()), generator=g)


def trained(algorithm, batch, policy):
    logps = policy.clone().requires_grad_()
    loss = loss_of(algorithm, batch, logps)
    loss.backward()
    return float(loss.detach()), logps.grad


def orpo(**values):
    return ORPO(ORPOConfig(**values))


def by_hand(policy, prompts, counts, beta, nll_on):
    """The definition in float64; tokens of a chosen text begin with its prompt, the first one left out."""
    logps = policy.double().requires_grad_()
    lengths = [
        n + (p - 1 if i % 2 == 0 and nll_on == "prompt_and_completion" else 0)
        for i, (p, n) in enumerate(zip(prompts, counts, strict=True))
    ]
    parts = logps.split(lengths)
    nll, odds = [], []
    for i in range(0, len(parts), 2):
        nll += [-x for x in parts[i]]
        if counts[i] and counts[i + 1]:
            p, q = (
                part[len(part) - n :].mean().exp()
                for part, n in zip(parts[i : i + 2], counts[i : i + 2], strict=True)
            )
            ratio = (p / (1 - p)) / (q / (1 - q))
            odds.append(-beta * (1 / (1 + 1 / ratio)).log())
    loss = sum(nll) / max(len(nll), 1) + sum(odds) / (len(counts) // 2)
    loss.backward()
    return float(loss.detach()), logps.grad.float()


def close(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize("nll_on", ["prompt_and_completion", "completion"])
def test_loss_and_gradient_equal_the_definition(nll_on, beta):
    algorithm = orpo(beta=beta, nll_on=nll_on)
    batch = algorithm.prepare(pairs(), None)
    policy = given_logps(batch)
    close(trained(algorithm, batch, policy), by_hand(policy, PROMPTS, COUNTS, beta, nll_on))


def test_the_prompt_of_the_chosen_text_is_imitated_too():
    # prompts of 3, completions of 1: the chosen text is scored from its 2nd token on, else the completion
    batch = pairs([3, 3], [1, 1])
    assert orpo().prepare(batch, None).sequences.scored.tolist() == [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert batch.sequences.scored.sum() == 2  # the batch itself is not written to
    assert orpo(nll_on="completion").prepare(batch, None) is batch


def test_numbers_by_hand():
    # mean log-probs log ½ and log ¼: odds 1 and ⅓, log odds ratio log 3, σ = ¾; nll (log 2 + log 2)/2
    algorithm = orpo(beta=0.5, nll_on="completion")
    batch, policy = pairs([1, 1], [2, 1]), torch.tensor([0.5, 0.5, 0.25]).log()
    loss = algorithm.loss(batch, Scores(policy))
    assert float(loss_of(algorithm, batch, policy)) == pytest.approx(math.log(2) - 0.5 * math.log(0.75))
    assert {name: pytest.approx(values.tolist(), rel=1e-5) for name, values in loss.metrics.items()} == {
        "rewards/chosen": [0.5 * math.log(0.5)],
        "rewards/rejected": [0.5 * math.log(0.25)],
        "rewards/margins": [0.5 * math.log(2)],
        "rewards/accuracies": [1.0],
        "logps/chosen": [math.log(0.5)],
        "logps/rejected": [math.log(0.25)],
        "loss/nll": [math.log(2), math.log(2)],
        "loss/odds_ratio": [-0.5 * math.log(0.75)],
        "log_odds": [math.log(3)],
    }


def test_equal_sides_have_no_odds():
    algorithm = orpo(beta=2.0, nll_on="completion")
    batch, policy = pairs([1, 1], [2, 2]), torch.tensor([-0.3, -0.7, -0.3, -0.7])
    assert trained(algorithm, batch, policy)[0] == pytest.approx(0.5 + 2 * math.log(2))


@pytest.mark.parametrize("sure", [0.0, -1e-12, -1e-7, -1e-4])
@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
def test_probabilities_near_one_stay_finite(side, sure):
    batch, policy = pairs([1, 1], [2, 2]), torch.tensor([-1.0, -1.0, -1.0, -1.0])
    policy[:2] = sure if side != "rejected" else -1.0
    policy[2:] = sure if side != "chosen" else -1.0
    loss, gradient = trained(orpo(), batch, policy)
    assert math.isfinite(loss) and bool(gradient.isfinite().all())
    if side == "rejected" and sure < -1e-6:
        close((loss, gradient), by_hand(policy, [1, 1], [2, 2], 0.1, "completion"))


def test_an_empty_completion_adds_nothing_to_the_odds():
    for counts in ([3, 0, 2, 2], [0, 3, 2, 2], [0, 0, 2, 2], [0, 0, 0, 0]):
        prompts = [2, 2, 1, 1]
        algorithm = orpo()
        batch = algorithm.prepare(pairs(prompts, counts), None)
        policy = given_logps(batch)
        close(
            trained(algorithm, batch, policy), by_hand(policy, prompts, counts, 0.1, "prompt_and_completion")
        )


@pytest.mark.parametrize("nll_on", ["prompt_and_completion", "completion"])
@pytest.mark.parametrize("sizes", [[1, 2], [2, 1], [1, 1, 1]])
def test_the_loss_does_not_depend_on_micro_batches(nll_on, sizes):
    algorithm = orpo(nll_on=nll_on, beta=0.7)
    batch = algorithm.prepare(pairs(), None)
    policy = given_logps(batch)
    logps, loss = policy.clone().requires_grad_(), 0.0
    owners = torch.repeat_interleave(batch.sequences.counts) // 2
    for rows in torch.arange(3).flip(0).split(sizes):
        tokens = torch.cat([(owners == row).nonzero()[:, 0] for row in rows])
        part = loss_of(algorithm, batch.take(rows), logps[tokens], batch)
        part.backward()
        loss += float(part.detach())
    close((loss, logps.grad), trained(algorithm, batch, policy))


def test_options():
    assert {name: option.default for name, option in options(ORPOConfig).items()} == {
        "beta": 0.1,
        "nll_on": "prompt_and_completion",
    }
    assert ORPO.defaults["learning_rate"] == 1e-6 and orpo().needs == frozenset()
    for wrong in ({"beta": -1}, {"nll_on": "prompt"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(ORPOConfig, wrong, owner="algorithm orpo")
