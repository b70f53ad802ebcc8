"""Kahneman–Tversky optimisation: learn from completions that are each just good or bad, no pairs needed.

A completion's implicit reward is β·r, its log-ratio to the reference. It is judged from a point of reference,
the KL(policy‖reference) as estimated on completions of other prompts: desirable ones shall lie above it,
undesirable ones below, and far away from it more of either counts less and less.

Sources: KTO arXiv:2402.01306; apo_zero_unpaired after APO arXiv:2408.06266, equation 7.
Unlike TRL 1.16, completions are swapped between prompts within each optimizer batch, and the KL is a mean
over the rows of all processes; a batch of one row has no other prompt, and its KL counts as 0.

Run it: ``rlx run --algo kto --dataset labeled.jsonl``
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rlx.core.batch import Labeled, Loss, Scores
from rlx.core.functional import moments, segment_sum
from rlx.core.options import opt
from rlx.core.preference import labelled_loss
from rlx.plugins.contract import Algorithm, Scorer

BALANCED = (1.0, 1.33)  # desirable to undesirable, weight × count (arXiv:2402.01306, section 4.2)


@dataclass(frozen=True)
class KTOConfig:
    """Options of KTO."""

    beta: float = opt(0.1, "strength of the pull to the reference", gt=0, source="arXiv:2402.01306")
    loss_type: str = opt(
        "kto",
        "apo_zero_unpaired needs no KL",
        choices=("kto", "apo_zero_unpaired"),
        source="arXiv:2402.01306; arXiv:2408.06266, equation 7",
    )
    desirable_weight: float = opt(
        1.0, "weight of desirable completions", gt=0, source="arXiv:2402.01306, section 4.2"
    )
    undesirable_weight: float = opt(
        1.0, "weight of undesirable completions", gt=0, source="arXiv:2402.01306, section 4.2"
    )


class KTO(Algorithm):
    """Kahneman–Tversky optimisation."""

    Config = KTOConfig
    eats = "labeled"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-6}
    needs = frozenset({"reference"})
    loss_per = ("sequences",)

    def __init__(self, config: KTOConfig) -> None:
        super().__init__(config)
        self.seen = [0.0, 0.0]  # desirable and undesirable rows
        self.told: list[str] = []  # warnings given
        if config.loss_type == "kto":
            self.needs |= {"mismatched"}

    def prepare(self, batch: Labeled, score: Scorer) -> Labeled:
        """The KL of this batch over all processes, and how its labels are balanced."""
        labels = torch.stack([batch.desirable.sum(), (~batch.desirable).sum()])
        desirable, undesirable = score.total(labels).tolist()
        kl = torch.zeros(len(batch), device=batch.desirable.device)
        if self.config.loss_type == "kto":
            kl = kl + self.kl(batch, score)
        metrics = {"kl": kl, "kto/balance": kl.new_tensor([self.balance(desirable, undesirable)])}
        batch = replace(batch, kl=kl, mismatched_reference=None, metrics=batch.metrics | metrics)
        if not (desirable and undesirable):
            return batch
        rows = desirable + undesirable
        return replace(batch, contrast=torch.where(batch.desirable, rows / desirable, -rows / undesirable))

    def kl(self, batch: Labeled, score: Scorer) -> torch.Tensor:
        """() mean log-ratio of mismatched completions over all processes, at least 0."""
        ratios = batch.sequences.ids.new_zeros(0, dtype=torch.float32)
        if batch.mismatched is not None:
            reference = batch.mismatched_reference
            if reference is None:
                reference = score(batch.mismatched, "reference").logps
            ratios = segment_sum(score(batch.mismatched).logps - reference, batch.mismatched.counts)
        count, mean, _ = moments(ratios, score.total)
        if not count:
            text = "a batch of one row has no other row to estimate the KL on; it counts as 0. "
            self.warn("kl", text + "Raise batch_size, or use loss_type: apo_zero_unpaired")
        return mean.clamp(min=0).float()

    def balance(self, desirable: float, undesirable: float) -> float:
        """Weight × count of desirable rows over that of undesirable ones, of all rows seen; warns once."""
        c = self.config
        self.seen = [self.seen[0] + desirable, self.seen[1] + undesirable]
        good, bad = (count + 0.5 for count in self.seen)  # finite where one kind is missing
        ratio = float(c.desirable_weight * good / (c.undesirable_weight * bad))
        # Two standard errors of the log-ratio: the first few batches are lopsided by chance alone.
        slack = 2 * math.sqrt(1 / good + 1 / bad)
        low, high = (math.log(bound) for bound in BALANCED)
        if math.log(ratio) + slack < low or math.log(ratio) - slack > high:
            text = "{:g} desirable and {:g} undesirable rows so far: ".format(*self.seen)
            text += f"weight × count is {ratio:.2f} to 1, best is 1 to 1.33. "
            best = [bound * c.desirable_weight / ratio for bound in BALANCED]
            advice = "Set desirable_weight between {:.2f} and {:.2f}".format(*best)
            self.warn(
                "balance", text + (advice if min(self.seen) else "Add rows of the kind that is missing")
            )
        return ratio

    def warn(self, about: str, text: str) -> None:
        """Warn once in a run."""
        if about not in self.told:
            self.told.append(about)
            warnings.warn(f"kto: {text}", stacklevel=2)

    def loss(self, batch: Labeled, now: Scores) -> Loss:
        """A term a sequence: weight · (1 − σ(β(r − kl))), or of β(kl − r) if it is undesirable."""
        c, counts, good = self.config, batch.sequences.counts, batch.desirable
        logps = segment_sum(now.logps, counts)
        ratio = logps - segment_sum(batch.reference, counts)
        terms = labelled_loss(
            ratio,
            good,
            batch.kl,
            beta=c.beta,
            desirable_weight=c.desirable_weight,
            undesirable_weight=c.undesirable_weight,
        )
        logps, rewards = logps.detach(), c.beta * ratio.detach()
        metrics = {
            "rewards/chosen": rewards[good],
            "rewards/rejected": rewards[~good],
            "rewards/accuracies": torch.where(good, ratio > batch.kl, ratio < batch.kl).float(),
            "logps/chosen": logps[good],
            "logps/rejected": logps[~good],
        }
        if batch.contrast is not None:  # the mean of it is mean desirable − mean undesirable
            metrics["rewards/margins"] = rewards * batch.contrast
        return Loss({"sequences": terms}, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Rows seen of each kind, and which warnings were given."""
        return {"seen": list(self.seen), "told": list(self.told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.seen, self.told = list(state["seen"]), list(state["told"])
