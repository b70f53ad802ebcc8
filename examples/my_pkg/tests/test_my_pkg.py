"""What MyReward says of answers right, near, far and absent."""

from __future__ import annotations

import pytest
from my_pkg import MyReward


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
