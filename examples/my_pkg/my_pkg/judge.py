"""A judge of one's own: the completion whose number is nearer to the right one is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import rlx
from my_pkg import last_number


class Closer:
    """Compares the distances to the row's answer; a completion without a number is the furthest away."""

    columns = ("answer",)

    @dataclass(frozen=True)
    class Config:
        """Options of Closer: ``--judge my_pkg.judge:Closer`` and ``--Closer.margin 1``."""

        margin: float = rlx.opt(0.0, "a lead that is not larger gives no verdict", ge=0)

    def __init__(self, config: Config) -> None:
        self.config = config

    def judge(
        self, prompts: list[Any], pairs: list[tuple[str, str]], *, answer: list[Any]
    ) -> list[int | None]:
        """0 or 1 for the nearer of each pair; None for a tie, and where the row has no answer."""
        return [self.verdict(pair, right) for pair, right in zip(pairs, answer, strict=True)]

    def verdict(self, pair: tuple[str, str], answer: Any) -> int | None:
        """The verdict on one pair."""
        right = last_number(str(answer).rpartition("####")[2])
        if right is None:
            return None
        numbers = [last_number(text) for text in pair]
        first, second = (float("inf") if number is None else abs(number - right) for number in numbers)
        if first == second or abs(first - second) <= self.config.margin:
            return None
        return int(second < first)
