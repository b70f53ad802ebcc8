"""Odds-ratio preference optimisation: imitate the chosen answer and prefer it at once, without a reference.

The loss is the negative log-likelihood of the chosen text, plus β times a logistic loss on the odds p/(1 − p)
of both completions, p being the geometric mean of a completion's token probabilities.

Sources: ORPO arXiv:2403.07691, equations 4, 6 and 7.
Unlike TRL 1.16, a pair with an empty completion adds nothing to the odds-ratio term instead of making it NaN,
and probabilities that float32 cannot tell from 1 leave values and gradients finite.

Run it: ``rlx run --algo orpo --dataset pairs.jsonl``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rlx.core.batch import Batch, Loss, Pairs, Scores, Sequences
from rlx.core.functional import segment_mean
from rlx.core.options import opt
from rlx.core.preference import comparison_metrics, odds_ratio_loss, of_chosen, sides
from rlx.plugins.contract import Algorithm, Scorer

NLL_ON = ("prompt_and_completion", "completion")


@dataclass(frozen=True)
class ORPOConfig:
    """Options of ORPO."""

    beta: float = opt(0.1, "weight of the odds-ratio term, the paper's λ", ge=0, source="arXiv:2403.07691")
    nll_on: str = opt(
        NLL_ON[0],
        "which part of the chosen text is imitated",
        choices=NLL_ON,
        source="arXiv:2403.07691, equation 6",
    )


class ORPO(Algorithm):
    """Odds-ratio preference optimisation."""

    Config = ORPOConfig
    eats = "pairs"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-6}
    loss_per = ("rows", "chosen_tokens")

    def __init__(self, config: ORPOConfig) -> None:
        super().__init__(config)
        self.learns_from_prompts = config.nll_on != "completion"

    def size(self, batch: Batch, by: str) -> torch.Tensor:
        """Beside the usual counts, ``chosen_tokens``: scored tokens of the chosen texts."""
        return sides(batch.sequences.counts)[0].sum().double() if by == "chosen_tokens" else batch.size(by)

    def prepare(self, batch: Pairs, score: Scorer) -> Pairs:
        """The batch with the prompts of chosen texts scored too, if they are imitated."""
        if self.config.nll_on == "completion":
            return batch
        sequences = batch.sequences
        chosen = torch.arange(len(sequences), device=sequences.ids.device) % 2 == 0
        prompt = in_prompt(sequences) & chosen[sequences.owners]
        prompt[sequences.starts[sequences.lengths > 0]] = False  # nothing precedes a first token
        return replace(batch, sequences=replace(sequences, scored=sequences.scored | prompt))

    def loss(self, batch: Pairs, now: Scores) -> Loss:
        """A term a chosen token: −log p; and a term a pair: −β log σ of the log odds ratio."""
        sequences, beta = batch.sequences, self.config.beta
        answer = ~in_prompt(sequences)[sequences.scored]
        owners = sequences.owners[sequences.scored][answer]
        counts = owners.bincount(minlength=len(sequences))
        chosen, rejected = sides(segment_mean(now.logps[answer], counts))
        both = counts.view(-1, 2).amin(dim=1) > 0
        odds, log_odds = odds_ratio_loss(chosen[both], rejected[both], beta=beta)
        nll = -of_chosen(now.logps, sequences.counts)
        metrics = comparison_metrics(beta * chosen, beta * rejected) | {
            "logps/chosen": chosen.detach(),
            "logps/rejected": rejected.detach(),
            "loss/nll": nll.detach(),
            "loss/odds_ratio": odds.detach(),
            "log_odds": log_odds.detach(),
        }
        return Loss({"rows": odds, "chosen_tokens": nll}, metrics)


def in_prompt(sequences: Sequences) -> torch.Tensor:
    """(T,) bool, whether a token belongs to its sequence's prompt."""
    owners = sequences.owners
    places = torch.arange(len(sequences.ids), device=sequences.ids.device) - sequences.starts[owners]
    return places < sequences.prompt_lengths[owners]
