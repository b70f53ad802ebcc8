"""Advantages of sampled completions, and the losses that they weigh. Pure functions, torch only.

Legend: N completions, S tokens of them one after another; a loss of K terms has one a token (K = S) or one a
completion (K = N), as ratios and advantages are given. A reward of NaN is one that does not apply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlx.core.functional import alone, group_moments, group_sum, moments

if TYPE_CHECKING:
    from torch import Tensor

    from rlx.core.functional import Total

TINY = 1e-4  # added to a deviation before it divides, as TRL does


def clipped_loss(
    ratio: Tensor, advantages: Tensor, *, low: float, high: float, most: float | None = None
) -> tuple[Tensor, Tensor]:
    """max(−A·min(ratio, most), −A·clamp(ratio, 1 − low, 1 + high)) (K,), and where the clip bit (K,) bool.

    Args:
        ratio: (K,) probability now over probability when sampled, of tokens or completions.
        advantages: (K,) A.
        low: how far below 1 the ratio may go to an effect.
        high: the same above 1.
        most: the largest ratio of a negative advantage; None for no limit.

    Source: arXiv:1707.06347, equation 7; ``high`` arXiv:2503.14476; ``most`` arXiv:2505.07291
    """
    free = -advantages * (ratio if most is None else ratio.clamp(max=most))
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(free, clipped), clipped > free


def capped_loss(ratio: Tensor, advantages: Tensor, logps: Tensor, *, most: float) -> tuple[Tensor, Tensor]:
    """−min(ratio, most)·A·log p (K,) with the ratio a constant, and where it was cut (K,) bool (CISPO).

    Args:
        ratio: (K,) as in ``clipped_loss``.
        advantages: (K,) A.
        logps: (K,) log p of the sampled token now.
        most: the largest ratio.

    Source: arXiv:2506.13585
    """
    return -ratio.clamp(max=most).detach() * advantages * logps, ratio > most


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """½·max((V − R)², (clamp(V, old ± clip) − R)²) (S,), and where the clip bit (S,) bool.

    Args:
        values: (S,) V now.
        old: (S,) V when sampled.
        returns: (S,) R.
        clip: how far V may move from its old value to an effect.

    Source: arXiv:2403.17031
    """
    free, clipped = (values - returns).square(), (values.clamp(old - clip, old + clip) - returns).square()
    return torch.maximum(free, clipped) / 2, clipped > free


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Each reward minus the mean of the others of its group (N,); NaN where one of the two is missing.

    Args:
        rewards: (N,) NaN for one that does not apply: it is no baseline for others.
        groups: (N,) int64, equal for completions of one prompt, in any order.

    Source: arXiv:2402.14740
    """
    exact = rewards.double()  # so that equal rewards have advantage 0, and not almost
    others = group_sum((~rewards.isnan()).double(), groups) - 1
    sums = group_sum(exact.nan_to_num(), groups)
    return (exact - (sums - exact) / others.where(others > 0, torch.nan)).float()


def group_advantages(rewards: Tensor, groups: Tensor, scale: str = "group", total: Total = alone) -> Tensor:
    """Rewards minus the mean of their group, over a deviation of rewards plus 1e-4 (N,) (GRPO).

    Args:
        rewards: (N,) NaN for one that does not apply: it is in no mean, and its advantage is NaN.
        groups: (N,) int64, as in ``leave_one_out``.
        scale: ``group``, the deviation of the group; ``batch``, that of all rewards of all processes;
            ``none`` divides by nothing.
        total: sum over all processes.

    Source: arXiv:2402.03300; ``none`` arXiv:2503.20783
    """
    difference, deviation = _in_groups(rewards, groups)
    if scale == "batch":
        deviation = moments(rewards[~rewards.isnan()], total)[2].sqrt()
    return (difference if scale == "none" else difference / (deviation + TINY)).float()


def joint_advantages(rewards: Tensor, weights: Tensor, groups: Tensor, total: Total = alone) -> Tensor:
    """Of several rewards: each scaled within its group, then added by weight, then whitened (N,) (GDPO).

    Args:
        rewards: (N, M) M rewards of each completion, NaN for one that does not apply; a completion to which
            none of a weight other than 0 applies has advantage NaN.
        weights: (M,) of the rewards.
        groups: (N,) int64, as in ``leave_one_out``.
        total: sum over all processes.

    Source: arXiv:2601.05242
    """
    combined = torch.zeros_like(rewards[:, 0], dtype=torch.float64)
    for values, weight in zip(rewards.unbind(1), weights.double(), strict=True):
        difference, deviation = _in_groups(values, groups)
        combined = combined + weight * (difference / (deviation + TINY)).nan_to_num()
    combined[rewards[:, weights != 0].isnan().all(1)] = torch.nan
    _, mean, variance = moments(combined[~combined.isnan()], total)
    return ((combined - mean) / (variance.sqrt() + TINY)).float()


def _in_groups(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus the mean of their group (N,), and the deviation of the group (N,), both float64."""
    exact = rewards.double()  # so that equal rewards have advantage 0, and not almost
    mean, deviation = group_moments(exact, groups)
    return exact - mean, deviation
