"""The reward runner: calls the rewards of a run, checks what they return, and adds it up.

A reward is a callable ``reward(prompts=…, completions=…, completion_ids=…, **columns)``, plain or ``async``,
that returns one number a completion, a list of one number a token, or None where it does not apply. It is
given copies, and only what its signature takes. Whatever else comes back is an error that names the reward
and the row, or is counted under the policy that the user chose; nothing unusable enters a batch.

Legend: N completions, S completion tokens of all completions one after another.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlx.core.batch import Prompts
from rlx.core.errors import CheckpointError, ConfigError, DataError, RewardError
from rlx.core.options import close
from rlx.core.reward_call import (
    LARGEST,
    Outcome,
    Signature,
    Unusable,
    Value,
    definition,
    has_gradient,
    read_items,
    read_value,
    start,
)
from rlx.core.text import safe_text

POLICIES = ("raise", "none", "value")


@dataclass(frozen=True)
class NamedReward:
    """A reward of a run.

    Attributes:
        name: how it is called in metrics and messages.
        fn: the function or built object.
        weight: factor in the weighted sum; 0 only measures.
    """

    name: str
    fn: Callable[..., Any]
    weight: float = 1.0


@dataclass(frozen=True)
class Scored:
    """What the rewards said of N completions, on the CPU.

    Attributes:
        score: (N,) float32, weighted sum of the rewards given for whole completions: 0 where only rewards for
            single tokens apply, NaN where no reward of a weight other than 0 applies.
        rewards: name → (N,) float32, unweighted; rewards for single tokens are summed; NaN for None.
        token_scores: (S,) float32, weighted sum of the rewards given for single tokens, not contained in
            ``score``; None if there are none.
        seconds: wall-clock time of all rewards together.
        metrics: ``reward/<name>/seconds``, and ``reward/<name>/errors`` unless errors stop the run.
    """

    score: Tensor
    rewards: dict[str, Tensor]
    token_scores: Tensor | None
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """The completions that are being scored."""

    prompts: Prompts
    completions: list[str]
    completion_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.completions)


class RewardRunner:
    """Scores completions with the rewards of a run.

    Args:
        rewards: at least one; a name that occurs twice gets a suffix (``length``, ``length_2``).
        on_error: what something unusable does: ``raise`` stops the run, ``none`` counts as not applicable,
            ``value`` counts as ``error_value``.
        error_value: score of something unusable under ``value``.

    Raises:
        ConfigError: no reward, a weight that is not finite, nothing but weights of 0, or an unknown policy.
        PluginError: something that cannot be called as a reward.
    """

    def __init__(
        self, rewards: Sequence[NamedReward], on_error: str = "raise", error_value: float = 0.0
    ) -> None:
        _check_mix(rewards, on_error, error_value)
        self.rewards = _with_unique_names(rewards)
        self._signatures = {reward.name: Signature.of(reward.fn, reward.name) for reward in self.rewards}
        self._on_error = on_error
        self._substitute = error_value if on_error == "value" else None
        self._said: set[tuple[str, str]] = set()

    @property
    def columns_needed(self) -> dict[str, tuple[str, ...]]:
        """Reward name → data-set columns without which it cannot be called; empty ones are left out."""
        return {name: signature.needed for name, signature in self._signatures.items() if signature.needed}

    def score(self, prompts: Prompts, completions: list[str], completion_ids: list[list[int]]) -> Scored:
        """Score completions. Async rewards run concurrently, also if called from inside a running event loop.

        Args:
            prompts: N prompts, one a completion.
            completions: N texts, special tokens left out; empty ones are legal; if N = 0 no reward is called.
            completion_ids: N lists of token ids, the stop token included.

        Returns:
            Scores in the order of the completions.

        Raises:
            RewardError: a reward raised, or returned something unusable, under the policy ``raise``; or the
                weighted sum does not fit into float32.
            DataError: a column that a reward needs is not there.
            ValueError: prompts, completions and completion_ids differ in number.
        """
        if not len(prompts) == len(completions) == len(completion_ids):
            counts = (
                f"{len(prompts)} prompts, {len(completions)} completions, {len(completion_ids)} lists of ids"
            )
            raise ValueError(f"one prompt and one list of ids a completion, but there are {counts}")
        began = time.perf_counter()
        batch = _Batch(prompts, completions, completion_ids)
        values: dict[str, list[Value]] = {reward.name: [] for reward in self.rewards}
        called = self.rewards if completions else []
        metrics: dict[str, float] = {}
        calls: list[Future[Outcome]] = []
        try:
            for reward in called:
                calls.append(start(reward.fn, self._arguments(reward, batch)))
            for reward, call in zip(called, calls, strict=True):
                outcome = call.result()
                values[reward.name], errors = self._settle(reward, outcome, batch)
                metrics[f"reward/{reward.name}/seconds"] = outcome.seconds
                if self._on_error != "raise":
                    metrics[f"reward/{reward.name}/errors"] = float(errors)
        finally:
            for call in calls:  # after an error or Ctrl-C nobody waits for the async ones
                call.cancel()
        score, totals, tokens = _combine(self.rewards, values, [len(ids) for ids in completion_ids])
        return Scored(score, totals, tokens, time.perf_counter() - began, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Reward name → its state, for the rewards that keep one."""
        return {name: fn.state_dict() for name, fn in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            CheckpointError: the rewards that keep a state are not those of the checkpoint.
        """
        stateful = self._stateful()
        if set(stateful) != set(state):
            raise CheckpointError(
                "the checkpoint holds the state of other rewards than this run has",
                code="E-CHECKPOINT-REWARDS",
                got=", ".join(sorted(state)) or "none",
                expected=", ".join(sorted(stateful)) or "none",
            )
        for name, fn in stateful.items():
            fn.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        return {reward.name: reward.fn for reward in self.rewards if hasattr(reward.fn, "state_dict")}

    def _arguments(self, reward: NamedReward, batch: _Batch) -> dict[str, Any]:
        """Copies of what the reward's signature takes, so that it may do with them as it likes."""
        signature, prompts = self._signatures[reward.name], batch.prompts
        for column in signature.needed:
            if column not in prompts.columns:
                near = close(column, list(prompts.columns))
                raise DataError(
                    f"reward {reward.name!r} needs the column {column!r}{near}",
                    code="E-DATA-COLUMN",
                    where=definition(reward.fn),
                    got=", ".join(prompts.columns) or "no columns beside the prompt",
                )
        named = {
            name: copy.deepcopy(column) for name, column in prompts.columns.items() if signature.takes(name)
        }
        # After the columns: one that happens to have a standard name never hides the real thing.
        if signature.takes("prompts"):
            either = zip(prompts.messages, prompts.texts, strict=True)
            named["prompts"] = [
                text if messages is None else copy.deepcopy(messages) for messages, text in either
            ]
        if signature.takes("prompt_texts"):
            named["prompt_texts"] = list(prompts.texts)
        if signature.takes("completions"):
            named["completions"] = list(batch.completions)
        if signature.takes("completion_ids"):
            named["completion_ids"] = [list(ids) for ids in batch.completion_ids]
        return named

    def _settle(self, reward: NamedReward, outcome: Outcome, batch: _Batch) -> tuple[list[Value], int]:
        """The values of one reward, and how many of them stand in for something unusable."""
        error = outcome.error
        if error is not None and not isinstance(error, Exception | asyncio.CancelledError):
            raise error  # KeyboardInterrupt or SystemExit out of an async reward
        if has_gradient(outcome.result):
            detached = (
                "returned a tensor that requires grad; it is detached, no gradient flows through a reward"
            )
            self._say_once(reward, "grad", f"reward {reward.name!r} {detached}")
        try:
            if error is not None:
                message = f"{type(error).__name__}: {error}"
                raise Unusable(f"raised {type(error).__name__}", message) from error
            items = read_items(outcome.result, len(batch))
        except Unusable as fault:
            self._tell(reward, fault, batch, None)
            return [self._substitute] * len(batch), len(batch)
        values: list[Value] = []
        errors = 0
        for i, item in enumerate(items):
            try:
                values.append(read_value(item, len(batch.completion_ids[i])))
            except Unusable as fault:
                self._tell(reward, fault, batch, i)
                values.append(self._substitute)
                errors += 1
        return values, errors

    def _tell(self, reward: NamedReward, fault: Unusable, batch: _Batch, item: int | None) -> None:
        """Raise the fault as a RewardError; or, where the policy goes on, warn of the first one."""
        if self._on_error != "raise" and (reward.name, "error") in self._said:
            return
        first = item or 0
        which = f"data row {batch.prompts.rows[first]}"
        if item is None:
            which = f"{len(batch)} completions, the first of {which}"
        error = RewardError(
            f"reward {reward.name!r} {fault.what}" + ("" if item is None else f" for item {item}"),
            code="E-REWARD-VALUE" if fault.__cause__ is None else "E-REWARD-RAISED",
            where=f"{definition(reward.fn)}; {which}: '{safe_text(batch.completions[first], 80)}'",
            got=safe_text(fault.got, 160),
            expected=fault.expected,
            hint="mend the reward, or go on without such scores: --reward-on-error none (or value)",
        )
        if self._on_error == "raise":
            raise error from fault.__cause__
        counted = "not applicable" if self._substitute is None else f"{self._substitute:g}"
        rest = f"counted as {counted}; further ones are only counted, in reward/{reward.name}/errors"
        self._say_once(reward, "error", f"{error}\n  {rest}")

    def _say_once(self, reward: NamedReward, topic: str, text: str) -> None:
        if (reward.name, topic) not in self._said:
            self._said.add((reward.name, topic))
            warnings.warn(text, stacklevel=2)


def _combine(
    rewards: Sequence[NamedReward], values: Mapping[str, list[Value]], lengths: list[int]
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Score (N,), each reward's own totals (N,), and the scores of single tokens (S,) if there are any."""
    score = [0.0] * len(lengths)
    scorable = [False] * len(lengths)
    tokens = torch.zeros(sum(lengths), dtype=torch.float64)
    starts = list(itertools.accumulate(lengths, initial=0))
    by_token = False
    totals: dict[str, Tensor] = {}
    for reward in rewards:
        own = [math.nan] * len(lengths)
        for i, value in enumerate(values[reward.name]):
            if value is None:
                continue
            scorable[i] |= reward.weight != 0
            if isinstance(value, list):
                by_token = True
                own[i] = math.fsum(value)
                tokens[starts[i] : starts[i + 1]] += reward.weight * torch.tensor(value, dtype=torch.float64)
            else:
                own[i] = value
                score[i] += reward.weight * value
        totals[reward.name] = torch.tensor(own, dtype=torch.float64)
    total = torch.tensor(score, dtype=torch.float64)
    if any(bool((summed.abs() > LARGEST).any()) for summed in (total, tokens, *totals.values())):
        raise RewardError(
            "the weighted sum of the rewards does not fit into float32",
            code="E-REWARD-OVERFLOW",
            expected=f"at most {LARGEST:.4g}",
            hint="scale the rewards or their weights down",
        )
    total[~torch.tensor(scorable, dtype=torch.bool)] = math.nan
    totals = {name: own.float() for name, own in totals.items()}
    return total.float(), totals, tokens.float() if by_token else None


def _check_mix(rewards: Sequence[NamedReward], on_error: str, error_value: float) -> None:
    def wrong(what: str, got: str, expected: str, hint: str = "") -> ConfigError:
        return ConfigError(what, code="E-CONFIG-REWARD", got=got, expected=expected, hint=hint)

    if not rewards:
        raise wrong("there is no reward", "none", "at least one", "give one: --reward exact_match")
    for reward in rewards:
        if not math.isfinite(reward.weight):
            raise wrong(
                f"the weight of reward {reward.name!r} is not finite", f"{reward.weight}", "a finite number"
            )
    if all(reward.weight == 0 for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise wrong("every reward has the weight 0: nothing to learn from", names, "a weight other than 0")
    if on_error not in POLICIES:
        raise wrong("unknown policy for unusable rewards", repr(on_error), f"one of {', '.join(POLICIES)}")
    if not math.isfinite(error_value):
        raise wrong("the score of unusable rewards is not finite", f"{error_value}", "a finite number")


def _with_unique_names(rewards: Sequence[NamedReward]) -> list[NamedReward]:
    asked = {reward.name for reward in rewards}
    taken = {"std", "unscorable"}  # metrics of their own under reward/
    unique = []
    for reward in rewards:
        name, number = reward.name, 2
        while name in taken or (name != reward.name and name in asked):
            name, number = f"{reward.name}_{number}", number + 1
        taken.add(name)
        unique.append(dataclasses.replace(reward, name=name))
    return unique
