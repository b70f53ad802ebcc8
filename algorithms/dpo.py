"""Direct preference optimisation, and the family of losses that grew around it.

The implicit reward of a completion is β·r, its log-ratio to the reference. The loss makes that of the chosen
one exceed that of the rejected one; ``loss_type`` says how, or names several losses that are added.

Sources: DPO arXiv:2305.18290; f-divergences arXiv:2309.16240; LD-DPO arXiv:2409.06411; WPO arXiv:2406.11827;
AOT arXiv:2406.05882; those of the other losses stand beside their formulas in rlx.core.preference.
Unlike TRL 1.16, losses of sorted values (aot, aot_unpaired) sort the optimizer batch of all processes.

Run it: ``rlx run --algo dpo --dataset pairs.jsonl``
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rlx.core.batch import Batch, Loss, Pairs, Scores
from rlx.core.errors import ConfigError
from rlx.core.functional import segment_sum, spread
from rlx.core.options import opt
from rlx.core.preference import (
    F_DIVERGENCES,
    PAIR_LOSSES,
    comparison_metrics,
    of_chosen,
    policy_weights,
    preference_loss,
    sides,
    sorted_anchors,
    sorted_loss,
    verbosity_weights,
)
from rlx.plugins.contract import Algorithm, Scorer

Two = tuple["torch.Tensor", "torch.Tensor"]  # of the chosen and of the rejected completions
SORTED = ("aot", "aot_unpaired")
KINDS = (*PAIR_LOSSES, *SORTED, "sft")
SMOOTHED = {"exo_pair", "robust", *SORTED}
# The other losses look at r alone, in which the normaliser of another divergence would not cancel.
OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


@dataclass(frozen=True)
class DPOConfig:
    """Options of DPO."""

    beta: float = opt(0.1, "strength of the pull to the reference", gt=0, source="arXiv:2305.18290")
    loss_type: tuple[str, ...] = opt(
        ("sigmoid",),
        "one loss or several",
        choices=KINDS,
        source="arXiv:2305.18290; the others on the page of DPO",
        commas=True,
    )
    loss_weights: tuple[float, ...] | None = opt(None, "weight of each loss_type; none: 1 each")
    label_smoothing: float = opt(
        0.0, "share of wrong labels, for exo_pair, robust and aot", ge=0, lt=1, source="arXiv:2403.00409"
    )
    f_divergence_type: str = opt(
        "reverse_kl", "divergence from the reference", choices=F_DIVERGENCES, source="arXiv:2309.16240"
    )
    f_alpha_divergence_coef: float = opt(0.5, "α of alpha_divergence", source="arXiv:2309.16240")
    ld_alpha: float | None = opt(
        None, "weight of tokens past the end of the shorter side", ge=0, le=1, source="arXiv:2409.06411"
    )
    use_weighting: bool = opt(
        False, "weigh each pair by how likely the policy is to write it", source="arXiv:2406.11827"
    )
    discopop_tau: float = opt(0.05, "temperature of discopop's blend", gt=0, source="arXiv:2406.08414")
    reference_free: bool = opt(False, "take a reference to which all completions are equally likely")

    def __post_init__(self) -> None:
        kinds = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        object.__setattr__(self, "loss_type", kinds)
        weights, epsilon = self.loss_weights, self.label_smoothing
        unfit = sorted(set(kinds) - OF_DIFFERENCES)
        if not kinds:
            raise conflict("loss_type names no loss", "loss_type: []", f"give one of {', '.join(KINDS)}")
        if weights is not None and len(weights) != len(kinds):
            got = f"{len(weights)} loss_weights for {len(kinds)} loss_type"
            raise conflict("loss_weights and loss_type differ in length", got, "give a weight for each loss")
        if "exo_pair" in kinds and epsilon == 0:
            what = "loss_type exo_pair takes the logarithm of label_smoothing"
            raise conflict(
                what, "label_smoothing: 0", "set label_smoothing, for example to its paper's 0.001"
            )
        if "robust" in kinds and epsilon >= 0.5:
            what = "loss_type robust needs more labels right than wrong"
            raise conflict(what, f"label_smoothing: {epsilon}", "set label_smoothing below 0.5")
        if self.f_divergence_type != "reverse_kl" and unfit:
            what = f"loss_type {unfit[0]} and f_divergence_type {self.f_divergence_type} do not go together"
            hint = f"set f_divergence_type: reverse_kl, or choose from {', '.join(sorted(OF_DIFFERENCES))}"
            raise conflict(what, f"loss_type: {', '.join(kinds)}", hint)
        if self.use_weighting and set(kinds) & set(SORTED):
            what = "use_weighting weighs pairs, and loss_type aot and aot_unpaired take pairs apart"
            raise conflict(what, f"loss_type: {', '.join(kinds)}", "leave out one of the two")
        if epsilon and not set(kinds) & SMOOTHED:
            text = f"label_smoothing has no effect on loss_type {', '.join(kinds)}; robust would use it"
            warnings.warn(text, stacklevel=3)


def conflict(what: str, got: str, hint: str) -> ConfigError:
    """The error of options that do not fit together."""
    return ConfigError(what, code="E-CONFIG-CONFLICT", got=got, hint=hint)


class DPO(Algorithm):
    """Direct preference optimisation."""

    Config = DPOConfig
    eats = "pairs"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-6}

    def __init__(self, config: DPOConfig) -> None:
        super().__init__(config)
        kinds = config.loss_type
        self.parts = list(zip(kinds, config.loss_weights or [1.0] * len(kinds), strict=True))
        needs = {"square"} if config.use_weighting else set()
        self.needs = frozenset(needs if config.reference_free else needs | {"reference"})
        self.loss_per = ("rows",) * (set(kinds) != {"sft"}) + ("chosen_tokens",) * ("sft" in kinds)

    def size(self, batch: Batch, by: str) -> torch.Tensor:
        """Beside the usual counts, ``chosen_tokens``: scored tokens of the chosen completions."""
        return sides(batch.sequences.counts)[0].sum().double() if by == "chosen_tokens" else batch.size(by)

    def prepare(self, batch: Pairs, score: Scorer) -> Pairs:
        """The batch with what the losses of sorted values have to know of all of it."""
        if not set(self.config.loss_type) & set(SORTED):
            return batch
        policy = self.sums(batch, score(batch.sequences).logps)
        return replace(batch, anchors=sorted_anchors(policy, self.reference(batch), score.total))

    def sums(self, batch: Pairs, logps: torch.Tensor) -> Two:
        """Log-probs (S,) added up over each completion: chosen (R,), rejected (R,)."""
        counts, alpha = batch.sequences.counts, self.config.ld_alpha
        weighed = logps if alpha is None else logps * verbosity_weights(counts, alpha)
        return sides(segment_sum(weighed, counts))

    def reference(self, batch: Pairs) -> Two:
        """The same under the reference; zeros if there is none."""
        if self.config.reference_free:
            zeros = torch.zeros(len(batch), device=batch.sequences.ids.device)
            return zeros, zeros
        return self.sums(batch, batch.reference)

    def loss(self, batch: Pairs, now: Scores) -> Loss:
        """A term a pair, and for sft a term a token of the chosen completion."""
        c, counts = self.config, batch.sequences.counts
        policy, reference = self.sums(batch, now.logps), self.reference(batch)
        chosen, rejected = (lp - base for lp, base in zip(policy, reference, strict=True))
        metrics = comparison_metrics(c.beta * chosen, c.beta * rejected)
        metrics |= {"logps/chosen": policy[0].detach(), "logps/rejected": policy[1].detach()}
        weights = torch.ones(len(batch), device=counts.device)
        if c.use_weighting:
            weights = metrics["policy/weight"] = policy_weights(now.logps, now.square, counts)
        terms = dict.fromkeys(self.loss_per, torch.zeros((), device=counts.device))
        for kind, factor in self.parts:
            if kind == "sft":
                by, part = "chosen_tokens", -of_chosen(now.logps, counts)
                metrics["loss/nll"] = part.detach()
                weight = spread(weights, sides(counts)[0])
            else:
                by, part, weight = "rows", self.compare(kind, policy, reference, batch), weights
                metrics |= {f"loss/{kind}": part.detach()} if len(self.parts) > 1 else {}
            terms[by] = terms[by] + factor * weight * part
        return Loss(terms, metrics)

    def compare(self, kind: str, policy: Two, reference: Two, batch: Pairs) -> torch.Tensor:
        """The loss (R,) of each pair, from the log-probs of its completions under both models."""
        c = self.config
        if kind in SORTED:
            return sorted_loss(
                kind, policy, reference, batch.anchors, beta=c.beta, smoothing=c.label_smoothing
            )
        return preference_loss(
            kind,
            policy[0] - reference[0],
            policy[1] - reference[1],
            batch.sequences.counts,
            beta=c.beta,
            smoothing=c.label_smoothing,
            tau=c.discopop_tau,
            f_divergence=c.f_divergence_type,
            f_alpha=c.f_alpha_divergence_coef,
        )
