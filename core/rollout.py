"""From prompts to rollouts: sample, reward, and measure what the algorithm needs to know about samples."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rlx.core.batch import Labeled, Pairs, Rollouts, Scores, Sequences
from rlx.core.clock import Clock
from rlx.core.closing import close_all
from rlx.core.errors import DivergedError, MemoryExhausted
from rlx.core.kv_cache import rows_that_fit
from rlx.core.logprobs import full_kl, score
from rlx.core.memory import kept_budget
from rlx.core.overlap import Overlap, overlap, telling
from rlx.core.precision import generation_precision
from rlx.core.streams import stream_seed
from rlx.plugins.contract import Completions, Sampling

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from rlx.core.batch import Prompts
    from rlx.core.judging import JudgeRunner
    from rlx.core.models import Policy
    from rlx.core.reference import Reference
    from rlx.core.scoring import RewardRunner
    from rlx.core.settings import Settings
    from rlx.plugins.contract import Generator


B = TypeVar("B", Pairs, Labeled)


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
        budget: tokens of a forward pass that measures log-probs or values.
        judge: what compares the completions of a prompt, or None.
        temperature: of the log-probs that are measured; None for that of sampling.
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
        budget: int,
        judge: JudgeRunner | None = None,
        temperature: float | None = None,
    ) -> None:
        self.policy, self.reference, self.generator, self.rewards = policy, reference, generator, rewards
        self.judge = judge
        self.settings, self.accelerator, self.clock = settings, accelerator, Clock()
        self.budget = budget  # halves when memory runs out
        self.temperature = settings.temperature if temperature is None else temperature
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

    def sample(
        self,
        prompts: Prompts,
        n: int,
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        early: Overlap | None = None,
    ) -> Completions:
        """Draw n completions of each prompt, in the precision that ``generation_dtype`` asks for.

        Autocast is that of the update: else the log-probs of sampling would differ from it by rounding.
        ``early`` is told which completions are complete.
        """
        with (
            self.clock.measure("generate"),
            self.policy.active() as model,
            generation_precision(model, self.settings.generation_dtype),
            self.accelerator.autocast(),
        ):
            self.generator.sync(self.policy)
            while True:
                # Not where memory ran out: what had filled it is still held there, and little seems to fit.
                rows = min(self.sampling.batch_size or self._rows(prompts, n), len(prompts) * n)
                try:
                    sampling = replace(self.sampling, greedy=greedy)
                    return self.generator.generate(prompts.ids, n, sampling, seeds, **telling(early))
                except torch.OutOfMemoryError as error:
                    if rows <= 1:
                        raise exhausted("sampling one completion") from error
                # Here the error is gone, and with it what its frames held of the GPU's memory.
                self.sampling = replace(self.sampling, batch_size=rows // 2)
                free_cache()
                if early is not None:
                    early.restart()

    def _rows(self, prompts: Prompts, n: int) -> int:
        """Completions that are sampled at a time if nobody says how many: all, or as many as seem to fit."""
        longest = max(map(len, prompts.ids), default=0) + self.sampling.max_new_tokens
        return min(len(prompts) * n, rows_that_fit(self.policy.base, longest, self.accelerator.device))

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
        number = step + 1  # as the log counts
        completions, batch = self.sample_and_reward(prompts, n, seeds, positions, number)
        if self.judge is not None:
            with self.clock.measure("judge"):
                batch = self.judge.rank(batch, completions.ids, step)
        with self.clock.measure("score"):
            return self.measure(batch, completions, needs)

    def sample_and_reward(
        self, prompts: Prompts, n: int, seeds: Sequence[int], positions: Sequence[int], step: int
    ) -> tuple[Completions, Rollouts]:
        """Sample, and reward while that goes on what can be.

        Args:
            prompts: B.
            n: completions a prompt.
            seeds: B.
            positions: B numbers that tell prompts apart.
            step: what rewards are told.
        """
        each = [i for i in range(len(prompts)) for _ in range(n)]
        rewards = self.rewards if self.settings.overlap_rewards else None
        with overlap(rewards, self.generator, prompts, n, self.decode, step) as early:
            completions = self.sample(prompts, n, seeds, early=early)
            groups = [positions[i] for i in each]
            return completions, self.reward(prompts.take(each), completions, groups, step, early)

    def decode(self, ids: list[int]) -> str:
        """The text of a completion. One by one: batch_decode makes one text of no completions at all."""
        return str(self.policy.tokenizer.decode(ids, skip_special_tokens=True))

    def reward(
        self,
        prompts: Prompts,
        completions: Completions,
        groups: Sequence[int],
        step: int | None = None,
        early: Overlap | None = None,
    ) -> Rollouts:
        """Rollouts with their scores, nothing else measured yet.

        Args:
            prompts: N.
            completions: N, one a prompt.
            groups: N numbers, equal for completions of one prompt.
            step: what rewards are told, the number of the log line; None outside a run.
            early: what some rewards were asked while the completions were sampled.
        """
        texts = [self.decode(ids) for ids in completions.ids]
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
            scored = self.rewards.score(prompts, texts, completions.ids, step, early)
        found: dict[str, Any] = {
            "score": scored.score,
            "rewards": scored.rewards,
            "token_scores": scored.token_scores,
            "metrics": {name: torch.tensor(values) for name, values in scored.metrics.items()},
            "reward_columns": scored.columns,
        }
        return replace(rollouts, **found).to(device)

    def close(self) -> None:
        """Give back what the generator, the rewards and the judge hold."""
        close_all(self.generator, self.rewards, self.judge)

    def reward_state(self) -> dict[str, Any]:
        """A copy of what the rewards and the judge remember."""
        return {who: copy.deepcopy(part.state_dict()) for who, part in self._remembering()}

    def load_reward_state(self, state: dict[str, Any]) -> None:
        """Take back what ``reward_state`` gave."""
        for who, part in self._remembering():
            part.load_state_dict(state.get(who, {}))

    def budget_state(self) -> dict[str, Any]:
        """What a resumed run needs to sample and measure in the same pieces: others differ by rounding."""
        return {
            "budget": self.budget,
            "asked": self.settings.max_tokens_per_micro_batch,
            "rows": self.sampling.batch_size,
            "rows_asked": self.settings.generation_batch_size,
        }

    def load_budget_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``budget_state`` gave."""
        self.budget = kept_budget(state, self.settings, self.budget)
        if state["rows_asked"] == self.settings.generation_batch_size:
            self.sampling = replace(self.sampling, batch_size=state["rows"])

    def _remembering(self) -> list[tuple[str, Any]]:
        parts = (("rewards", self.rewards), ("judge", self.judge))
        return [(who, part) for who, part in parts if part is not None]

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
        """A batch that was not sampled, on the device, with reference log-probs if they are needed.

        Those of mismatched sequences are measured in the same pass: each prompt is computed once.
        """
        batch = batch.to(self.accelerator.device)
        if "reference" not in needs or batch.reference is not None:
            return batch
        more: Sequences | None = getattr(batch, "mismatched", None) if "mismatched" in needs else None
        with self.clock.measure("score"):
            if more is None:
                return replace(batch, reference=self.score(batch.sequences, "reference").logps)
            logps = self.score(batch.sequences.joined(more), "reference").logps
        own = int(batch.sequences.scored.sum())
        found: dict[str, Any] = {"reference": logps[:own], "mismatched_reference": logps[own:]}
        return replace(batch, **found)

    def exact_kl(self, sequences: Sequences) -> Tensor:
        """(S,) KL(policy‖reference) over the whole vocabulary at each scored token."""
        if self.reference is None:
            raise ValueError("an exact KL needs a reference")
        with torch.no_grad(), self.policy.active() as model:
            return full_kl(
                model,
                self.reference.active,
                sequences,
                temperature=self.temperature,
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
            free_cache()  # not before the error is gone, whose frames hold memory

    def _score(self, sequences: Sequences, model: str, needs: Collection[str], logps: bool) -> Scores:
        options: dict[str, Any] = {
            "temperature": self.temperature,
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


def free_cache() -> None:
    """Give back what torch keeps of the GPU's memory in pieces that may be too small for the next try."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def exhausted(what: str) -> MemoryExhausted:
    """Memory ran out at the smallest piece of work there is."""
    free_cache()
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
