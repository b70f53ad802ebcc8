"""Online DPO: sample two completions a prompt, let rewards or a judge say which is better, and learn from it.

The policy samples anew at every step, so the pairs are always its own; the loss is DPO's.

Sources: OnlineDPO arXiv:2402.04792; the losses: DPO arXiv:2305.18290, IPO arXiv:2310.12036.
Unlike TRL, log-probs are taken at the sampling temperature, under the policy as under the reference.

Run it: ``rlx run --algo online_dpo --reward exact_match``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlx.core.batch import Loss, Pairs, Rollouts, Scores
from rlx.core.functional import segment_sum
from rlx.core.options import opt
from rlx.core.preference import comparison_metrics, contrastive_loss, sides
from rlx.plugins.contract import Algorithm, Scorer


@dataclass(frozen=True)
class OnlineDPOConfig:
    """Options of OnlineDPO."""

    beta: float = opt(0.1, "strength of the pull to the reference", gt=0, source="arXiv:2305.18290")
    loss_type: str = opt(
        "sigmoid",
        "loss of a pair",
        choices=("sigmoid", "ipo"),
        source="arXiv:2402.04792; ipo arXiv:2310.12036",
    )
    num_generations: int = opt(
        2, "completions of each prompt; best and worst make the pair", ge=2, source="arXiv:2402.04792"
    )
    missing_eos_penalty: float | None = opt(
        None, "subtracted from the reward of a cut completion", ge=0, source="arXiv:2403.17031"
    )


class OnlineDPO(Algorithm):
    """DPO on pairs that the policy has just sampled."""

    Config = OnlineDPOConfig
    eats = "prompts"
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 5e-7,
        "temperature": 0.9,
        "max_completion_length": 64,
    }
    needs = frozenset({"reference"})
    loss_per = ("rows",)
    judged = True

    def __init__(self, config: OnlineDPOConfig) -> None:
        super().__init__(config)
        self.completions_per_prompt = config.num_generations

    def prepare(self, batch: Rollouts, score: Scorer) -> Pairs:
        """The best and the worst completion of each prompt as a pair; of equal ones the first is better.

        With a judge, the share of comparisons won decides; a prompt without any verdict makes no pair.
        """
        rewards = batch.total_score if batch.wins is None else batch.wins
        if self.config.missing_eos_penalty is not None:
            rewards = rewards - self.config.missing_eos_penalty * (~batch.finished)
        chosen, rejected = best_and_worst(rewards, batch.sequences.groups)
        picked = batch.take(torch.stack([chosen, rejected], dim=1).flatten())
        gaps = rewards[chosen] - rewards[rejected]
        kl = segment_sum(batch.old - batch.reference, batch.sequences.counts)
        metrics = {"pairs/ties": (gaps == 0).float(), "pairs/reward_gap": gaps, "kl/sequence": kl}
        return Pairs(picked.sequences, reference=picked.reference, metrics=metrics)

    def loss(self, batch: Pairs, now: Scores) -> Loss:
        """−log σ(βΔ) or (Δ − 1/(2β))², a term a pair."""
        beta, counts = self.config.beta, batch.sequences.counts
        logps, reference = (segment_sum(x, counts) for x in (now.logps, batch.reference))
        chosen, rejected = sides(logps - reference)
        loss = contrastive_loss(self.config.loss_type, chosen, rejected, beta=beta)
        metrics = comparison_metrics(beta * chosen, beta * rejected)
        metrics["logps/chosen"], metrics["logps/rejected"] = sides(logps.detach())
        return Loss({"rows": loss}, metrics)


def best_and_worst(rewards: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the best and of the worst sequence of each group, by ascending group.

    Args:
        rewards: (N,), NaN for a sequence that cannot be compared.
        groups: (N,) int64, in any order.

    Returns:
        (G,) int64 each, for groups with two rewards or more. Of equal ones the first counts as better.
    """
    scorable = (~rewards.isnan()).nonzero()[:, 0]
    order = scorable[rewards[scorable].argsort(descending=True, stable=True)]
    order = order[groups[order].argsort(stable=True)]
    sizes = groups[order].unique_consecutive(return_counts=True)[1]
    ends = sizes.cumsum(0)
    first, last = ends - sizes, ends - 1
    return order[first[sizes > 1]], order[last[sizes > 1]]
