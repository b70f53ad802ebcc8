"""One mini-batch, one optimizer step: micro-batches by token budget, one global count, a finite check."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rlx.core.batch import Batch, Scores
from rlx.core.classify import classify
from rlx.core.errors import DivergedError, MemoryExhausted
from rlx.core.logprobs import score
from rlx.core.meter import Meter, largest, total
from rlx.core.microbatch import cut
from rlx.core.optim import (
    build_optimizer,
    build_scheduler,
    load_optimizer_state,
    optimizer_state,
    place_scheduler,
)
from rlx.core.streams import rng_scope

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.batch import Sequences
    from rlx.core.models import Policy
    from rlx.core.settings import Settings
    from rlx.plugins.contract import Algorithm

SKIPS_IN_A_ROW = 3


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
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        settings: Settings,
        accelerator: Accelerator,
        total_updates: int,
    ) -> None:
        self.policy, self.algorithm, self.settings, self.accelerator = (
            policy,
            algorithm,
            settings,
            accelerator,
        )
        self.parameters = policy.trainable()
        self.optimizer = build_optimizer(self.parameters, settings)
        self.scheduler = build_scheduler(self.optimizer, settings, total_updates)
        self.budget = token_budget(settings, accelerator.device)
        self.done = 0  # mini-batches gone through, the position of schedule and dropout stream
        self.skipped_in_a_row = 0

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
        """
        sizes = {by: self.count(batch, by) for by in self.algorithm.loss_per}
        while True:
            meter, value, fits = self.accumulate(batch, sizes)
            if fits:
                break
            self.halve(batch)
        outcome = self.finish(meter, value)
        self.skip(1)
        return outcome

    def skip(self, count: int) -> None:
        """Count mini-batches as gone through; the schedule goes on, whether the weights moved or not."""
        self.done += count
        place_scheduler(self.scheduler, self.done)

    def count(self, batch: Batch, by: str) -> float:
        """The count of one loss term over all processes, at least 1."""
        return max(
            1.0, float(total(self.accelerator, self.algorithm.size(batch, by).to(self.accelerator.device)))
        )

    def accumulate(self, batch: Batch, sizes: dict[str, float]) -> tuple[Meter, torch.Tensor, bool]:
        """Gradients of all micro-batches, from zero: metrics, this process's loss, and whether it fitted."""
        self.optimizer.zero_grad(set_to_none=True)
        meter, exhausted = Meter(), 0.0
        value = torch.zeros((), device=self.accelerator.device)
        with (
            rng_scope(self.settings.seed, "dropout", self.done, self.accelerator.process_index),
            self.policy.active(training=True),
        ):
            try:
                for part in self.losses(batch, sizes, meter):
                    part.backward()
                    value += part.detach()
            except torch.OutOfMemoryError:
                exhausted = 1.0
        # Every process hears of it, so that all go through the mini-batch again with the same smaller budget.
        flag = torch.tensor(exhausted, device=self.accelerator.device)
        return meter, value, not bool(total(self.accelerator, flag))

    def losses(self, batch: Batch, sizes: dict[str, float], meter: Meter) -> Iterator[torch.Tensor]:
        """This process's loss, a () part a micro-batch; the metrics go into the meter."""
        for rows in cut(batch.sequences.lengths, self.budget, per_row=batch.per_row):
            micro = batch.take(rows).to(self.accelerator.device)
            loss = self.algorithm.loss(micro, self.score(micro.sequences))
            yield torch.stack([terms.sum() / sizes[by] for by, terms in loss.terms.items()]).sum()
            for name, values in loss.metrics.items():
                meter.add(name, values)

    @torch.no_grad()
    def measure(self, batch: Batch) -> tuple[torch.Tensor, Meter]:
        """This process's loss on a batch, (), and its metrics; nothing is trained."""
        sizes = {by: self.count(batch, by) for by in self.algorithm.loss_per}
        meter, value = Meter(), torch.zeros((), device=self.accelerator.device)
        with self.policy.active():
            for part in self.losses(batch, sizes, meter):
                value += part
        return value, meter

    def halve(self, batch: Batch) -> None:
        """Halve the token budget after memory ran out; the mini-batch is gone through again."""
        mine = int(batch.sequences.lengths.max()) * batch.per_row if len(batch) else 0
        longest = int(largest(self.accelerator, mine))
        if self.budget <= longest:
            raise MemoryExhausted(
                f"out of memory with one row of {longest} tokens in a forward and backward",
                hint="lower max_completion_length, or set gradient_checkpointing, lora_r or dtype: bfloat16",
            )
        self.budget //= 2
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(self, meter: Meter, value: torch.Tensor) -> Outcome:
        """Sum gradients over processes, clip, ask the algorithm, check that all is finite, step."""
        parameters = list(self.parameters.values())
        sum_gradients(parameters, self.accelerator)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf))
        loss, means = float(total(self.accelerator, value)), meter.means(self.accelerator)
        verdict = self.algorithm.verdict(means) if means else "skip"
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
        """Optimizer state by parameter name, the position and the budget."""
        return {
            "optimizer": optimizer_state(self.optimizer),
            "done": self.done,
            "skipped_in_a_row": self.skipped_in_a_row,
            "budget": self.budget,
            "configured_budget": token_budget(self.settings, self.accelerator.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; bit-exact."""
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.done, self.skipped_in_a_row = state["done"], state["skipped_in_a_row"]
        place_scheduler(self.scheduler, self.done)
        # A budget that was halved stays so, unless a new one is asked for.
        if state["configured_budget"] == token_budget(self.settings, self.accelerator.device):
            self.budget = state["budget"]


def token_budget(settings: Settings, device: torch.device) -> int:
    """Padded tokens of one forward and backward."""
    return settings.max_tokens_per_micro_batch or (16384 if device.type == "cuda" else 4096)


def sum_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all processes, in one message a dtype.

    Losses are divided by global counts, so the sum is the gradient of the whole mini-batch. Unlike a wrapper
    that reduces during backward, this lets processes have different numbers of micro-batches, or none.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in {parameter.dtype for parameter in parameters}:
        grads = [p.grad for p in parameters if p.grad is not None and p.dtype == dtype]
        flat = total(accelerator, torch.nn.utils.parameters_to_vector(grads))
        torch.nn.utils.vector_to_parameters(flat, grads)
