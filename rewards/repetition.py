"""repetition: a penalty for saying the same words again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlx.core.options import opt
from rlx.plugins.contract import Reward


class Repetition(Reward):
    """``(1 - unique / total) * max_penalty`` over a completion's n-grams; 0 where it has none.

    Words are separated by white space and compared in lower case; ``by: tokens`` takes token ids instead.

    Source: Demystifying Long Chain-of-Thought Reasoning in LLMs (arXiv:2502.03373), repetition penalty.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of repetition."""

        n: int = opt(3, "words or tokens in an n-gram", ge=1)
        max_penalty: float = opt(-1.0, "what a completion approaches that only repeats itself", le=0)
        by: str = opt("words", "what n-grams are made of", choices=("words", "tokens"))

    def __call__(
        self, *, completions: list[str], completion_ids: list[list[int]], **columns: list[Any]
    ) -> list[float]:
        """One score a completion, in (max_penalty, 0]."""
        if self.config.by == "tokens":
            return [self._score(ids) for ids in completion_ids]
        return [self._score(text.lower().split()) for text in completions]

    def _score(self, items: list[str] | list[int]) -> float:
        total = len(items) - self.config.n + 1
        if total < 1:
            return 0.0
        unique = len({tuple(items[i : i + self.config.n]) for i in range(total)})
        return (1 - unique / total) * self.config.max_penalty if unique < total else 0.0
