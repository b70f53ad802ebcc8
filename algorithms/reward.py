"""Reward model: a classifier that scores the chosen answer above the rejected one (Bradley–Terry).

The policy is a sequence classifier with one label; the run folder then holds a model that serves as a reward.

Sources: arXiv:2203.02155, equation 1; the margin arXiv:2307.09288, equation 2; centring arXiv:2312.09244.

Run it: ``rlx run --algo reward --dataset pairs.jsonl``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlx.core.batch import Loss, Pairs, Scores
from rlx.core.options import opt
from rlx.core.preference import comparison_metrics, reward_loss, sides
from rlx.plugins.contract import Algorithm


@dataclass(frozen=True)
class RewardModelConfig:
    """Options of reward modelling."""

    center_rewards_coefficient: float | None = opt(
        None, "pull of the rewards of a pair towards mean 0", gt=0, source="arXiv:2312.09244, section 2"
    )


class RewardModel(Algorithm):
    """Learns rewards from preference pairs."""

    Config = RewardModelConfig
    eats = "pairs"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-4}
    needs = frozenset({"reward"})
    loss_per = ("rows",)

    def loss(self, batch: Pairs, now: Scores) -> Loss:
        """−log σ(chosen − rejected − margin) + coefficient·(chosen + rejected)², a term a pair."""
        chosen, rejected = sides(now.reward)
        margin = 0.0 if batch.margin is None else batch.margin
        terms = reward_loss(chosen, rejected, margin, centering=self.config.center_rewards_coefficient)
        scores = now.reward.detach()
        metrics = comparison_metrics(chosen, rejected) | {"reward/mean": scores}
        # Of each pair, not of the batch: extremes of micro-batches would depend on how the batch is cut.
        metrics["reward/min"], metrics["reward/max"] = scores.view(-1, 2).aminmax(dim=1)
        return Loss({"rows": terms}, metrics)
