"""cosine_length: right and wrong completions are worth more or less with their length, along a cosine."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Failed, Reward, Rewarded


class CosineLength(Reward):
    """Worth ``*_short`` at 0 tokens, ``*_long`` near ``longest``, half a cosine between; then ``exceeded``.

    For L tokens: ``long + (short - long) * (1 + cos(pi * L / longest)) / 2``, with the values for right
    or for wrong completions. Which are right is said by another reward, ``correct``, with its default
    options, by a score above ``threshold``; where that one does not apply, neither does this one. It need
    not be a reward of the run: list it too, with weight 0, to see it logged.

    Source: Demystifying Long Chain-of-Thought Reasoning in LLMs (arXiv:2502.03373), cosine reward; the values
    are not the paper's.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of cosine_length."""

        longest: int = opt(doc="length from which a completion is worth ``exceeded``", gt=0, unit="tokens")
        correct: str = opt("exact_match", "reward that tells right from wrong: a name or reference")
        threshold: float = opt(0.5, "a completion is right where that reward is above it")
        right_short: float = opt(1.0, "worth of a right completion of no tokens")
        right_long: float = opt(0.5, "worth of a right completion just below the longest")
        wrong_short: float = opt(-1.0, "worth of a wrong completion of no tokens")
        wrong_long: float = opt(-0.5, "worth of a wrong completion just below the longest")
        exceeded: float = opt(-1.0, "worth of a completion of the longest length or more, right or wrong")

    def __init__(self, config: Config) -> None:
        from rlx.core.reward_call import Signature
        from rlx.plugins import references

        super().__init__(config)
        self._correct: Any = references.make("reward", config.correct, {})
        if isinstance(self._correct, CosineLength) or getattr(self._correct, "needs_policy", False):
            raise ConfigError(
                "reward 'cosine_length' cannot ask this reward what is right",
                code="E-CONFIG-VALUE",
                got=config.correct,
                expected="a reward that scores by itself, such as exact_match or accuracy",
            )
        self._signature = Signature.of(self._correct, config.correct)
        self.columns = self._signature.needed

    def __call__(  # type: ignore[override]  # run_step is among the base's columns
        self, *, completion_ids: list[list[int]], run_step: int | None = None, **columns: list[Any]
    ) -> Any:
        """One score a completion; awaitable where the reward that tells right from wrong is async."""
        given = {"completion_ids": completion_ids, "run_step": run_step, **columns}
        lengths = [len(ids) for ids in completion_ids]
        told = self._correct(
            **{name: values for name, values in given.items() if self._signature.takes(name)}
        )
        return self._later(told, lengths) if inspect.isawaitable(told) else self._scores(told, lengths)

    async def _later(self, told: Awaitable[Any], lengths: list[int]) -> Any:
        return self._scores(await told, lengths)

    def _scores(self, told: Any, lengths: list[int]) -> Any:
        if isinstance(told, Rewarded):  # what else it told is told on
            return replace(told, values=self._scores(told.values, lengths))
        return [self._score(item, length) for item, length in zip(told, lengths, strict=True)]

    def _score(self, item: Any, length: int) -> float | Failed | None:
        if item is None or isinstance(item, Failed):
            return item
        value, config = float(item), self.config
        if math.isnan(value):
            raise ValueError(f"{config.correct} returned nan")
        if length >= config.longest:
            return float(config.exceeded)
        right = value > config.threshold
        short = config.right_short if right else config.wrong_short
        long = config.right_long if right else config.wrong_long
        return float(long + (short - long) * (1 + math.cos(math.pi * length / config.longest)) / 2)

    def state_dict(self) -> dict[str, Any]:
        """What the reward that tells right from wrong remembers."""
        return self._correct.state_dict() if hasattr(self._correct, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        if hasattr(self._correct, "load_state_dict"):
            self._correct.load_state_dict(state)

    def close(self) -> None:
        """Let the other reward give back what it holds."""
        if hasattr(self._correct, "close"):
            self._correct.close()
