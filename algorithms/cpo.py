"""Contrastive preference optimisation, SimPO and AlphaPO: preferences without a reference model.

As DPO, with log-probs in place of log-ratios, plus the negative log-likelihood of the chosen completion.
SimPO takes the mean log-prob of a token and asks for a margin; AlphaPO bends the reward.

Sources: CPO arXiv:2401.08417; SimPO arXiv:2405.14734, equation 6; AlphaPO arXiv:2501.03884.
SimPO is ``loss_type: simpo`` with ``cpo_alpha: 0``; AlphaPO is the same with ``alpha`` other than 0.
Unlike TRL 1.16, AlphaPO's power is taken of the log-prob, so that a long completion does not underflow.

Run it: ``rlx run --algo cpo --dataset pairs.jsonl``
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlx.core.batch import Batch, Loss, Pairs, Scores
from rlx.core.functional import segment_mean, segment_sum
from rlx.core.options import opt
from rlx.core.preference import comparison_metrics, contrastive_loss, of_chosen, power, sides
from rlx.plugins.contract import Algorithm

KINDS = ("sigmoid", "hinge", "ipo", "simpo")
CPO_PAPER, SIMPO, ALPHAPO = "arXiv:2401.08417", "arXiv:2405.14734", "arXiv:2501.03884"


@dataclass(frozen=True)
class CPOConfig:
    """Options of CPO."""

    beta: float = opt(0.1, "scale of the rewards", gt=0, source=CPO_PAPER)
    loss_type: str = opt(
        "sigmoid",
        "how the chosen one is to exceed the rejected one",
        choices=KINDS,
        source=f"{CPO_PAPER}; simpo {SIMPO}",
    )
    label_smoothing: float = opt(
        0.0,
        "share of wrong labels, for sigmoid and simpo",
        ge=0,
        lt=1,
        source="https://ericmitchell.ai/cdpo.pdf",
    )
    cpo_alpha: float = opt(
        1.0, "weight of the chosen completion's negative log-likelihood", ge=0, source=CPO_PAPER
    )
    simpo_gamma: float = opt(0.5, "margin between the rewards that simpo asks for", source=SIMPO)
    alpha: float = opt(0.0, "AlphaPO: reward (1 − p^−α)/α; 0: log p", source=ALPHAPO)

    def __post_init__(self) -> None:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            warnings.warn(f"label_smoothing has no effect on loss_type {self.loss_type}", stacklevel=3)


class CPO(Algorithm):
    """Contrastive preference optimisation."""

    Config = CPOConfig
    eats = "pairs"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-6}

    def __init__(self, config: CPOConfig) -> None:
        super().__init__(config)
        self.loss_per = ("rows", "chosen_tokens") if config.cpo_alpha else ("rows",)

    def size(self, batch: Batch, by: str) -> torch.Tensor:
        """Beside the usual counts, ``chosen_tokens``: scored tokens of the chosen completions."""
        return sides(batch.sequences.counts)[0].sum().double() if by == "chosen_tokens" else batch.size(by)

    def loss(self, batch: Pairs, now: Scores) -> Loss:
        """A term a pair, and a term a chosen token."""
        c, counts = self.config, batch.sequences.counts
        reduce = segment_mean if c.loss_type in ("ipo", "simpo") else segment_sum
        logps = reduce(now.logps, counts)
        terms = contrastive_loss(
            c.loss_type,
            *sides(logps),
            beta=c.beta,
            smoothing=c.label_smoothing,
            gamma=c.simpo_gamma,
            alpha=c.alpha,
        )
        chosen, rejected = sides(power(logps, -c.alpha))
        metrics = comparison_metrics(c.beta * chosen, c.beta * rejected)
        metrics |= dict(zip(("logps/chosen", "logps/rejected"), sides(logps.detach()), strict=True))
        if not c.cpo_alpha:
            return Loss({"rows": terms}, metrics)
        nll = -of_chosen(now.logps, counts)
        metrics |= {f"loss/{c.loss_type}": terms.detach(), "loss/nll": nll.detach()}
        return Loss({"rows": terms, "chosen_tokens": c.cpo_alpha * nll}, metrics)
