"""random: a judge that does not read, for tests and as a lower bound.

The same seed, prompt and pair give the same verdict, in any batch and after any resume.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from rlx.core.options import opt


class RandomJudge:
    """Draws each verdict; with the default odds each side wins half of the pairs."""

    @dataclass(frozen=True)
    class Config:
        """Options of random."""

        first: float = opt(0.5, "probability that the completion shown first wins", ge=0, le=1)
        no_verdict: float = opt(0.0, "probability of no verdict", ge=0, le=1)
        seed: int = opt(0, "seed of the draws")

    def __init__(self, config: Config) -> None:
        self.config = config

    def judge(self, prompts: list[Any], pairs: list[tuple[str, str]]) -> list[int | None]:
        """One verdict a pair."""
        return [
            self._draw(f"{prompt}\0{one}\0{other}")
            for prompt, (one, other) in zip(prompts, pairs, strict=True)
        ]

    def _draw(self, text: str) -> int | None:
        draws = random.Random(f"{self.config.seed}\0{text}")
        if draws.random() < self.config.no_verdict:
            return None
        return int(draws.random() >= self.config.first)
