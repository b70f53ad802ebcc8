"""The parts of a run, and what can be asked of it from outside its loop."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.core.journal import Journal
from rlx.core.rollout import RunScorer

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator

    from rlx.core.batch import Rollouts
    from rlx.core.config import RunConfig
    from rlx.core.data import Data
    from rlx.core.folder import RunFolder
    from rlx.core.models import Policy
    from rlx.core.order import Order
    from rlx.core.precompute import WithReference
    from rlx.core.rollout import Studio
    from rlx.core.update import Updater
    from rlx.plugins.contract import Algorithm
    from rlx.plugins.events import Events


@dataclass
class Parts:
    """What a run consists of, and where it stands; ``rlx.core.loop.Run`` walks it.

    Attributes:
        config: the resolved configuration.
        accelerator: devices and processes.
        policy: what is trained, with its value function.
        algorithm: the loss.
        studio: samples and measures completions.
        updater: optimizer, schedule, micro-batches.
        data: the training data, of the kind that the algorithm eats.
        eval_data: held-out data, or None.
        order: which rows make which batch.
        events: callbacks.
        folder: the run folder, on the main process; None on the others.
        plan: what will be done, a line each.
        global_step: batches done.
        metrics_history: one entry a log line.
        rollouts: the last batch of rollouts.
        evaluated: the samples of the last evaluation.
        printers: where ``say`` writes; the last one wins.
        boundary: True while the state equals that between two steps.
        stopping: True once the run is to end after its current step.
        reported: the last step whose evaluation and log line, if due, are done.
        fingerprints: option → fingerprint of the files that it names.
    """

    config: RunConfig
    accelerator: Accelerator
    policy: Policy
    algorithm: Algorithm
    studio: Studio
    updater: Updater
    data: Data | WithReference
    eval_data: Data | WithReference | None
    order: Order
    events: Events
    folder: RunFolder | None
    plan: list[str]
    global_step: int = 0
    metrics_history: list[dict[str, Any]] = field(default_factory=list)
    rollouts: Rollouts | None = None
    evaluated: Rollouts | None = None
    printers: list[Callable[[str], None]] = field(default_factory=lambda: [print])
    boundary: bool = True
    stopping: bool = False
    reported: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings, self.tokenizer = self.config.settings, self.policy.tokenizer
        self.score = RunScorer(self.studio)
        self.journal = Journal(self.accelerator, self.studio.clock)

    @property
    def total_steps(self) -> int:
        """Batches of the whole run."""
        return self.order.total_steps

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return bool(self.accelerator.is_main_process)

    @property
    def path(self) -> Path:
        """Where the run folder is."""
        return Path(self.settings.output_dir) if self.folder is None else self.folder.path

    def say(self, line: str) -> None:
        """Print a line, on the main process only."""
        if self.is_main:
            self.printers[-1](line)
            sys.stdout.flush()  # a pipe or a file shows it now, not after the next thousand lines

    def stop(self) -> None:
        """End the run after this step, as if it were the last."""
        self.stopping = True
