"""Self-play preference optimisation: a completion becomes as likely as its win rate against the others says.

The log-ratio of a completion is pulled to eta · (win rate − ½). A judge says who wins, or else the reward.

Source: SPPO arXiv:2405.00675. Here a completion is not compared with itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

import rlx


class SPPO(rlx.Algorithm):
    """Regression of the log-ratio on the win rate."""

    @dataclass(frozen=True)
    class Config:
        """Options of sppo."""

        num_generations: int = rlx.opt(4, "completions of each prompt, compared with each other", ge=2)
        eta: float = rlx.opt(2.0, "log-ratio between a sure win and a sure loss", gt=0, unit="nats")
        num_mini_batches: int = rlx.opt(2, "optimizer steps a batch", gt=0)

    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-7, "lr_scheduler_type": "constant"}
    loss_per = ("sequences",)
    judged = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.completions_per_prompt, self.mini_batches = config.num_generations, config.num_mini_batches

    def prepare(self, batch: rlx.Rollouts, score: Any) -> rlx.Rollouts:
        """Each token's share of its completion's win rate − ½; those without a comparison are left out."""
        wins = batch.wins
        if wins is None:
            wins = win_rates(batch.total_score, batch.sequences.groups)
        compared = (~wins.isnan()).nonzero()[:, 0]
        batch, counts = batch.take(compared), batch.sequences.counts[compared]
        shares = (wins[compared] - 0.5) / counts.clamp(min=1)
        return replace(batch, advantages=shares.repeat_interleave(counts))

    def loss(self, batch: rlx.Rollouts, now: rlx.Scores) -> rlx.Loss:
        """(log-ratio − eta · (win rate − ½))², a term a completion."""
        log_ratios, counts = now.logps - batch.old, batch.sequences.counts
        gaps = log_ratios - self.config.eta * batch.advantages
        summed = gaps.new_zeros(len(counts)).index_add(0, torch.repeat_interleave(counts), gaps)
        return rlx.Loss({"sequences": summed.square()}, {"policy/ratio": log_ratios.detach().exp()})


def win_rates(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(N,) share of the others of its group that each reward beats, a tie counts half; NaN without others."""
    others = ((groups[:, None] == groups) & ~rewards.isnan()).fill_diagonal_(False)
    beats = (rewards[:, None] > rewards).float() + 0.5 * (rewards[:, None] == rewards)
    return ((beats * others).sum(1) / others.sum(1)).where(~rewards.isnan(), torch.nan)
