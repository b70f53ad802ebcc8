"""Group relative policy optimisation, with DAPO, Dr. GRPO, GSPO and CISPO as options.

The advantage of a completion is its reward against those of the other completions of the same prompt; every
token of the completion has it. There is no value function.

Sources: GRPO arXiv:2402.03300; DAPO arXiv:2503.14476; Dr. GRPO arXiv:2503.20783; GSPO arXiv:2507.18071;
CISPO arXiv:2506.13585; two-sided clipping (delta) arXiv:2505.07291; high-entropy tokens arXiv:2506.01939;
off-policy mask and corrected KL arXiv:2512.02556; normalize_then_sum arXiv:2601.05242.
Unlike TRL 1.16, cispo asks for epsilon_high; entropies that choose tokens are taken before the update; a
group is found by its number, not by its place.

Run it: ``rlx run --algo grpo --reward exact_match``
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rlx.core.batch import Loss, Rollouts, Scores
from rlx.core.errors import ConfigError
from rlx.core.functional import gather_rows, kl_estimate, quantile, segment_mean, segment_sum, spread
from rlx.core.options import opt
from rlx.core.policy_gradient import capped_loss, clipped_loss, group_advantages, joint_advantages
from rlx.plugins.contract import Algorithm, Scorer

LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo")
LEVELS, SCALES = ("token", "sequence"), ("group", "batch", "none")
PAPER, DAPO, DR = "arXiv:2402.03300", "arXiv:2503.14476", "arXiv:2503.20783"
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


@dataclass(frozen=True)
class GRPOConfig:
    """Options of GRPO."""

    num_generations: int = opt(8, "completions sampled of each prompt", ge=2, source=PAPER)
    num_iterations: int = opt(1, "passes over the completions of one batch", gt=0)
    num_mini_batches: int = opt(1, "optimizer steps of one pass", gt=0)
    beta: float = opt(0.0, "weight of the KL in the loss; 0 needs no reference", ge=0, source=PAPER)
    use_bias_correction_kl: bool = opt(True, "multiply the KL by the ratio", source="arXiv:2512.02556")
    epsilon: float = opt(0.2, "clip range of the ratio below 1", gt=0, source="arXiv:1707.06347")
    epsilon_high: float | None = opt(
        None,
        "clip range above 1 (none: epsilon); with cispo the largest ratio",
        gt=0,
        source=DAPO,
    )
    delta: float | None = opt(None, "largest ratio of a bad completion", gt=1, source="arXiv:2505.07291")
    loss_type: str = opt(
        "dapo",
        "how terms of tokens are put together",
        choices=LOSSES,
        source=f"{PAPER}; dapo {DAPO}; dr_grpo {DR}; cispo arXiv:2506.13585",
    )
    importance_sampling_level: str = opt(
        "token", "one ratio a token, or a sequence (GSPO)", choices=LEVELS, source="arXiv:2507.18071"
    )
    scale_rewards: str = opt(
        "group", "divide advantages by a deviation of rewards", choices=SCALES, source=f"{PAPER}; none {DR}"
    )
    multi_objective_aggregation: str = opt(
        "sum_then_normalize", "of several rewards", choices=AGGREGATIONS, source="arXiv:2601.05242"
    )
    mask_truncated_completions: bool = opt(False, "learn nothing from cut completions", source=DAPO)
    top_entropy_quantile: float = opt(
        1.0, "share of tokens, by entropy, that are learned from", gt=0, le=1, source="arXiv:2506.01939"
    )
    entropy_coef: float = opt(0.0, "weight of the entropy bonus", ge=0)
    off_policy_mask_threshold: float | None = opt(
        None,
        "mean KL(old‖new) a token above which a bad completion is passed over",
        ge=0,
        unit="nats",
        source="arXiv:2512.02556",
    )

    def __post_init__(self) -> None:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ConfigError(
                "loss_type cispo needs epsilon_high, the largest ratio",
                code="E-CONFIG-CONFLICT",
                got="epsilon_high: none",
                hint="set epsilon_high: 5.0, the value of its authors",
            )
        if self.loss_type == "cispo" and self.delta is not None:
            warnings.warn(
                "delta has no effect on loss_type cispo, where epsilon_high caps ratios", stacklevel=3
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            text = f"scale_rewards {self.scale_rewards} has no effect on normalize_then_sum"
            warnings.warn(f"{text}, which scales in groups and then over the batch", stacklevel=3)


class GRPO(Algorithm):
    """Group relative policy optimisation."""

    Config = GRPOConfig
    eats = "prompts"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-6}

    def __init__(self, config: GRPOConfig) -> None:
        super().__init__(config)
        self.completions_per_prompt = config.num_generations
        self.epochs, self.mini_batches = config.num_iterations, config.num_mini_batches
        self.needs = frozenset({"reference"} if config.beta else set()) | (
            {"entropy"} if config.entropy_coef else set()
        )
        self.by = "sequences" if config.loss_type in ("grpo", "dr_grpo") else "tokens"
        self.loss_per = (self.by, *(("bonus_tokens",) if config.entropy_coef else ()))
        self.high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.threshold = -math.inf  # entropy of a token from which on it is learned from, in this batch
        self.longest = 0  # tokens of the longest completion that sampling allows

    def prepare(self, batch: Rollouts, score: Scorer) -> Rollouts:
        """The advantage of each completion, repeated for its tokens; 0 for an unscorable one."""
        self.longest = score.max_completion_length
        advantages = self.advantages(batch, score).nan_to_num()
        if self.config.top_entropy_quantile < 1:
            entropy = score(batch.sequences, "policy", needs={"entropy"}).entropy
            seen, _ = gather_rows(entropy[self.mask(batch)], score.total)
            self.threshold = quantile(seen, 1 - self.config.top_entropy_quantile)
            batch = replace(batch, entropy=entropy)
        metrics = {"advantages/zero": (advantages == 0).float()}
        return replace(batch, advantages=spread(advantages, batch.sequences.counts), metrics=metrics)

    def advantages(self, batch: Rollouts, score: Scorer) -> torch.Tensor:
        """(N,) float32, rewards against those of the group or of the batch; NaN for an unscorable one."""
        c, groups = self.config, batch.sequences.groups
        if c.multi_objective_aggregation == "sum_then_normalize":
            return group_advantages(batch.total_score, groups, c.scale_rewards, score.total)
        rewards = torch.stack(list(batch.rewards.values()), dim=1)
        weights = torch.tensor([score.reward_weights[name] for name in batch.rewards], device=rewards.device)
        return joint_advantages(rewards, weights, groups, score.total)

    def mask(self, batch: Rollouts) -> torch.Tensor:
        """(S,) bool, tokens that count at all: not those of cut completions, if they are masked."""
        if self.config.mask_truncated_completions:
            return spread(batch.finished, batch.sequences.counts)
        return torch.ones_like(batch.old, dtype=torch.bool)

    def chosen(self, batch: Rollouts) -> torch.Tensor:
        """(S,) bool, tokens that policy loss and entropy bonus act on."""
        mask = self.mask(batch)
        return mask if self.config.top_entropy_quantile == 1 else mask & (batch.entropy >= self.threshold)

    def size(self, batch: Any, by: str) -> torch.Tensor:
        """Beside the usual counts, ``bonus_tokens``; ``tokens`` are those that count."""
        flags = {"tokens": self.mask, "bonus_tokens": self.chosen}
        count: torch.Tensor = flags[by](batch).sum().double() if by in flags else batch.size(by)
        return count

    def idle(self, batch: Rollouts) -> torch.Tensor:
        """Completions on none of whose tokens KL, entropy bonus or an advantage other than 0 acts."""
        acts = self.mask(batch) if self.config.beta else self.chosen(batch)
        if not self.config.beta and not self.config.entropy_coef:
            acts = acts & (batch.advantages != 0)
        return segment_sum(acts.long(), batch.sequences.counts) == 0

    def loss(self, batch: Rollouts, now: Scores) -> Loss:
        """Clipped policy loss and KL of each token, put together as ``loss_type`` says; entropy bonus."""
        c, counts, mask, chosen = self.config, batch.sequences.counts, self.mask(batch), self.chosen(batch)
        log_ratio = now.logps - batch.old
        if c.importance_sampling_level == "sequence":
            log_ratio = spread(segment_mean(log_ratio, counts), counts)
        ratio = log_ratio.exp()
        if c.loss_type == "cispo":
            policy, cut = capped_loss(ratio, batch.advantages, now.logps, most=self.high)
        else:
            policy, cut = clipped_loss(ratio, batch.advantages, low=c.epsilon, high=self.high, most=c.delta)
        if c.off_policy_mask_threshold is not None:
            drift = spread(segment_mean(batch.old - now.logps.detach(), counts), counts)
            policy = policy * ((batch.advantages >= 0) | (drift <= c.off_policy_mask_threshold))
        terms = policy * chosen
        entropy = -batch.old if now.entropy is None else now.entropy  # what was sampled, on average
        acting, counted = chosen.nonzero()[:, 0], mask.nonzero()[:, 0]
        metrics = {
            "loss/policy": policy[acting],
            "entropy": entropy[counted],
            "policy/ratio": ratio[counted],
            "policy/approx_kl": (ratio - 1 - log_ratio)[counted],
            "policy/clip_fraction": cut[acting].float(),
        }
        if c.beta:
            kl = kl_estimate(now.logps, batch.reference, "k3")
            metrics["kl"] = kl[counted]
            terms = terms + c.beta * mask * (kl * ratio if c.use_bias_correction_kl else kl)
        if c.loss_type == "grpo":
            terms = segment_mean(terms, counts)
        elif c.loss_type == "dr_grpo":
            terms = terms / self.longest
        bonus = {"bonus_tokens": -c.entropy_coef * entropy[acting]} if c.entropy_coef else {}
        return Loss({self.by: terms, **bonus}, metrics)
