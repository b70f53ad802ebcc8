"""Proximal policy optimisation with a value function and a KL penalty in the reward.

Sample completions of each prompt; reward the last token, and every token by how far the policy moved from the
reference; estimate advantages (GAE); take several clipped steps on the same rollouts.

Sources: PPO arXiv:1707.06347; GAE arXiv:1506.02438; details of the language-model case arXiv:2403.17031.
Unlike TRL 1.12, the score lies on the last completion token, not one past it; every mini-batch is one
optimizer step; and a stop token counts as a finished completion.

Run it: ``rlx run --algo ppo --reward exact_match``
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rlx.core.batch import Loss, Rollouts, Scores
from rlx.core.errors import ConfigError
from rlx.core.functional import RunningMoments, gae, kl_estimate, last_token, moments, segment_sum, whiten
from rlx.core.options import opt
from rlx.core.policy_gradient import clipped_loss, value_loss
from rlx.plugins.contract import Algorithm, Scorer

KINDS_OF_KL = ("k1", "k2", "k3", "abs", "full")
SCALINGS = ("none", "std", "standardise")
N_PLUS, ADAPTIVE = "arXiv:2403.17031", "arXiv:1909.08593, section 2.2"
ESTIMATES = "http://joschu.net/blog/kl-approx.html"


@dataclass(frozen=True)
class PPOConfig:
    """Options of PPO."""

    num_ppo_epochs: int = opt(4, "passes over the rollouts of one batch", gt=0)
    num_mini_batches: int = opt(1, "optimizer steps of one pass", gt=0)
    num_generations: int = opt(1, "completions sampled of each prompt", gt=0, source=N_PLUS)
    kl_coef: float = opt(
        0.05, "weight of the KL penalty in the reward; 0 needs no reference", ge=0, source=N_PLUS
    )
    kl_estimator: str = opt("k1", "estimate of the KL at each token", choices=KINDS_OF_KL, source=ESTIMATES)
    kl_controller: str = opt(
        "fixed", "adaptive steers the KL to kl_target", choices=("fixed", "adaptive"), source=ADAPTIVE
    )
    kl_target: float = opt(6.0, "adaptive steers to it", gt=0, unit="nats a sequence", source=ADAPTIVE)
    kl_horizon: float = opt(
        10000, "rollouts over which adaptive acts", gt=0, unit="rollouts", source=ADAPTIVE
    )
    cliprange: float = opt(0.2, "clip range of the ratio", gt=0, source="arXiv:1707.06347, equation 7")
    cliprange_value: float = opt(0.2, "clip range of a value around its old one", gt=0, source=N_PLUS)
    vf_coef: float = opt(0.1, "weight of the value loss", ge=0, source=N_PLUS)
    entropy_coef: float = opt(0.0, "weight of the entropy bonus", ge=0, source="arXiv:1707.06347, equation 9")
    gamma: float = opt(1.0, "discount", gt=0, le=1, source="arXiv:1506.02438")
    lam: float = opt(0.95, "GAE: 0 one step, 1 Monte Carlo", ge=0, le=1, source="arXiv:1506.02438")
    whiten_rewards: bool = opt(False, "divide rewards by their deviation, mean kept", source=N_PLUS)
    whiten_advantages: bool = opt(True, "scale advantages to mean 0, variance 1", source=N_PLUS)
    score_scaling: str = opt(
        "none", "by running moments of the scores: std divides", choices=SCALINGS, source="arXiv:2307.04964"
    )
    score_clip: float | None = opt(None, "clip scores to ± this, after scaling", gt=0)
    missing_eos_penalty: float | None = opt(
        None, "subtracted from the score of a cut completion", ge=0, source=N_PLUS
    )
    stop_token: str = opt(
        "none", "truncate after this token: none, or eos", choices=("none", "eos"), source=N_PLUS
    )
    stop_token_id: int | None = opt(None, "truncate after this token", ge=0, source=N_PLUS)
    target_kl: float | None = opt(None, "end an update when KL(old‖new) passes 1.5 × this", gt=0, unit="nats")
    ratio_threshold: float = opt(10.0, "skip a mini-batch whose mean ratio is above", gt=1)

    def __post_init__(self) -> None:
        if self.stop_token == "eos" and self.stop_token_id is not None:
            raise ConfigError(
                "stop_token and stop_token_id are both set; a completion has one stop token",
                code="E-CONFIG-CONFLICT",
                got=f"stop_token: eos, stop_token_id: {self.stop_token_id}",
                hint="keep one of the two",
            )
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ConfigError(
                "kl_controller: adaptive multiplies kl_coef, and 0 stays 0",
                code="E-CONFIG-CONFLICT",
                got="kl_coef: 0",
                hint="give a kl_coef above 0, for example 0.05",
            )


class PPO(Algorithm):
    """Proximal policy optimisation."""

    Config = PPOConfig
    eats = "prompts"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 3e-6}

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.completions_per_prompt = config.num_generations
        self.epochs, self.mini_batches = config.num_ppo_epochs, config.num_mini_batches
        self.stop_token_ids = () if config.stop_token_id is None else (config.stop_token_id,)
        penalty = {"kl" if config.kl_estimator == "full" else "reference"} if config.kl_coef else set()
        self.needs = frozenset({"values"} | penalty | ({"entropy"} if config.entropy_coef else set()))
        self.kl_coef, self.seen = config.kl_coef, RunningMoments()

    def prepare(self, batch: Rollouts, score: Scorer) -> Rollouts:
        """Advantages and returns of the rollouts; those that no reward applies to are left out."""
        c = self.config
        batch = batch.take((~batch.score.isnan()).nonzero()[:, 0])
        counts, metrics = batch.sequences.counts, {}
        rewards = torch.zeros_like(batch.old) if batch.token_scores is None else batch.token_scores.clone()
        if c.kl_coef:
            kl = (
                batch.kl
                if c.kl_estimator == "full"
                else kl_estimate(batch.old, batch.reference, c.kl_estimator)
            )
            rewards -= self.kl_coef * kl
            metrics = {
                "kl": kl,
                "kl/sequence": segment_sum(kl, counts),
                "kl/coef": kl.new_tensor([self.kl_coef]),
            }
            if c.kl_controller == "adaptive":
                self.steer(metrics["kl/sequence"], score)
        scores = self.shape(batch.score, batch.finished, score)
        rewards[last_token(counts)] += scores[counts > 0]
        if c.whiten_rewards:
            rewards = whiten(rewards, score.total, shift_mean=False)
        advantages, returns = gae(rewards, batch.values, counts, gamma=c.gamma, lam=c.lam)
        unexplained, spread = (moments(x, score.total)[2] for x in (returns - batch.values, returns))
        metrics["value/explained_variance"] = (1 - unexplained / spread.clamp(min=1e-8)).float()[None]
        if c.whiten_advantages:
            advantages = whiten(advantages, score.total)
        return replace(batch, advantages=advantages, returns=returns, metrics=metrics)

    def steer(self, kl: torch.Tensor, score: Scorer) -> None:
        """kl_coef times 1 + clip(kl / target − 1, ±0.2) · n / horizon; kl (N,) nats a sequence."""
        count, mean, _ = moments(kl, score.total)
        error = min(max(float(mean) / self.config.kl_target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * float(count) / self.config.kl_horizon

    def shape(self, scores: torch.Tensor, finished: torch.Tensor, score: Scorer) -> torch.Tensor:
        """Scores (N,) after the penalty for cut completions, scaling by running moments, and clipping."""
        c = self.config
        if c.missing_eos_penalty is not None:
            scores = scores - c.missing_eos_penalty * (~finished)
        if c.score_scaling != "none":
            self.seen.update(*moments(scores, score.total))
            centre = self.seen.mean if c.score_scaling == "standardise" else 0.0
            scores = (scores - centre) / max(self.seen.std, 1e-8)
        return scores if c.score_clip is None else scores.clamp(-c.score_clip, c.score_clip)

    def loss(self, batch: Rollouts, now: Scores) -> Loss:
        """Clipped policy loss, clipped value loss and entropy bonus, a term a token."""
        c = self.config
        log_ratio = now.logps - batch.old
        ratio = log_ratio.exp()
        policy, policy_cut = clipped_loss(ratio, batch.advantages, low=c.cliprange, high=c.cliprange)
        value, value_cut = value_loss(now.values, batch.values, batch.returns, c.cliprange_value)
        # Without the bonus nobody pays for the exact entropy: −logp of the sampled tokens estimates it.
        entropy = -batch.old if now.entropy is None else now.entropy
        terms = policy + c.vf_coef * value - (c.entropy_coef * entropy if c.entropy_coef else 0)
        metrics = {
            "loss/policy": policy,
            "loss/value": value,
            "entropy": entropy,
            "policy/ratio": ratio,
            "policy/approx_kl": ratio - 1 - log_ratio,
            "policy/clip_fraction": policy_cut.float(),
            "value/clip_fraction": value_cut.float(),
        }
        return Loss({"tokens": terms}, metrics)

    def verdict(self, means: Mapping[str, float]) -> str:
        """Skip a mini-batch whose ratio exploded; stop the update once the policy moved too far."""
        if means["policy/ratio"] > self.config.ratio_threshold:
            return "skip"
        limit = math.inf if self.config.target_kl is None else 1.5 * self.config.target_kl
        return "stop" if means["policy/approx_kl"] > limit else "step"

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient and the running moments of the scores."""
        return {"kl_coef": self.kl_coef, "seen": dict(vars(self.seen))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.kl_coef, self.seen = state["kl_coef"], RunningMoments(**state["seen"])
