"""The core loop: batches → rollouts → algorithm.prepare → mini-batches → one optimizer step each → events.

A *step* is one batch of rows with everything that is done with it; it may hold several optimizer steps.
Everything that decides a step (rows, samples, shuffles, dropout) is seeded by its number, so the state
between two steps is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from rlx.core import snapshot
from rlx.core.errors import DivergedError
from rlx.core.evaluate import evaluate
from rlx.core.evidence import keep_batch
from rlx.core.meter import total
from rlx.core.order import share
from rlx.core.parts import Parts
from rlx.core.peers import agreed, heed_all
from rlx.core.session import close, session
from rlx.core.streams import generator

if TYPE_CHECKING:
    from rlx.core.batch import Batch, Prompts, Rollouts


class Run(Parts):
    """A training run, driven by ``rlx.run`` or by hand: ``for metrics in run``, ``run.step()``.

    ``with`` makes a run driven by hand begin and end as ``rlx.run`` does: events, final policy, ``close``.
    """

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
            with agreed(self, "sampling and scoring"):
                rollouts = self.studio.roll_out(
                    cast("Prompts", self.data.batch(rows, mine)),
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
        rows = self.next_rows()
        with agreed(self, "measuring the batch"):
            batch: Any = self.data.batch(*rows)
            measured: Batch = self.studio.compare(batch, self.algorithm.needs)
        return measured

    def next_rows(self) -> tuple[list[int], list[int]]:
        """Row numbers of the next batch over all processes, and the places in it that are this process's."""
        rows = self.order.rows(self.global_step)
        return rows, list(share(len(rows), self.accelerator.process_index, self.accelerator.num_processes))

    def prepare(self, batch: Batch) -> Batch:
        """What the algorithm makes of a batch, once, before the mini-batches: advantages and the like."""
        self.boundary = False
        with agreed(self, "the preparation of a batch"):
            prepared = cast("Batch", self.algorithm.prepare(batch, self.score))
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
        try:
            with self.studio.clock.measure("update"):
                outcome = self.updater(mini_batch)
        except DivergedError as error:
            keep_batch(self, mini_batch, error)
            raise
        self.journal.meter.merge(outcome.metrics)
        self.events.emit("on_loss", run=self, batch=mini_batch, loss=outcome.loss)
        return outcome.verdict

    def end_step(self, batch: Batch) -> dict[str, float]:
        """Count the step, and ``report``."""
        self.journal.step(batch, self.rollouts)
        self.global_step += 1
        self.boundary = True
        return self.report()

    def report(self) -> dict[str, float]:
        """Evaluate and write a log line if this step is due one, and tell the callbacks that it ended.

        The journal is read last, so that nothing is lost if the evaluation fails: a resume does it again.

        Returns:
            The log line, or an empty dict.
        """
        heed_all(self)
        last = self.global_step >= self.total_steps or self.stopping
        every = self.settings.eval_steps
        evaluating = last or (every is not None and self.global_step % every == 0)
        logged: dict[str, float] = {}
        due = evaluating or self.global_step % self.settings.logging_steps == 0
        if due and self.reported < self.global_step:
            evaluation = evaluate(self) if evaluating else {}
            logged = self.journal.read(self.updater)
            self.log(logged | evaluation)
        self.reported = self.ended = self.global_step
        self.events.emit("on_step_end", run=self, metrics=logged)
        heed_all(self)
        if self.stopping and not evaluating:  # a callback has just made this step the last
            if late := evaluate(self):
                self.log(late)
            heed_all(self)
        if self.saving:
            snapshot.attempt(self)
        return logged

    def log(self, metrics: dict[str, float]) -> None:
        """Write one line of metrics and tell the callbacks."""
        line = {"step": self.global_step, **metrics}
        self.metrics_history.append(line)
        with agreed(self, "writing the log line"):
            if self.folder is not None:
                self.folder.log_metrics(line)
        self.reported = self.global_step  # a run that is resumed does not write it twice, whatever fails now
        self.events.emit("on_log", run=self, metrics=line)
        self.journal.restart()

    def close(self, status: str = "finished", exit_code: int = 0) -> None:
        """Give back the folder and what the studio holds; the manifest says how the run ended.

        Args:
            status: ``finished``, ``interrupted`` or ``failed``.
            exit_code: what the command line will exit with.
        """
        close(self, status, exit_code)

    def save(self) -> Path | None:
        """Write a checkpoint, between two steps, unless this step has one; see ``rlx.core.snapshot.save``."""
        if self.saved == self.global_step:
            return None if self.folder is None else self.path / f"checkpoint-{self.saved}"
        return snapshot.save(self)

    def __enter__(self) -> Run:
        self._session = session(self)
        return self._session.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._session.__exit__(*error)
