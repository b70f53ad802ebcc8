"""What an algorithm sees of the run while it prepares a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from rlx.core.meter import total
from rlx.core.peers import elsewhere, some_failed

if TYPE_CHECKING:
    from torch import Tensor

    from rlx.core.batch import Scores, Sequences
    from rlx.core.rollout import Studio


class RunScorer:
    """What ``Algorithm.prepare`` sees of the run (``rlx.plugins.contract.Scorer``).

    Attributes:
        heard: whether ``total`` was told that another process had failed.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.heard = studio, False
        self.max_completion_length = studio.settings.max_completion_length
        named = () if studio.rewards is None else studio.rewards.rewards
        self.reward_weights: Mapping[str, float] = {reward.name: reward.weight for reward in named}

    def __call__(self, sequences: Sequences, model: str = "policy", needs: Collection[str] = ()) -> Scores:
        """Log-probs without gradient under ``policy`` or ``reference``, and what else is needed."""
        return self.studio.score(sequences, model, needs)

    def total(self, values: Tensor) -> Tensor:
        """The element-wise sum of values over all processes.

        Raises:
            PeerError: another process has failed, and never comes here.
        """
        accelerator = self.studio.accelerator
        if accelerator.num_processes > 1 and some_failed(accelerator, False):
            self.heard = True
            raise elsewhere(accelerator, "what is added up over all processes")
        return total(accelerator, values)
