"""length and overlong: rewards for how many tokens a completion has, the stop token included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Reward


class Length(Reward):
    """0 at the target length, ``penalty`` less for each token away from it, never below ``lowest``."""

    @dataclass(frozen=True)
    class Config:
        """Options of length."""

        target: int = opt(50, "length that costs nothing", ge=0, unit="tokens")
        penalty: float = opt(0.02, "taken off for each token away from the target", ge=0, unit="1/token")
        side: str = opt(
            "both",
            "which lengths cost: over the target, under it, or both",
            choices=("both", "over", "under"),
        )
        lowest: float = opt(-1.0, "the score never falls below this", le=0)

    def __call__(self, *, completion_ids: list[list[int]], **columns: list[Any]) -> list[float]:
        """One score a completion, in [lowest, 0]."""
        return [self._score(len(ids)) for ids in completion_ids]

    def _score(self, length: int) -> float:
        away = length - self.config.target
        if (self.config.side == "over" and away < 0) or (self.config.side == "under" and away > 0):
            away = 0
        return max(self.config.lowest, -self.config.penalty * abs(away)) if away else 0.0


class Overlong(Reward):
    """Soft overlong punishment: 0 up to ``longest - cache`` tokens, then linearly down to -1 at ``longest``.

    For L tokens between the two: ``((longest - cache) - L) / cache``; beyond ``longest``: -1.

    Source: DAPO (arXiv:2503.14476), equation 13.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of overlong."""

        longest: int = opt(doc="length from which the full punishment holds", gt=0, unit="tokens")
        cache: int = opt(doc="length of the ramp before it", gt=0, unit="tokens")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.cache > config.longest:
            raise ConfigError(
                "the ramp of reward 'overlong' is longer than the longest completion",
                code="E-CONFIG-CONFLICT",
                got=f"cache {config.cache}, longest {config.longest}",
                expected="cache <= longest",
            )

    def __call__(self, *, completion_ids: list[list[int]], **columns: list[Any]) -> list[float]:
        """One score a completion, in [-1, 0]."""
        ramp = self.config.longest - self.config.cache
        return [min(0.0, max(-1.0, (ramp - len(ids)) / self.config.cache)) for ids in completion_ids]
