"""PPO mends the packaged model's sloppiness with the default recipe, and a random reward does not."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest


def dice(completions: list[str]) -> list[float]:
    return [random.random() for _ in completions]


def before_and_after(folder: str, **options) -> tuple[float, float]:
    from rlx import run

    given = {"algo": "ppo", "progress": "none", "plots": False, "logging_steps": 45, "output_dir": folder}
    found = run(**{**given, **options}).metrics
    scores = [line["eval/reward/exact_match"] for line in found if "eval/reward/exact_match" in line]
    print(f"\n{folder.rpartition('/')[2]}: held-out exact_match {scores[0]:.3f} → {scores[-1]:.3f}")
    return scores[0], scores[-1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_reaches_nine_of_ten_held_out_answers(seed: int, tmp_path):
    before, after = before_and_after(str(tmp_path / f"seed-{seed}"), reward="exact_match", seed=seed)
    assert 0.3 < before < 0.5 and after >= 0.9


@pytest.mark.slow
def test_a_random_reward_teaches_nothing(tmp_path):
    rewards: list[str | Callable] = [dice, "exact_match"]
    options = {"reward": rewards, "reward_weight": [1.0, 0.0]}
    before, after = before_and_after(str(tmp_path / "random-reward"), **options)
    assert abs(after - before) <= 0.05
