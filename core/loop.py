"""The core loop: batches → rollouts → algorithm.prepare → mini-batches → one optimizer step each → events.

A *step* is one batch of rows with everything that is done with it; it may hold several optimizer steps.
Everything that decides a step (rows, samples, shuffles, dropout) is seeded by its number, so the state
between two steps is small.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlx.core import snapshot
from rlx.core.evaluate import evaluate
from rlx.core.functional import moments
from rlx.core.meter import Meter, total
from rlx.core.order import Order, share
from rlx.core.rollout import RunScorer, Studio
from rlx.core.session import close, session
from rlx.core.streams import generator

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator

    from rlx.core.batch import Batch, Rollouts, Sequences
    from rlx.core.config import RunConfig
    from rlx.core.folder import RunFolder
    from rlx.core.models import Policy
    from rlx.core.update import Updater
    from rlx.plugins.contract import Algorithm
    from rlx.plugins.events import Events


@dataclass
class Run:
    """A training run, driven by ``rlx.run`` or by hand: ``for metrics in run``, ``run.step()``.

    ``with`` makes a run driven by hand begin and end as ``rlx.run`` does: events, final policy, ``close``.

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
        meter: metrics since the last log line.
        tokens: of all batches so far.
        reported: the last step whose evaluation and log line, if due, are done.
        fingerprints: option → fingerprint of the files that it names.
    """

    config: RunConfig
    accelerator: Accelerator
    policy: Policy
    algorithm: Algorithm
    studio: Studio
    updater: Updater
    data: Any  # rlx.core.data.Data, or preference data with its reference log-probs
    eval_data: Any
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
    meter: Meter = field(default_factory=Meter)
    tokens: int = 0
    reported: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings, self.tokenizer = self.config.settings, self.policy.tokenizer
        self.score = RunScorer(self.studio)
        self.began = self.since = time.perf_counter()
        self.tokens_since = self.tokens

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

    def close(self, status: str = "finished", exit_code: int = 0) -> None:
        """Give back the folder and what the generator holds; the manifest says how the run ended.

        Args:
            status: ``finished``, ``interrupted`` or ``failed``.
            exit_code: what the command line will exit with.
        """
        close(self, status, exit_code)

    def say(self, line: str) -> None:
        """Print a line, on the main process only."""
        if self.is_main:
            self.printers[-1](line)
            sys.stdout.flush()  # a pipe or a file shows it now, not after the next thousand lines

    def stop(self) -> None:
        """End the run after this step, as if it were the last."""
        self.stopping = True

    def save(self) -> Path | None:
        """Write a checkpoint, between two steps; see ``rlx.core.snapshot.save``."""
        return snapshot.save(self)

    def __enter__(self) -> Run:
        self._session = session(self)
        return self._session.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._session.__exit__(*error)

    def __iter__(self) -> Iterator[dict[str, float]]:
        while self.global_step < self.total_steps and not self.stopping:
            yield self.step()

    def step(self) -> dict[str, float]:
        """One batch, from rows to optimizer steps.

        Returns:
            The metrics of the log line, where this step writes one; else an empty dict.
        """
        online = self.algorithm.eats == "prompts"
        batch = self.prepare(self.roll_out() if online else self.collate())
        for mini_batch in self.minibatches(batch):
            if self.update(mini_batch) == "stop":
                break
        return self.end_step(batch)

    def roll_out(self) -> Rollouts:
        """The rollouts of the next step: sampled, rewarded, measured."""
        rows, mine = self.next_rows()
        before = self.studio.reward_state()
        try:
            rollouts = self.studio.roll_out(
                self.data.batch(rows, mine),
                self.algorithm.completions_per_prompt,
                self.algorithm.needs,
                self.global_step,
                mine,
            )
            self.rollouts = rollouts
            self.events.emit("on_rollouts", run=self, rollouts=rollouts)
        except BaseException:
            self.studio.load_reward_state(before)  # a checkpoint can still be taken, as before this step
            raise
        return rollouts

    def collate(self) -> Batch:
        """The batch of the next step of an algorithm that does not sample, reference log-probs measured."""
        batch: Batch = self.studio.compare(self.data.batch(*self.next_rows()), self.algorithm.needs)
        return batch

    def next_rows(self) -> tuple[list[int], list[int]]:
        """Row numbers of the next batch over all processes, and the places in it that are this process's."""
        rows = self.order.rows(self.global_step)
        return rows, list(share(len(rows), self.accelerator.process_index, self.accelerator.num_processes))

    def prepare(self, batch: Batch) -> Batch:
        """What the algorithm makes of a batch, once, before the mini-batches: advantages and the like."""
        self.boundary = False
        prepared: Batch = self.algorithm.prepare(batch, self.score)
        return prepared

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """Epochs × mini-batches of a prepared batch, shuffled anew each epoch.

        The shuffle is over the rows of all processes; each takes those it holds, so that a mini-batch has
        the same rows whatever the number of processes. Mini-batches that a ``break`` leaves out are made
        up in the schedule.
        """
        algorithm, before = self.algorithm, self.updater.done
        held = torch.zeros(self.accelerator.num_processes, dtype=torch.long, device=self.accelerator.device)
        held[self.accelerator.process_index] = len(batch)
        sizes: list[int] = total(self.accelerator, held).tolist()
        first, rows = sum(sizes[: self.accelerator.process_index]), sum(sizes)
        try:
            for epoch in range(algorithm.epochs):
                shuffle = generator(self.settings.seed, "minibatch", self.global_step, epoch)
                order = torch.randperm(rows, generator=shuffle)
                for part in range(algorithm.mini_batches):
                    chosen = share(rows, part, algorithm.mini_batches)
                    mine = order[chosen.start : chosen.stop] - first
                    mine = mine[(mine >= 0) & (mine < len(batch))]
                    if len(chosen):
                        yield batch.take(mine.to(batch.sequences.ids.device))
        finally:
            expected = algorithm.epochs * algorithm.mini_batches
            self.updater.skip(expected - (self.updater.done - before))

    def update(self, mini_batch: Batch) -> str:
        """One optimizer step on a mini-batch; what became of it: ``step``, ``skip`` or ``stop``."""
        self.boundary = False
        with self.studio.clock.measure("update"):
            outcome = self.updater(mini_batch)
        self.meter.merge(outcome.metrics)
        self.events.emit("on_loss", run=self, batch=mini_batch, loss=outcome.loss)
        return outcome.verdict

    def end_step(self, batch: Batch) -> dict[str, float]:
        """Count the step, evaluate and write a log line when it is time, and tell the callbacks.

        Returns:
            The log line, or an empty dict.
        """
        if self.rollouts is not None:
            self._observe(self.rollouts)
        else:
            self._count(batch.sequences)
        for name, values in batch.metrics.items():
            self.meter.add(name, values)
        self.global_step += 1
        self.boundary = True
        return self.report()

    def report(self) -> dict[str, float]:
        """Evaluate and write a log line if this step is due one, and tell the callbacks that it ended.

        The meter is read last, so that nothing is lost if the evaluation fails: a resume does it again.

        Returns:
            The log line, or an empty dict.
        """
        last = self.global_step >= self.total_steps or self.stopping
        every = self.settings.eval_steps
        evaluating = last or (every is not None and self.global_step % every == 0)
        logged: dict[str, float] = {}
        if evaluating or self.global_step % self.settings.logging_steps == 0:
            evaluation = evaluate(self) if evaluating else {}
            logged = self._read_meter()
            self.log(logged | evaluation)
        self.reported = self.global_step
        self.events.emit("on_step_end", run=self, metrics=logged)
        return logged

    def log(self, metrics: dict[str, float]) -> None:
        """Write one line of metrics and tell the callbacks."""
        line = {"step": self.global_step, **metrics}
        self.metrics_history.append(line)
        if self.folder is not None:
            self.folder.log_metrics(line)
        self.events.emit("on_log", run=self, metrics=line)
        self.since, self.tokens_since = time.perf_counter(), self.tokens

    def _read_meter(self) -> dict[str, float]:
        now = time.perf_counter()
        for name, seconds in self.studio.clock.seconds.items():
            self.meter.add(name, seconds)
        metrics = self.meter.means(self.accelerator)
        metrics |= {
            "learning_rate": float(self.updater.scheduler.get_last_lr()[0]),
            "tokens": float(self.tokens),
            "tokens_per_second": (self.tokens - self.tokens_since) / max(now - self.since, 1e-9),
        }
        self.meter = Meter()
        self.studio.clock.seconds.clear()
        return dict(sorted(metrics.items()))

    def _observe(self, rollouts: Rollouts) -> None:
        """Take in what the rollouts themselves tell, whatever the algorithm makes of them."""
        counts = rollouts.sequences.counts.float()
        seen = {
            **rollouts.metrics,
            "completion/length": counts,
            "completion/eos_rate": rollouts.finished.float(),
        }
        if rollouts.score is not None:
            applies = ~rollouts.score.isnan()
            reward = rollouts.score[applies]
            seen |= {"reward": reward, "reward/unscorable": (~applies).float()}
            seen |= {f"reward/{name}": values[~values.isnan()] for name, values in rollouts.rewards.items()}
            seen["reward/std"] = moments(reward, self.score.total)[2].sqrt()
        for name, values in seen.items():
            self.meter.add(name, values)
        self._count(rollouts.sequences)

    def _count(self, sequences: Sequences) -> None:
        self.tokens += int(total(self.accelerator, sequences.lengths.sum()))
