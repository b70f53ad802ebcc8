"""Exponential moving average of the trained weights, evaluated and saved beside the policy.

After each ``update_every``-th step: average ← decay · average + (1 − decay) · weights, in float32; it begins
as a copy of the weights at the first such step from ``start_step`` on. Only what is trained is averaged: of a
LoRA run the adapter's A and B. Training goes on as without it. The value function is averaged along, so
that the folder ``ema/`` of the run is whole: ``from_pretrained`` reads it as it reads the run folder.

Source: the average of Polyak and Juditsky (1992) in the form of target networks, arXiv:1509.02971, section 3.
Run it: ``rlx run --callback ema --ema.decay 0.99 --ema.evaluate``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlx.core.options import opt
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "ema"


class EMA(Callback):
    """Keeps the average; its state is in every checkpoint."""

    collective: ClassVar[bool] = True  # evaluating the average is work of all processes

    @dataclass(frozen=True)
    class Config:
        """Options of ema."""

        decay: float = opt(
            0.999, "share of the old average that stays", ge=0, lt=1, source="arXiv:1509.02971"
        )
        update_every: int = opt(1, "steps between two updates of the average", gt=0)
        start_step: int = opt(0, "step from which on weights are averaged", ge=0)
        evaluate: bool = opt(False, "evaluate the averaged weights too, as eval/ema/…, in twice the time")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.average: dict[str, Tensor] = {}
        self._seen = 0  # the last step whose weights were looked at

    @hookimpl
    def on_step_end(self, run: Any) -> None:
        """Take the weights into the average, when it is time."""
        self._take(run)

    @hookimpl
    def on_evaluate(self, run: Any) -> dict[str, float] | None:
        """The metrics of the averaged weights, if they are asked for; the policy's before there are any.

        So they are in the first evaluation, where what watches a metric looks for it.
        """
        self._take(run)  # an evaluation comes before the end of its step
        if not self.config.evaluate:
            return None
        from rlx.core.evaluate import evaluate_once_more

        with self.swapped_in(run.policy) if self.average else nullcontext():
            metrics = evaluate_once_more(run)
        return {name.replace("eval/", "eval/ema/", 1): value for name, value in metrics.items()}

    def _take(self, run: Any) -> None:
        """Take the weights into the average, once a step, when it is time."""
        step, self._seen = self._seen, run.global_step
        due = run.global_step >= self.config.start_step and not run.global_step % self.config.update_every
        if step == run.global_step or not due:
            return
        for name, parameter in run.policy.trainable().items():
            now = parameter.detach().float()
            if name in self.average:
                self.average[name] = self.average[name].to(now.device).lerp_(now, 1 - self.config.decay)
            else:
                self.average[name] = now.clone()

    @hookimpl
    def on_save(self, run: Any, path: Path) -> None:
        """Write the averaged policy beside the final one; checkpoints have the average in their state."""
        if path != run.path:
            return
        if not self.average:
            run.say(f"ema: nothing was averaged, the run ended before step {self.config.start_step}")
            return
        with self.swapped_in(run.policy):
            run.folder.publish(lambda aside: run.policy.save_pretrained(aside / FOLDER))

    @contextmanager
    def swapped_in(self, policy: Any) -> Iterator[None]:
        """Within it the policy has the averaged weights; afterwards, bit for bit, its own.

        Args:
            policy: ``rlx.core.models.Policy``, the one that was averaged.
        """
        trained = policy.trainable()
        own = {name: parameter.detach().clone() for name, parameter in trained.items()}
        try:
            _copy(self.average, trained)
            yield
        finally:
            _copy(own, trained)

    def state_dict(self) -> dict[str, Any]:
        """The average, and up to which step it goes."""
        return {"average": dict(self.average), "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.average, self._seen = dict(state["average"]), state["seen"]


def _copy(weights: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in into.items():
            parameter.copy_(weights[name])
