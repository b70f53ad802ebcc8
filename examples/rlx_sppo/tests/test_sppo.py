"""Values worked out by hand, and the cases of rlx's own kit."""

import torch
from rlx_sppo.balance import Balance
from rlx_sppo.sppo import SPPO, win_rates
from rlx_sppo.winners import Winners

import rlx
from rlx.testing import conformance

test_sppo = conformance(SPPO)
test_winners = conformance(Winners)
test_balance = conformance(
    Balance,
    options={"column": "family"},
    rows=[{"prompt": f"{n}?", "family": "odd" if n % 2 else "even"} for n in range(8)],
)


def test_win_rates_within_a_group() -> None:
    """By hand. 2 beats 1 and 0; two are equal; one has nobody to compare with; a NaN says nothing."""
    rewards = torch.tensor([2.0, 1.0, 0.0, 5.0, 5.0, 7.0, 3.0, torch.nan])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    rates = win_rates(rewards, groups)
    assert rates[:5].tolist() == [1.0, 0.5, 0.0, 0.5, 0.5]
    assert rates[5:].isnan().all()


def test_the_loss_pulls_the_log_ratio_to_the_win_rate() -> None:
    """By hand, eta 2: the winner's target is 2 · ½ = 1, the loser's −1; log-ratios 0.5 and 0."""
    sequences = rlx.Sequences.from_lists([[1], [1]], [[5, 6], [7]], [0, 0])
    batch = rlx.Rollouts(sequences, score=torch.tensor([1.0, 0.0]), old=torch.tensor([-1.0, -1.0, -1.0]))
    algorithm = SPPO(SPPO.Config(eta=2.0))
    batch = algorithm.prepare(batch, None)
    assert batch.advantages.tolist() == [0.25, 0.25, -0.5]
    logps = torch.tensor([-1.0, -0.5, -1.0], requires_grad=True)
    terms = algorithm.loss(batch, rlx.Scores(logps)).terms["sequences"]
    assert terms.tolist() == [0.25, 1.0]  # (0.5 − 1)², (0 + 1)²
    terms.sum().backward()
    assert logps.grad.tolist() == [-1.0, -1.0, 2.0]  # 2 · (0.5 − 1) at both tokens, 2 · (0 + 1)


def test_what_a_judge_says_goes_before_the_reward() -> None:
    """The one without a verdict is left out."""
    sequences = rlx.Sequences.from_lists([[1], [1]], [[5], [7]], [0, 0])
    batch = rlx.Rollouts(
        sequences, score=torch.tensor([1.0, 0.0]), old=torch.zeros(2), wins=torch.tensor([0.25, torch.nan])
    )
    batch = SPPO(SPPO.Config()).prepare(batch, None)
    assert batch.advantages.tolist() == [-0.25]


def test_balance_keeps_as_many_of_each() -> None:
    """The rarest value occurs twice: the first two rows of each."""
    rows = [{"family": name, "n": n} for n, name in enumerate("aabaab")]
    kept = Balance(Balance.Config(column="family"))(rows, None)
    assert [row["n"] for row in kept] == [0, 1, 2, 5]
