"""What the reward and the judge say of answers right, near, far and absent; the cases of rlx's own kit."""

from __future__ import annotations

import pytest
from my_pkg import MyReward
from my_pkg.judge import Closer

from rlx.testing import conformance


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("34 - 15 = 19. Answer: 19", "34 - 15 = 19\n#### 19", 1.0),
        ("#### 1,080", 1080, 1.0),
        ("Answer: 29", "19", 0.25),  # 10 away: one half-life, so half of partial = 0.5
        ("Answer: -1", "19", 0.125),  # 20 away: two half-lives
        ("I do not know", "19", 0.0),
        ("", "19", 0.0),
        ("Answer: 19", None, None),
    ],
)
def test_score_falls_with_the_distance(completion: str, answer: object, score: float | None) -> None:
    """By hand: partial 0.5, half-life 10."""
    reward = MyReward(MyReward.Config())
    assert reward(completions=[completion], answer=[answer]) == [score]


def test_partial_0_makes_it_an_exact_match() -> None:
    """Nothing is left for a wrong number, however near."""
    reward = MyReward(MyReward.Config(partial=0.0))
    assert reward(completions=["18", "19"], answer=["#### 19", "#### 19"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("pair", "answer", "verdict"),
    [
        (("Answer: 18", "Answer: 19"), "#### 18", 0),
        (("Answer: 25", "Answer: 19"), "#### 18", 1),
        (("Answer: 17", "Answer: 19"), "#### 18", None),  # both 1 away
        (("I do not know", "Answer: 99"), "#### 18", 1),
        (("I do not know", ""), "#### 18", None),
        (("Answer: 18", "Answer: 19"), None, None),
    ],
)
def test_the_nearer_one_wins(pair: tuple[str, str], answer: object, verdict: int | None) -> None:
    """In either order."""
    judge = Closer(Closer.Config())
    assert judge.judge(["?"], [pair], answer=[answer]) == [verdict]
    swapped = None if verdict is None else 1 - verdict
    assert judge.judge(["?"], [(pair[1], pair[0])], answer=[answer]) == [swapped]


def test_a_lead_within_the_margin_is_none() -> None:
    """By hand: 1 and 3 away, so a lead of 2."""
    pair = ("Answer: 19", "Answer: 15")
    for margin, verdict in ((1.9, 0), (2.0, None)):
        assert Closer(Closer.Config(margin=margin)).judge(["?"], [pair], answer=[18]) == [verdict]


ROWS = [{"prompt": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(8)]
test_reward = conformance(MyReward, rows=ROWS)
test_judge = conformance(Closer, "judge", rows=ROWS)
