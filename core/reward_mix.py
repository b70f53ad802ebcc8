"""The rewards of a run taken together: their names and weights, and how their values add up.

Legend: N completions, S completion tokens of all completions one after another.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlx.core.errors import ConfigError, RewardError
from rlx.core.reward_call import LARGEST, Value

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
        metrics: ``reward/<name>/seconds``, ``reward/<name>/errors`` unless errors stop the run, and the
            metrics that rewards told; numbers to be averaged.
        columns: ``<name>/<column>`` → N values, the columns that rewards told.
    """

    score: Tensor
    rewards: dict[str, Tensor]
    token_scores: Tensor | None
    seconds: float
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)


def combine(
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


def check_mix(rewards: Sequence[NamedReward], on_error: str, error_value: float) -> None:
    """Refuse rewards that teach nothing, and a policy for unusable ones that is none.

    Raises:
        ConfigError: no reward, a weight that is not finite, nothing but weights of 0, or an unknown policy.
    """

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


def with_unique_names(rewards: Sequence[NamedReward]) -> list[NamedReward]:
    """The rewards under names that occur once: ``length``, ``length_2``."""
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
