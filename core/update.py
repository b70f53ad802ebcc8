"""One mini-batch, one optimizer step: micro-batches by token budget, one global count, a finite check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rlx.core.batch import Batch, Loss, Rollouts, Scores
from rlx.core.classify import classify, parts_of
from rlx.core.errors import DivergedError, MemoryExhausted
from rlx.core.gradients import GradientBuffers
from rlx.core.logprobs import score, trunk_for
from rlx.core.memory import kept_budget
from rlx.core.meter import Meter, largest, total
from rlx.core.optim import (
    build_optimizer,
    build_scheduler,
    load_optimizer_state,
    optimizer_state,
    place_scheduler,
)
from rlx.core.peers import elsewhere
from rlx.core.recompute import can_recompute, recomputes
from rlx.core.states import micro_batches
from rlx.core.streams import rng_scope

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.batch import Sequences
    from rlx.core.models import Policy
    from rlx.core.settings import Settings
    from rlx.plugins.contract import Algorithm

SKIPS_IN_A_ROW = 3
MESSAGE = 2**28  # bytes of gradients that processes add up at a time


@dataclass(frozen=True)
class Outcome:
    """What became of one mini-batch.

    Attributes:
        verdict: ``step``: the weights moved; ``skip``: they did not; ``stop``: nor will they, in this batch.
        loss: over all processes.
        metrics: of this process.
    """

    verdict: str
    loss: float
    metrics: Meter


class Updater:
    """Turns mini-batches into optimizer steps.

    Args:
        policy: what is trained.
        algorithm: gives the loss.
        settings: optimizer, schedule, budget.
        accelerator: devices, processes, mixed precision.
        total_updates: mini-batches of the whole run, the horizon of the schedule.
        budget: tokens of one forward and backward, the same on all processes.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        settings: Settings,
        accelerator: Accelerator,
        total_updates: int,
        budget: int,
    ) -> None:
        self.policy, self.algorithm, self.settings, self.accelerator = (
            policy,
            algorithm,
            settings,
            accelerator,
        )
        self.parameters = policy.trainable()
        self.buffers = GradientBuffers([policy.model, policy.value_model], self.parameters.values())
        self.optimizer = build_optimizer(self.parameters, settings)
        self.scheduler = build_scheduler(self.optimizer, settings, total_updates)
        self.budget = self.planned = budget  # the first halves when memory runs out
        self.done = 0  # mini-batches gone through, the position of schedule and dropout stream
        self.skipped_in_a_row = 0
        self.say: Callable[[str], None] = lambda line: None  # what the user should hear of

    def score(self, sequences: Sequences) -> Scores:
        """One differentiable forward of everything that the loss needs."""
        needs = self.algorithm.needs
        if "reward" in needs:
            options: dict[str, Any] = {"token_budget": self.budget, "accelerator": self.accelerator}
            return Scores(torch.empty(0), reward=classify(self.policy.model, sequences, **options))
        now = score(
            self.policy.model,
            sequences,
            temperature=self.settings.temperature,
            entropy="entropy" in needs,
            extras=needs,
            value_head=self.policy.value_head if "values" in needs else None,
            accelerator=self.accelerator,
            buffers=self.buffers,
        )
        if "values" in needs and self.policy.value_model is not None:
            with self.accelerator.autocast():
                now = replace(now, values=self.policy.value_model.values(sequences, self.budget))
        return now

    def __call__(self, batch: Batch) -> Outcome:
        """Go through one mini-batch: the rows of it that this process holds.

        Raises:
            DivergedError: the loss or the gradient is not finite; no weight has moved.
            MemoryExhausted: one row alone does not fit.
            PeerError: the loss failed on another process.
        """
        sizes = self.sizes(batch)
        while True:
            meter, value, fits = self.accumulate(batch, sizes)
            if fits:
                break
            self.make_room(batch)
        tokens = total(self.accelerator, batch.size("tokens").to(self.accelerator.device))
        outcome = self.finish(meter, value, empty=not float(tokens))
        self.skip(1)
        return outcome

    def skip(self, count: int) -> None:
        """Count mini-batches as gone through; the schedule goes on, whether the weights moved or not."""
        self.done += count
        place_scheduler(self.scheduler, self.done)

    def sizes(self, batch: Batch) -> dict[str, float]:
        """What each loss term is divided by: its count over all processes, at least 1."""
        return {by: self.count(batch, by) for by in self.algorithm.loss_per}

    def count(self, batch: Batch, by: str) -> float:
        """The count of one loss term over all processes, at least 1."""
        return max(
            1.0, float(total(self.accelerator, self.algorithm.size(batch, by).to(self.accelerator.device)))
        )

    def accumulate(self, batch: Batch, sizes: dict[str, float]) -> tuple[Meter, torch.Tensor, bool]:
        """Gradients of all micro-batches, from zero: metrics, this process's loss, and whether it fitted."""
        self.optimizer.zero_grad(set_to_none=True)
        meter, exhausted, error = Meter(), False, None
        value = torch.zeros((), device=self.accelerator.device)
        with (
            rng_scope(self.settings.seed, "dropout", self.done, self.accelerator.process_index),
            self.policy.active(training=True),
        ):
            try:
                active, idle = self.parted(batch)
                with self.buffers.attached():
                    for part in self.losses(active, sizes, meter):
                        part.backward()
                        value += part.detach()
                if idle is not None:
                    value += self.as_sampled(idle, sizes, meter)
            except torch.OutOfMemoryError:
                exhausted = True
            except Exception as raised:  # raised again below, once the others know
                error = raised
        # Every process hears of it, so that all go through the mini-batch again with the same smaller budget,
        # or end.
        flags = torch.tensor([exhausted, error is not None], device=self.accelerator.device).float()
        some_exhausted, some_failed = total(self.accelerator, flags).tolist()
        if error is not None:
            raise error
        if some_failed:
            raise elsewhere(self.accelerator, "the loss of a mini-batch")
        return meter, value, not some_exhausted

    def losses(self, batch: Batch, sizes: dict[str, float], meter: Meter) -> Iterator[torch.Tensor]:
        """This process's loss, a () part a micro-batch; the metrics go into the meter."""
        for rows in self.micro_batches(batch):
            micro = batch.take(rows).to(self.accelerator.device)
            yield self.put_together(self.algorithm.loss(micro, self.score(micro.sequences)), sizes, meter)

    def put_together(self, loss: Loss, sizes: dict[str, float], meter: Meter) -> torch.Tensor:
        """A loss as a () tensor; its metrics go into the meter."""
        for name, values in loss.metrics.items():
            meter.add(name, values)
        return torch.stack([terms.sum() / sizes[by] for by, terms in loss.terms.items()]).sum()

    def parted(self, batch: Batch) -> tuple[Batch, Rollouts | None]:
        """The rows that have a gradient, and those that the algorithm knows to have none, if any."""
        if not isinstance(batch, Rollouts) or not knows_idle(self.algorithm):
            return batch, None
        idle = self.algorithm.idle(batch)
        if idle is None or not bool(idle.any()):
            return batch, None
        return batch.take((~idle).nonzero()[:, 0]), batch.take(idle.nonzero()[:, 0])

    @torch.no_grad()
    def as_sampled(self, idle: Rollouts, sizes: dict[str, float], meter: Meter) -> torch.Tensor:
        """The loss, (), and the metrics of rows without gradient, from the log-probs of sampling.

        On the first pass those are what a forward would give.
        """
        rows = idle.to(self.accelerator.device)
        return self.put_together(self.algorithm.loss(rows, Scores(rows.old)), sizes, meter)

    def micro_batches(self, batch: Batch) -> list[torch.Tensor]:
        """Rows of each micro-batch, by the tokens of one forward and backward."""
        sequences, model = batch.sequences, self.policy.model
        if not len(sequences):
            return []
        trunks: list[torch.nn.Module | None]
        if "reward" in self.algorithm.needs:
            trunks = [parts_of(model)[0]]
        else:
            trunks = [trunk_for(model, sequences.to(self.accelerator.device))]
            if "values" in self.algorithm.needs and self.policy.value_model is not None:
                trunks.append(self.policy.value_model.backbone)
        return micro_batches(trunks, sequences, self.budget, batch.per_row)

    @torch.no_grad()
    def measure(self, batch: Batch, sizes: dict[str, float]) -> tuple[torch.Tensor, Meter]:
        """This process's loss on a batch, (), and its metrics; nothing is trained, nobody waited for."""
        meter, value = Meter(), torch.zeros((), device=self.accelerator.device)
        with self.policy.active():
            for part in self.losses(batch, sizes, meter):
                value += part
        return value, meter

    def make_room(self, batch: Batch) -> None:
        """Halve the token budget after memory ran out, or recompute activations where one row is too much.

        The mini-batch is gone through again. Where activations are recomputed it begins with the budget that
        was planned, as a run would that had recomputed them from the start.

        Raises:
            MemoryExhausted: one row does not fit, and activations are recomputed already, or may not be.
        """
        active, _ = self.parted(batch)
        mine = int(active.sequences.lengths.max()) * active.per_row if len(active) else 0
        longest = int(largest(self.accelerator, mine))
        if self.budget > longest:
            self.budget //= 2
        else:
            what = f"out of memory with one row of {longest} tokens in a forward and backward"
            trunks = self.policy.trunks
            able = not recomputes(*trunks) and can_recompute(*trunks)
            if not able or self.settings.gradient_checkpointing != "auto":
                hint = "gradient_checkpointing, lora_r" if able else "lora_r"
                raise MemoryExhausted(
                    what, hint=f"lower max_completion_length, or set {hint} or dtype: bfloat16"
                )
            self.policy.with_gradient_checkpointing()
            self.budget = self.planned
            self.say(f"{what}: gradient checkpointing is on from here on")
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(self, meter: Meter, value: torch.Tensor, *, empty: bool) -> Outcome:
        """Sum gradients over processes, clip, ask the algorithm, check that all is finite, step.

        Args:
            meter: the metrics of the mini-batch; an algorithm may have none.
            value: this process's loss.
            empty: no process has a token of it; then there is nothing to ask about and to step on.
        """
        parameters = list(self.parameters.values())
        sum_gradients(parameters, self.accelerator)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf))
        loss, means = float(total(self.accelerator, value)), meter.means(self.accelerator)
        verdict = "skip" if empty and not means else self.algorithm.verdict(means)
        broken = verdict == "step" and not (math.isfinite(loss) and math.isfinite(norm))
        if broken:
            verdict = self.refuse(loss, norm)
        if verdict == "step":
            self.optimizer.step()
            self.skipped_in_a_row = 0
            meter.add("loss", loss)
            meter.add("grad_norm", norm)
        else:
            meter = Meter()  # the numbers of an exploded mini-batch would hide what the others did
        meter.add("update/skipped", float(verdict != "step"))
        meter.add("update/nonfinite", float(broken))
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(verdict, loss, meter)

    def refuse(self, loss: float, norm: float) -> str:
        """Stop, or skip the step, because the loss or the gradient is not finite."""
        self.skipped_in_a_row += 1
        if self.settings.nonfinite == "skip" and self.skipped_in_a_row <= SKIPS_IN_A_ROW:
            return "skip"
        raise DivergedError(
            f"the loss or the gradient is not finite at optimizer step {self.done + 1}; no weight has moved",
            got=f"loss {loss}, gradient norm {norm}",
            expected="finite numbers",
            hint="lower learning_rate, look at completions.jsonl, or allow it with nonfinite: skip",
        )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state by parameter name, the position, the budget and what it began with."""
        return {
            "optimizer": optimizer_state(self.optimizer),
            "done": self.done,
            "skipped_in_a_row": self.skipped_in_a_row,
            "budget": self.budget,
            "planned": self.planned,
            "asked": self.settings.max_tokens_per_micro_batch,
            "checkpointing": recomputes(*self.policy.trunks)
            if self.settings.gradient_checkpointing == "auto"
            else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; bit-exact."""
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.done, self.skipped_in_a_row = state["done"], state["skipped_in_a_row"]
        place_scheduler(self.scheduler, self.done)
        self.budget = kept_budget(state, self.settings, self.budget)
        first = {**state, "budget": state.get("planned", self.planned)}
        self.planned = kept_budget(first, self.settings, self.planned)
        on, now = state.get("checkpointing"), recomputes(*self.policy.trunks)
        if self.settings.gradient_checkpointing == "auto" and on is not None and on != now:
            self.policy.with_gradient_checkpointing(on)


def knows_idle(algorithm: Algorithm) -> bool:
    """Whether its ``idle`` speaks of its ``loss``: not if a subclass or a caller replaced the loss alone."""
    for members in (vars(algorithm), *map(vars, type(algorithm).__mro__)):
        if "idle" in members or "loss" in members:
            return "idle" in members
    return False


def sum_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all processes, in messages of ``MESSAGE`` bytes: more is held several times.

    Losses are divided by global counts, so the sum is the gradient of the whole mini-batch. Unlike a wrapper
    that reduces during backward, this lets processes have different numbers of micro-batches, or none.
    Where there was none at all the gradient is zero, and moments and decay act as with any other.
    """
    alone = accelerator.num_processes == 1
    if alone and any(parameter.grad is not None for parameter in parameters):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if alone:
        return
    for part in _messages(parameters):
        grads = [parameter.grad for parameter in part if parameter.grad is not None]
        flat = total(accelerator, torch.cat([grad.flatten() for grad in grads]))
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))  # not a view of the message, which would keep all of it


def _messages(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters that are reduced together, the same on all processes: of one type, ``MESSAGE`` bytes."""
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        part: list[torch.nn.Parameter] = []
        size = 0
        for parameter in parameters:
            if parameter.dtype != dtype:
                continue
            if part and size + parameter.nbytes > MESSAGE:
                yield part
                part, size = [], 0
            part.append(parameter)
            size += parameter.nbytes
        yield part
