"""The parts of a run, and what can be asked of it from outside its loop."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.core.components import short_name
from rlx.core.journal import Journal
from rlx.core.scorer import RunScorer
from rlx.core.text import safe_text
from rlx.plugins.events import has_state
from rlx.plugins.references import make

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


LONGEST_SAID = 4000  # characters of a line


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
        evaluations: how many there were, those before a resume left out.
        printers: where ``say`` writes; the last one wins.
        boundary: True while the state equals that between two steps.
        together: True after a failure that all processes heard of: they stand at the same place.
        stopping: True once the run is to end after its current step.
        stop_reason: why, in words; empty where nobody said.
        saving: True once a checkpoint is to be written after the current step.
        saved: the last step with a checkpoint; -1 before there is one.
        failed_saves: checkpoints in a row that could not be written.
        protected: steps whose checkpoints stay, whatever ``save_total_limit`` says.
        final_checkpoint: the checkpoint whose policy the run ends with; None for the policy as it is.
        reported: the last step whose log line, if due, is written; -1 before there is one.
        ended: the last step of whose end the callbacks were told.
        fingerprints: option → fingerprint of the files that it names.
        callback_states: state in the checkpoint of callbacks that are not there; one that is added takes it.
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
    evaluations: int = 0
    printers: list[Callable[[str], None]] = field(default_factory=lambda: [print])
    boundary: bool = True
    together: bool = False
    stopping: bool = False
    stop_reason: str = ""
    saving: bool = False
    saved: int = -1
    failed_saves: int = 0
    protected: set[int] = field(default_factory=set)
    final_checkpoint: Path | None = None
    reported: int = -1
    ended: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)
    callback_states: dict[str, Any] = field(default_factory=dict)

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
        """Print a line, or several, on the main process only; what acts on a terminal is shown instead."""
        if self.is_main:
            shown = [safe_text(part, LONGEST_SAID) for part in line.split("\n")]
            self.printers[-1]("\n".join(shown))
            sys.stdout.flush()  # a pipe or a file shows it now, not after the next thousand lines

    def stop(self, reason: str = "") -> None:
        """End the run after this step, as if it were the last.

        Args:
            reason: why, for the last lines and the manifest; the first one stays.
        """
        self.stopping, self.stop_reason = True, self.stop_reason or reason

    @property
    def callbacks(self) -> dict[str, Any]:
        """Name → callback, in the order in which they are called."""
        return self.events.named

    def add_callback(self, callback: Any, **options: Any) -> Any:
        """Add a callback while the run goes; it is told of everything from the next event on.

        One that is added after the run began is told ``on_run_start`` at once. In a resumed run it first
        takes back the state that a callback of its name had in the checkpoint.

        Args:
            callback: an object, a class, or a reference such as ``early_stopping``.
            options: of the callback, where it is a class or a reference.

        Returns:
            The callback.

        Raises:
            RlxError: it does not exist, cannot be used, or was added before.
        """
        found = callback if isinstance(callback, str | type) else type(callback)
        made = make("callback", callback, options)
        name = self.events.add(made, short_name("callback", found), owned=made is not callback)
        added = self.events.named[name]
        try:
            if name in self.callback_states and has_state(added):
                added.load_state_dict(self.callback_states.pop(name))
            self.events.begin(name, self)
        except BaseException:
            self.events.remove(added)
            raise
        return added

    def remove_callback(self, callback: Any) -> Any:
        """Remove a callback while the run goes; it is told ``on_run_end`` and nothing after that.

        Its state is in no later checkpoint. A resume builds the callbacks of the configuration anew.

        Args:
            callback: its name in ``callbacks``, the object, or its class.

        Returns:
            The callback.

        Raises:
            ValueError: there is none, or there are several of that class.
        """
        name = self.events.find(callback)
        removed = self.events.named[name]
        try:
            self.events.end(name, self)
        finally:
            if name in self.events.named:  # an observer that failed just now is switched off already
                self.events.remove(removed)
        return removed
