"""One metric of the log watched over a run: whether it exists, which way is better, what counts as better.

Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import close
from rlx.core.text import safe_text

MODES = ("auto", "max", "min")
SHOWN = 40  # metrics named in a message
# Words of a metric's name, between / and _, that say which way is better; with one of UNCLEAR nothing does.
HIGHER = frozenset({"reward", "rewards", "accuracy", "accuracies", "margins", "score", "win", "f1"})
LOWER = frozenset({"loss", "perplexity", "nll", "error", "errors", "seconds"})
UNCLEAR = frozenset({
    "std", "chosen", "rejected", "unscorable", "gap", "ties", "verdict", "time",
})  # fmt: skip


def direction(metric: str) -> str | None:
    """``max`` or ``min``, as the metric's name says; None where it says neither or both."""
    words = set(re.split(r"[/_]", metric.lower()))
    higher, lower = bool(words & HIGHER), bool(words & LOWER)
    if higher == lower or words & UNCLEAR:
        return None
    return "max" if higher else "min"


def check_mode(metric: str, mode: str) -> None:
    """Refuse ``auto`` for a metric whose name does not say which way is better.

    Raises:
        ValueError: saying what to add; a Config's ``__post_init__`` passes it on.
    """
    if mode == "auto" and direction(metric) is None:
        raise ValueError(f"whether {safe_text(metric, 80)!r} is better high or low is not clear; set mode")


class Monitor:
    """Reads one metric from log lines.

    Args:
        metric: its name in ``metrics.jsonl``.
        mode: ``max``, ``min``, or ``auto`` for what the name says.
        owner: who asks, for messages.

    Attributes:
        metric: as given.
        higher: True if more is better.
        names: metrics that were seen so far.
    """

    def __init__(self, metric: str, mode: str, owner: str) -> None:
        check_mode(metric, mode)
        self.metric, self.owner = metric, owner
        self.higher = (direction(metric) if mode == "auto" else mode) == "max"
        self.names: set[str] = set()

    @property
    def watched(self) -> dict[str, str]:
        """What is watched, to be written down: metric and mode, ``max`` or ``min``."""
        return {"metric": self.metric, "mode": "max" if self.higher else "min"}

    def read(self, run: Any, metrics: Mapping[str, float]) -> float | None:
        """The metric's value in a log line; None for a line without it.

        Args:
            run: the run; its held-out data, its rewards and who else evaluates are looked at.
            metrics: the line.

        Raises:
            ConfigError: the metric is in no line so far, and every kind of line has been seen.
        """
        self.names |= set(metrics) - {"step"}
        if self.metric not in self.names and not self._may_come(run) and self._complete(run):
            raise self._unknown(run)
        return metrics.get(self.metric)

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether a value is better than another, or than none, by more than so much; NaN never is."""
        if not math.isfinite(value):
            return False
        if than is None:
            return True
        return value - than > by if self.higher else than - value > by

    def reaches(self, value: float, threshold: float) -> bool:
        """Whether a value is as good as a threshold; NaN never is."""
        return value >= threshold if self.higher else value <= threshold

    def _complete(self, run: Any) -> bool:
        """Whether the lines seen so far tell all metrics of the kind that is watched."""
        evaluated = any(name.startswith("eval/") for name in self.names)
        trained = any(not name.startswith("eval/") for name in self.names)
        if evaluated and self.metric.startswith("eval/"):
            return True
        waiting = run.evaluations == 0 and (run.eval_data is not None or run.events.heard("on_evaluate"))
        return trained and (evaluated or not waiting)

    def _may_come(self, run: Any) -> bool:
        """Whether it is a reward's mean, which a line lacks where no completion could be scored."""
        rewards, name = run.studio.rewards, self.metric.removeprefix("eval/")
        if rewards is None or (name != self.metric and run.eval_data is None):
            return False
        return name == "reward" or name in {f"reward/{reward.name}" for reward in rewards.rewards}

    def _unknown(self, run: Any) -> ConfigError:
        names = sorted(self.names)
        shown = ", ".join(safe_text(name, 60) for name in names[:SHOWN])
        without = self.metric.startswith("eval/") and run.eval_data is None
        asked = safe_text(self.metric, 80)
        return ConfigError(
            f"{self.owner}: this run logs no metric {asked!r}{close(self.metric, names)}",
            code="E-CONFIG-METRIC",
            got=shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""),
            hint="it has no held-out data: --eval-dataset" if without else "",
        )
