"""A reward of one's own: how close the number at the end of a completion is to the right one.

For rows as in GSM8K, whose column ``answer`` ends in ``#### 18``, or is the number itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import rlx

NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")


class MyReward(rlx.Reward):
    """1 for the right number, less the further away it is, 0 for none; None where the row has no answer."""

    columns = ("answer",)

    @dataclass(frozen=True)
    class Config:
        """Options of MyReward: ``--reward my_pkg:MyReward`` and ``--MyReward.partial 0.2``."""

        partial: float = rlx.opt(
            0.5, "score that a wrong number approaches when it is nearly right", ge=0, le=1
        )
        half_life: float = rlx.opt(10.0, "distance from the right number that halves the score", gt=0)

    def __call__(
        self, *, completions: list[str], answer: list[Any], **columns: list[Any]
    ) -> list[float | None]:
        """One score a completion."""
        return [self.score(text, right) for text, right in zip(completions, answer, strict=True)]

    def score(self, completion: str, answer: Any) -> float | None:
        """The score of one completion, from 0 to 1."""
        right = last_number(str(answer).rpartition("####")[2])
        if right is None:
            return None
        given = last_number(completion)
        if given is None:
            return 0.0
        return (
            1.0
            if given == right
            else self.config.partial * 0.5 ** (abs(given - right) / self.config.half_life)
        )


def last_number(text: str) -> float | None:
    """The last number in the last 200 characters of a text; commas between digits do not count."""
    found = NUMBER.findall(text[-200:])
    return float(found[-1].replace(",", "")) if found else None
