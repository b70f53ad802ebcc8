"""Ends a run once a metric has stopped getting better, or is good enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.core.monitor import MODES, Monitor, check_mode
from rlx.core.options import opt
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl


class EarlyStopping(Callback):
    """Ends the run after a step, as if it were the last: evaluated, the policy written, exit code 0.

    Each log line with the metric counts, the evaluation before the first step too. A value that is not finite
    is no improvement.
    """

    @dataclass(frozen=True)
    class Config:
        """What to watch."""

        metric: str = opt(doc="name of a metric in metrics.jsonl, such as eval/reward or loss")
        mode: str = opt("auto", "which way is better; auto is what the name says", choices=MODES)
        patience: int = opt(3, "values in a row that may fail to improve on the best one", gt=0)
        min_delta: float = opt(0.0, "the least change that is an improvement", ge=0)
        threshold: float | None = opt(None, "a value that is good enough: the run ends once it is reached")

        def __post_init__(self) -> None:
            check_mode(self.metric, self.mode)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._monitor = Monitor(config.metric, config.mode, "early_stopping")
        self._best: float | None = None
        self._best_step = 0
        self._waited = 0

    @hookimpl
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """Look at one log line, and stop the run if it has gone on for nothing."""
        value = self._monitor.read(run, metrics)
        if value is None:
            return
        threshold, name = self.config.threshold, self.config.metric
        if threshold is not None and self._monitor.reaches(value, threshold):
            run.stop(f"early_stopping: {name} {value:.4g} reached the threshold {threshold:g}")
        if self._monitor.better(value, self._best, self.config.min_delta):
            self._best, self._best_step, self._waited = value, int(metrics["step"]), 0
            return
        self._waited += 1
        if self._waited >= self.config.patience:
            run.stop(
                f"early_stopping: {self._waited} times in a row {name} was no better than {self._shown()}"
            )

    def _shown(self) -> str:
        if self._best is None:
            return "nothing: it was never finite"
        margin = f" by {self.config.min_delta:g}" if self.config.min_delta else ""
        return f"{self._best:.4g} of step {self._best_step}{margin}"

    def state_dict(self) -> dict[str, Any]:
        """The best value and how long it has stood."""
        return {
            **self._monitor.watched,
            "best": self._best,
            "best_step": self._best_step,
            "waited": self._waited,
            "names": sorted(self._monitor.names),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, unless it is of another metric: ``callback`` may change."""
        self._monitor.names = set(state["names"])
        if all(state[name] == value for name, value in self._monitor.watched.items()):
            self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]
