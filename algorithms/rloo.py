"""REINFORCE leave-one-out: the baseline of a completion is the mean reward of the others of its prompt.

A whole completion is one action: one reward, from which the KL to the reference is subtracted, one advantage,
one ratio. There is no value function.

Sources: RLOO arXiv:2402.14740; the clip of the ratio arXiv:1707.06347.
Unlike TRL 1.16, old log-probs are always those taken when the completion was sampled, and a group is found by
its number, not by its place.

Run it: ``rlx run --algo rloo --reward exact_match``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rlx.core.batch import Loss, Rollouts, Scores
from rlx.core.errors import ConfigError
from rlx.core.functional import moments, segment_mean, segment_sum, spread
from rlx.core.options import opt
from rlx.core.policy_gradient import clipped_loss, leave_one_out
from rlx.plugins.contract import Algorithm, Scorer


@dataclass(frozen=True)
class RLOOConfig:
    """Options of RLOO."""

    num_generations: int = opt(2, "completions sampled of each prompt", ge=2, source="arXiv:2402.14740")
    num_iterations: int = opt(1, "passes over the completions of one batch", gt=0)
    num_mini_batches: int = opt(1, "optimizer steps of one pass", gt=0)
    beta: float = opt(
        0.05, "weight of the KL in the reward; 0 needs no reference", ge=0, source="arXiv:2402.14740"
    )
    epsilon: float = opt(0.2, "clip range of the ratio below 1", gt=0, source="arXiv:1707.06347, equation 7")
    epsilon_high: float | None = opt(
        None, "clip range above 1; none: epsilon", gt=0, source="arXiv:2503.14476"
    )
    normalize_advantages: bool = opt(False, "scale the batch's advantages to mean 0, deviation 1")
    reward_clip_range: tuple[float, ...] | None = opt(None, "lowest and highest reward, before the KL")
    missing_eos_penalty: float | None = opt(
        None, "subtracted from the reward of a cut completion", ge=0, source="arXiv:2403.17031"
    )

    def __post_init__(self) -> None:
        limits = self.reward_clip_range
        if limits is not None and (len(limits) != 2 or limits[0] >= limits[1]):
            raise ConfigError(
                "reward_clip_range is not a range",
                code="E-CONFIG-CONFLICT",
                got=f"reward_clip_range: {list(limits)}",
                hint="give the lowest and the highest reward, for example [-1, 1]",
            )


class RLOO(Algorithm):
    """REINFORCE leave-one-out."""

    Config = RLOOConfig
    eats = "prompts"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-6}
    loss_per = ("sequences",)

    def __init__(self, config: RLOOConfig) -> None:
        super().__init__(config)
        self.completions_per_prompt = config.num_generations
        self.epochs, self.mini_batches = config.num_iterations, config.num_mini_batches
        self.needs = frozenset({"reference"} if config.beta else ())
        self.high = config.epsilon if config.epsilon_high is None else config.epsilon_high

    def prepare(self, batch: Rollouts, score: Scorer) -> Rollouts:
        """The advantage of each completion, repeated for its tokens; 0 where nothing can be compared."""
        c, counts, metrics = self.config, batch.sequences.counts, {}
        rewards = batch.total_score
        if c.missing_eos_penalty is not None:
            rewards = rewards - c.missing_eos_penalty * (~batch.finished)
        if c.reward_clip_range is not None:
            rewards = rewards.clamp(*c.reward_clip_range)
        if c.beta:
            kl = batch.old - batch.reference
            metrics = {"kl": kl, "kl/sequence": segment_sum(kl, counts)}
            rewards = rewards - c.beta * metrics["kl/sequence"]
        advantages = leave_one_out(rewards, batch.sequences.groups)
        if c.normalize_advantages:
            _, mean, variance = moments(advantages[~advantages.isnan()], score.total)
            advantages = ((advantages - mean) / (variance.sqrt() + 1e-4)).float()
        metrics["advantages/zero"] = (advantages.nan_to_num() == 0).float()
        return replace(batch, advantages=spread(advantages.nan_to_num(), counts), metrics=metrics)

    def idle(self, batch: Rollouts) -> torch.Tensor:
        """Completions with advantage 0: their ratio is multiplied by it."""
        return segment_sum(batch.advantages.abs(), batch.sequences.counts) == 0

    def loss(self, batch: Rollouts, now: Scores) -> Loss:
        """−min(ratio·A, clamp(ratio)·A), a term a completion, with the ratio of the whole completion."""
        counts = batch.sequences.counts
        log_ratio = segment_sum(now.logps - batch.old, counts)
        ratio, advantages = log_ratio.exp(), segment_mean(batch.advantages, counts)
        policy, cut = clipped_loss(ratio, advantages, low=self.config.epsilon, high=self.high)
        metrics = {
            "loss/policy": policy,
            "entropy": -batch.old,  # what was sampled, on average
            "policy/ratio": ratio,
            "policy/approx_kl": ratio - 1 - log_ratio,
            "policy/clip_fraction": cut.float(),
        }
        return Loss({"sequences": policy}, metrics)
