"""From prompts to rollouts: sample, reward, and measure what the algorithm needs to know about samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rlx.core.batch import Labeled, Pairs, Rollouts, Scores, Sequences
from rlx.core.errors import DivergedError, MemoryExhausted
from rlx.core.logprobs import full_kl, score
from rlx.core.meter import total
from rlx.core.precision import generation_precision
from rlx.core.streams import stream_seed
from rlx.core.update import token_budget
from rlx.plugins.contract import Completions, Sampling

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from rlx.core.batch import Prompts
    from rlx.core.models import Policy
    from rlx.core.reference import Reference
    from rlx.core.scoring import RewardRunner
    from rlx.core.settings import Settings
    from rlx.plugins.contract import Generator


B = TypeVar("B", Pairs, Labeled)


class Clock:
    """Seconds spent in each phase since the last reading, under ``time/<phase>``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time that the block takes to ``time/<phase>``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            name = f"time/{phase}"
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Studio:
    """Where completions are sampled and measured: the policy, its reference, the generator and the rewards.

    Args:
        policy: the model that is trained.
        reference: what the KL is taken to, or None.
        generator: what samples.
        rewards: what scores; None for data that brings its own preferences.
        settings: sampling and precision.
        accelerator: devices and processes.
        stop_token_ids: tokens that end a completion.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        generator: Generator,
        rewards: RewardRunner | None,
        settings: Settings,
        accelerator: Accelerator,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self.policy, self.reference, self.generator, self.rewards = policy, reference, generator, rewards
        self.settings, self.accelerator, self.clock = settings, accelerator, Clock()
        self.budget = token_budget(settings, accelerator.device)  # halves when memory runs out
        self.sampling = Sampling(
            max_new_tokens=settings.max_completion_length,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            stop_token_ids=stop_token_ids,
            stop_strings=tuple(settings.stop_strings),
            batch_size=settings.generation_batch_size,
        )

    def sample(self, prompts: Prompts, n: int, seeds: Sequence[int], *, greedy: bool = False) -> Completions:
        """Draw n completions of each prompt, in the precision that ``generation_dtype`` asks for.

        Autocast is that of the update: else the log-probs of sampling would differ from it by rounding.
        """
        with (
            self.clock.measure("generate"),
            self.policy.active() as model,
            generation_precision(model, self.settings.generation_dtype),
            self.accelerator.autocast(),
        ):
            self.generator.sync(self.policy)
            while True:
                try:
                    sampling = replace(self.sampling, greedy=greedy)
                    return self.generator.generate(prompts.ids, n, sampling, seeds)
                except torch.OutOfMemoryError as error:
                    rows = self.sampling.batch_size or len(prompts) * n
                    if rows <= 1:
                        raise exhausted("sampling one completion") from error
                    self.sampling = replace(self.sampling, batch_size=rows // 2)

    def roll_out(
        self, prompts: Prompts, n: int, needs: frozenset[str], step: int, positions: Sequence[int]
    ) -> Rollouts:
        """Sample and measure.

        Args:
            prompts: B prompts of this process.
            n: completions a prompt.
            needs: ``Algorithm.needs``.
            step: the batch's number, part of the sampling seeds.
            positions: B places of the prompts in the batch of all processes, part of the sampling seeds.

        Returns:
            B·n rollouts, completions of one prompt adjacent.

        Raises:
            DivergedError: a log-prob is not finite.
        """
        seeds = [stream_seed(self.settings.seed, "generate", step, position) for position in positions]
        completions = self.sample(prompts, n, seeds)
        each = [i for i in range(len(prompts)) for _ in range(n)]
        batch = self.reward(prompts.take(each), completions, [positions[i] for i in each])
        with self.clock.measure("score"):
            return self.measure(batch, completions, needs)

    def reward(self, prompts: Prompts, completions: Completions, groups: Sequence[int]) -> Rollouts:
        """Rollouts with their scores, nothing else measured yet; prompts and completions are N each."""
        # One by one: batch_decode makes one text of no completions at all.
        decode = self.policy.tokenizer.decode
        texts = [decode(ids, skip_special_tokens=True) for ids in completions.ids]
        device = self.accelerator.device
        rollouts = Rollouts(
            Sequences.from_lists(prompts.ids, completions.ids, groups).to(device),
            prompts=prompts,
            texts=texts,
            finished=torch.tensor(completions.finished, dtype=torch.bool, device=device),
        )
        if self.rewards is None:
            return rollouts
        with self.clock.measure("reward"):
            scored = self.rewards.score(prompts, texts, completions.ids)
        found: dict[str, Any] = {
            "score": scored.score,
            "rewards": scored.rewards,
            "token_scores": scored.token_scores,
            "metrics": {name: torch.tensor([value]) for name, value in scored.metrics.items()},
        }
        return replace(rollouts, **found).to(device)

    def reward_state(self) -> dict[str, Any]:
        """A copy of what the rewards remember."""
        return {} if self.rewards is None else copy.deepcopy(self.rewards.state_dict())

    def load_reward_state(self, state: dict[str, Any]) -> None:
        """Take back what ``reward_state`` gave."""
        if self.rewards is not None:
            self.rewards.load_state_dict(state)

    def measure(self, batch: Rollouts, completions: Completions, needs: frozenset[str]) -> Rollouts:
        """Old log-probs, reference log-probs, values and exact KL, as far as they are needed."""
        sequences = batch.sequences
        found: dict[str, Any] = {}
        captured = None if self.settings.recompute_logps else completions.logprobs
        if captured is None or "values" in needs:
            now = self.score(sequences, "policy", needs & {"values"}, logps=captured is None)
            found |= {"old": now.logps, "values": now.values}
        if captured is not None:
            flat = [value for row in captured for value in row]
            found["old"] = torch.tensor(flat, dtype=torch.float32, device=self.accelerator.device)
        if "reference" in needs:
            found["reference"] = self.score(sequences, "reference").logps
        if "kl" in needs:
            found["kl"] = self.exact_kl(sequences)
        for name, values in found.items():
            _check_finite(name, values, batch)
        return replace(batch, **found)

    def compare(self, batch: B, needs: frozenset[str]) -> B:
        """A batch that was not sampled, on the device, with reference log-probs if they are needed."""
        batch = batch.to(self.accelerator.device)
        if "reference" not in needs or batch.reference is not None:
            return batch
        with self.clock.measure("score"):
            reference = self.score(batch.sequences, "reference").logps
        return replace(batch, reference=reference)

    def exact_kl(self, sequences: Sequences) -> Tensor:
        """(S,) KL(policy‖reference) over the whole vocabulary at each scored token."""
        if self.reference is None:
            raise ValueError("an exact KL needs a reference")
        with torch.no_grad(), self.policy.active() as model:
            return full_kl(
                model,
                self.reference.active,
                sequences,
                temperature=self.settings.temperature,
                token_budget=self.budget,
                accelerator=self.accelerator,
            )

    def score(
        self, sequences: Sequences, model: str = "policy", needs: Collection[str] = (), *, logps: bool = True
    ) -> Scores:
        """Log-probs without gradient, under ``policy`` or ``reference``.

        Args:
            sequences: any.
            model: which model.
            needs: more than log-probs: any of ``entropy``, ``values``, ``correct``, ``square``.
            logps: False for the values alone: the output head stays unused.

        Raises:
            ValueError: for any other name, if there is no reference, or for values of the reference.
            MemoryExhausted: one sequence alone does not fit.
        """
        while True:
            try:
                return self._score(sequences.to(self.accelerator.device), model, needs, logps)
            except torch.OutOfMemoryError as error:
                if self.budget <= int(sequences.lengths.max()):
                    raise exhausted("a forward of one sequence") from error
                self.budget //= 2

    def _score(self, sequences: Sequences, model: str, needs: Collection[str], logps: bool) -> Scores:
        options: dict[str, Any] = {
            "temperature": self.settings.temperature,
            "token_budget": self.budget,
            "accelerator": self.accelerator,
            "entropy": "entropy" in needs,
            "extras": needs,
        }
        if model == "reference" and self.reference is not None and "values" not in needs:
            with self.reference.active() as module:
                return score(module, sequences, **options)
        if model != "policy":
            raise ValueError(
                f"score(sequences, model): model is 'policy', which alone has values, or 'reference' "
                f"(if any), not {model!r}"
            )
        with torch.no_grad(), self.policy.active() as module:
            apart = self.policy.value_model if "values" in needs else None
            head = self.policy.value_head if "values" in needs else None
            if apart is not None and not logps:
                now = Scores(torch.empty(0))
            else:
                now = score(module, sequences, value_head=head, logps=logps, **options)
            if apart is not None:
                with self.accelerator.autocast():
                    now = replace(now, values=apart.values(sequences, self.budget))
            return now


class RunScorer:
    """What ``Algorithm.prepare`` sees of the run (``rlx.plugins.contract.Scorer``)."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.max_completion_length = studio.settings.max_completion_length
        named = () if studio.rewards is None else studio.rewards.rewards
        self.reward_weights: Mapping[str, float] = {reward.name: reward.weight for reward in named}

    def __call__(self, sequences: Sequences, model: str = "policy", needs: Collection[str] = ()) -> Scores:
        """Log-probs without gradient under ``policy`` or ``reference``, and what else is needed."""
        return self.studio.score(sequences, model, needs)

    def total(self, values: Tensor) -> Tensor:
        """The element-wise sum of values over all processes."""
        return total(self.studio.accelerator, values)


def exhausted(what: str) -> MemoryExhausted:
    """Memory ran out at the smallest piece of work there is."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return MemoryExhausted(
        f"out of memory in {what}",
        hint="lower max_completion_length or max_prompt_length, or set lora_r or dtype: bfloat16",
    )


def _check_finite(name: str, values: Tensor | None, batch: Rollouts) -> None:
    if values is None or bool(values.isfinite().all()):
        return
    position = int((~values.isfinite()).nonzero()[0])
    owner = int(torch.repeat_interleave(batch.sequences.counts)[position])
    first = int(batch.sequences.counts[:owner].sum())
    raise DivergedError(
        f"the {name} of a sampled token is not finite",
        where=f"row {batch.prompts.rows[owner]}, completion token {position - first}",
        got=str(float(values[position])),
        expected="a finite number",
        hint="check the model's weights (a first forward in float32), or the sampling options",
    )
