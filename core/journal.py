"""What a run measures between two log lines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rlx.core.functional import moments
from rlx.core.meter import Meter, total

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.batch import Batch, Rollouts, Sequences
    from rlx.core.clock import Clock
    from rlx.core.update import Updater


class Journal:
    """Collects metrics on the device, and reads them once a log line.

    Attributes:
        meter: what was measured since the last log line.
        tokens: of all sequences so far, over all processes.
        began: when the run was put together, in seconds of ``time.perf_counter``.
    """

    def __init__(self, accelerator: Accelerator, clock: Clock) -> None:
        self.accelerator, self.clock = accelerator, clock
        self.meter, self.tokens = Meter(), 0
        self.began = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Measure speed from now on: an evaluation or a log line lies in between."""
        self.since, self.tokens_before = time.perf_counter(), self.tokens

    def step(self, batch: Batch, rollouts: Rollouts | None) -> None:
        """Take in a batch that was trained on, and the rollouts that it came from, if any."""
        if rollouts is not None:
            self.observe(rollouts)
        self.count(batch.sequences if rollouts is None else rollouts.sequences)
        for name, values in batch.metrics.items():
            self.meter.add(name, values)

    def observe(self, rollouts: Rollouts) -> None:
        """Take in what the rollouts themselves tell, whatever the algorithm makes of them."""
        seen = {
            **rollouts.metrics,
            "completion/length": rollouts.sequences.counts.float(),
            "completion/eos_rate": rollouts.finished.float(),
        }
        if rollouts.score is not None:
            applies = ~rollouts.total_score.isnan()
            reward = rollouts.total_score[applies]
            seen |= {"reward": reward, "reward/unscorable": (~applies).float()}
            seen |= {f"reward/{name}": values[~values.isnan()] for name, values in rollouts.rewards.items()}
            seen["reward/std"] = moments(reward, lambda values: total(self.accelerator, values))[2].sqrt()
        for name, values in seen.items():
            self.meter.add(name, values)

    def count(self, sequences: Sequences) -> None:
        """Count the tokens of a batch."""
        self.tokens += int(total(self.accelerator, sequences.lengths.sum()))

    def read(self, updater: Updater) -> dict[str, float]:
        """The metrics since the last reading, over all processes; the next reading starts anew."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        for name, spent in self.clock.seconds.items():
            self.meter.add(name, spent)
        metrics = self.meter.means(self.accelerator) | {
            "learning_rate": float(updater.scheduler.get_last_lr()[0]),
            "tokens": float(self.tokens),
            "tokens_per_second": (self.tokens - self.tokens_before) / seconds,
        }
        self.meter = Meter()
        self.clock.seconds.clear()
        return dict(sorted(metrics.items()))
