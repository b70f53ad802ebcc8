"""A run of the algorithm under test, taken apart: batches of known tokens, and their losses and gradients.

The policy is the packaged model, moved away from its reference, so that an algorithm that takes one for the
other is found out. Gradients are taken in what the policy says of each token (log-probs, values, …): they are
exact, whatever the model's arithmetic.

Legend: N sequences, S scored tokens of all sequences one after another.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlx.core.batch import Batch, Demonstrations, Labeled, Pairs, Prompts, Scores, Sequences, flat_index
from rlx.core.run import prepare
from rlx.core.streams import generator, rng_scope
from rlx.plugins.contract import Completions
from rlx.testing import data
from rlx.testing.kit import Subject

PROMPTS = 6  # of an ordinary batch
UNEVEN = (2, 9, 5, 1, 7, 3)  # completion lengths, in tokens, one prompt after another
QUIET = {
    "log_completions": 0, "plots": False, "progress": "none", "mixed_precision": "no", "logging_steps": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """The loss of a batch.

    Attributes:
        value: float64.
        gradients: field of ``Scores`` → gradient of the loss in it.
        metrics: name → values of all micro-batches together.
    """

    value: float
    gradients: dict[str, Tensor]
    metrics: dict[str, Tensor]

    def mean(self, name: str) -> float:
        """The mean of one metric."""
        return float(self.metrics[name].double().mean())


def options(subject: Subject, folder: str | Path, **changes: Any) -> dict[str, Any]:
    """Options of a short run of the algorithm on the packaged model and rows made up for it.

    Args:
        subject: the algorithm.
        folder: becomes the run folder.
        changes: to these options; ``...`` leaves one out.
    """
    thing = subject.thing if isinstance(subject.thing, str | type) else copy.deepcopy(subject.thing)
    online = subject.component().eats == "prompts"
    given: dict[str, Any] = {
        "algo": thing, "dataset": data.rows(subject.component().eats, 9), "seed": 5, "batch_size": 4,
        "max_steps": 2, "learning_rate": 1e-3, "output_dir": str(folder),
    }  # fmt: skip
    sampled = {"reward": ["rlx.testing.data:ranked"], "max_completion_length": 8}
    given |= QUIET | (sampled if online else {"max_length": 128}) | subject.options | subject.run | changes
    return {name: value for name, value in given.items() if value is not ...}


class Lab:
    """One algorithm, ready to be measured.

    Args:
        subject: the algorithm.
    """

    def __init__(self, subject: Subject) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rlx-testing-")
        self.run = prepare(**options(subject, Path(self._folder.name) / "run"))
        self.run.close()  # nothing is trained: the folder is not needed
        self.pristine = copy.deepcopy(self.run.algorithm)
        draw = generator(7, "policy")
        with torch.no_grad():
            for parameter in self.run.policy.trainable().values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))

    @property
    def algorithm(self) -> Any:
        """A copy that nothing happened to yet."""
        return copy.deepcopy(self.pristine)

    @property
    def online(self) -> bool:
        """Whether the algorithm samples."""
        return bool(self.pristine.eats == "prompts")

    @property
    def each(self) -> int:
        """Completions of each prompt."""
        return int(self.pristine.completions_per_prompt) if self.online else 1

    def batch(self, counts: Sequence[int] = UNEVEN, scores: Sequence[float] | None = None) -> Any:
        """A batch as the algorithm gets it, of random tokens; no two sequences are the same.

        Args:
            counts: scored tokens of the completions of one prompt after another; taken again and again, so
                that there are enough for all.
            scores: of rollouts, taken again and again; by default no two are the same.
        """
        sides = self.each * (2 if self.pristine.eats == "pairs" else 1)
        number, draw = PROMPTS * sides, generator(11, "tokens", len(counts))
        lengths = [counts[i % len(counts)] for i in range(number)]
        ids = [torch.randint(8, 400, (length,), generator=draw).tolist() for length in lengths]
        prompts = [torch.randint(8, 400, (5,), generator=draw).tolist() for _ in range(PROMPTS)]
        if self.online:
            return self._rollouts(prompts, ids, scores)
        texts = [prompts[i // sides] for i in range(number)]
        sequences = Sequences.from_lists(texts, ids, [i // sides for i in range(number)])
        if self.pristine.eats == "demonstrations":
            return Demonstrations(sequences)
        if self.pristine.eats == "pairs":
            made: Any = Pairs(sequences)
        else:
            made = Labeled(
                sequences,
                desirable=torch.arange(number) % 3 > 0,
                mismatched=Sequences.from_lists(texts, ids[1:] + ids[:1]),
            )
        return self.run.studio.compare(made, self.pristine.needs)

    def _rollouts(
        self, prompts: list[list[int]], ids: list[list[int]], scores: Sequence[float] | None
    ) -> Any:
        number = len(prompts)
        told = Prompts(prompts, [f"prompt {i}" for i in range(number)], [None] * number, {}, [*range(number)])
        places = [i // self.each for i in range(len(ids))]
        done = Completions(ids, None, [i % 4 > 0 for i in range(len(ids))])
        studio = self.run.studio
        batch = studio.measure(studio.reward(told.take(places), done, places), done, self.pristine.needs)
        if scores is None:
            draw = torch.rand(len(ids), generator=generator(13, "scores"))
        else:
            draw = torch.tensor([scores[i % len(scores)] for i in range(len(ids))])
        return replace(batch, score=draw, rewards={name: draw for name in batch.rewards})

    def prepared(self, batch: Any, algorithm: Any) -> Batch:
        """What the algorithm's ``prepare`` makes of a batch; what it draws is the same each time."""
        with torch.no_grad(), rng_scope(5, "prepare"):
            made: Batch = algorithm.prepare(batch, self.run.score)
        return made

    def scores(self, batch: Batch) -> Scores:
        """What the policy says of a prepared batch, without gradient."""
        with torch.no_grad(), self.run.policy.active():
            return self.run.updater.score(batch.sequences)

    def measure(
        self, algorithm: Any, batch: Batch, now: Scores, parts: Sequence[Sequence[int]] | None = None
    ) -> Measured:
        """The loss of a prepared batch and its gradient in the scores, added up over micro-batches.

        Args:
            algorithm: that prepared it.
            batch: prepared.
            now: its scores.
            parts: rows of each micro-batch; by default all in one.
        """
        leaves = {
            field.name: value.detach().clone().requires_grad_()
            for field in fields(now)
            if isinstance(value := getattr(now, field.name), Tensor) and value.is_floating_point()
        }
        sizes = {by: max(1.0, float(algorithm.size(batch, by))) for by in algorithm.loss_per}
        value = 0.0
        metrics: dict[str, list[Tensor]] = {}
        whole: list[Sequence[int]] = [range(len(batch))] if len(batch) else []  # a run has no empty ones
        for rows in whole if parts is None else parts:
            index = torch.tensor(list(rows), dtype=torch.long)
            loss = algorithm.loss(batch.take(index), take(replace(now, **leaves), batch, index))
            unknown = set(loss.terms) - set(sizes)
            assert not unknown, f"the loss has terms per {', '.join(sorted(unknown))}, which loss_per lacks"
            part = torch.stack([terms.sum() / sizes[by] for by, terms in loss.terms.items()]).sum()
            if part.requires_grad:
                part.backward()
            value += float(part.detach().double())
            for name, values in loss.metrics.items():
                metrics.setdefault(name, []).append(values.detach().flatten().float())
        gradients = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
        }
        return Measured(value, gradients, {name: torch.cat(values) for name, values in metrics.items()})


def take(now: Scores, batch: Batch, rows: Tensor) -> Scores:
    """The scores of some rows of a batch."""
    each = torch.arange(batch.per_row)
    index = (rows[:, None] * batch.per_row + each).flatten()
    tokens = flat_index(batch.sequences.counts, index)
    picked = {}
    for field in fields(now):
        value = getattr(now, field.name)
        if isinstance(value, Tensor):
            by_sequence = field.metadata.get("layout") == "sequence"
            picked[field.name] = value[index] if by_sequence else value[tokens] if len(value) else value
    return Scores(**picked)


def by_sequence(measured: Measured, batch: Batch) -> dict[tuple[int, ...], dict[str, Tensor]]:
    """Gradients of each sequence, found by its tokens, whatever the order; what occurs twice is added up."""
    sequences = batch.sequences
    found: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for number in range(len(sequences)):
        one = torch.tensor([number])
        tokens = flat_index(sequences.counts, one)
        key = tuple(sequences.take(one).ids.tolist())
        for name, gradient in measured.gradients.items():
            mine = gradient[one] if name == "reward" else gradient[tokens] if len(gradient) else gradient
            kept = found.setdefault(key, {})
            kept[name] = kept[name] + mine if name in kept else mine
    return found
