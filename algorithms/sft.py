"""Supervised fine-tuning: make demonstrations more likely.

Which tokens are learned (completions, assistant turns, everything), packing and cutting belong to the data;
here they arrive as ``sequences.scored``.

Sources: dynamic fine-tuning (dft) arXiv:2508.05629.

Run it: ``rlx run --algo sft --dataset demonstrations.jsonl``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlx.core.batch import Demonstrations, Loss, Scores
from rlx.core.functional import imitation_loss
from rlx.core.options import opt
from rlx.plugins.contract import Algorithm


@dataclass(frozen=True)
class SFTConfig:
    """Options of SFT."""

    loss_type: str = opt(
        "nll",
        "dft weighs each token by its own probability, so that unlikely tokens pull less",
        choices=("nll", "dft"),
        source="arXiv:2508.05629, equation 9",
    )


class SFT(Algorithm):
    """Supervised fine-tuning."""

    Config = SFTConfig
    eats = "demonstrations"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 2e-5}
    needs = frozenset({"entropy", "correct"})

    def loss(self, batch: Demonstrations, now: Scores) -> Loss:
        """−log p, or −p·log p with p a constant, a term a token."""
        terms = imitation_loss(now.logps, self.config.loss_type)
        metrics = {
            "loss/nll": -now.logps.detach(),
            "entropy": now.entropy.detach(),
            "mean_token_accuracy": now.correct.float(),
        }
        return Loss({"tokens": terms}, metrics)
