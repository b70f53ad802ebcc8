"""Tensor maths on flat batches, shared by algorithms. Pure functions, torch only.

Legend: N sequences, S scored tokens one after another, G groups, V vocabulary. ``counts`` (N,) int64 says how
many of the S tokens belong to each sequence; a count of 0 is legal everywhere. Log-probs are natural, KL is
in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:
    from torch import Tensor

Total = Callable[["Tensor"], "Tensor"]  # element-wise sum over all processes


def alone(values: Tensor) -> Tensor:
    """The sum over all processes, where there is only one: values itself."""
    return values


def gather_rows(values: Tensor, total: Total) -> tuple[Tensor, int]:
    """The rows of all processes one after another, and where those of this process begin.

    Args:
        values: (K, …) of this process; K may differ between processes and be 0.
        total: sum over all processes.

    Returns:
        (sum of K, …), the same on every process; int.
    """
    several = distributed.is_available() and distributed.is_initialized()
    place, processes = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
    sizes = torch.zeros(processes, dtype=torch.long, device=values.device)
    sizes[place] = len(values)
    counts = total(sizes).tolist()
    first = sum(counts[:place])
    rows = values.new_zeros(sum(counts), *values.shape[1:])
    rows[first : first + len(values)] = values
    return total(rows), first


def segment_sum(x: Tensor, counts: Tensor) -> Tensor:
    """Sum of x (S,) over each sequence → (N,); an empty sequence sums to 0.

    Raises:
        ValueError: if the counts do not add up to S.
    """
    _check(x, counts)
    return x.new_zeros(len(counts)).index_add(0, owners(counts, len(x)), x)


def segment_mean(x: Tensor, counts: Tensor) -> Tensor:
    """Mean of x (S,) over each sequence → (N,); an empty sequence has mean 0."""
    return segment_sum(x, counts) / counts.clamp(min=1)


def spread(per_sequence: Tensor, counts: Tensor) -> Tensor:
    """A value a sequence (N,), repeated for each of its tokens → (S,)."""
    return per_sequence.repeat_interleave(counts)


def owners(counts: Tensor, size: int | None = None) -> Tensor:
    """(S,) int64, the sequence that each token belongs to; with S as size the device is not waited for."""
    return torch.repeat_interleave(counts, output_size=size)


def last_token(counts: Tensor) -> Tensor:
    """(K,) int64, position among the S tokens of the last one of each sequence that is not empty."""
    return (counts.cumsum(0) - 1)[counts > 0]


def to_padded(x: Tensor, counts: Tensor) -> Tensor:
    """(S,) → (N, longest), right-padded with zeros."""
    longest = int(counts.max()) if len(counts) else 0
    out = x.new_zeros(len(counts), longest)
    out[torch.arange(longest, device=x.device) < counts[:, None]] = x
    return out


def to_flat(padded: Tensor, counts: Tensor) -> Tensor:
    """(N, longest) → (S,), the inverse of ``to_padded``."""
    return padded[torch.arange(padded.shape[1], device=padded.device) < counts[:, None]]


def kl_estimate(policy: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Estimate of KL(policy‖reference) at each token from the log-probs of the taken token.

    Args:
        policy: (S,) log-probs under the policy that sampled.
        reference: (S,) log-probs under the reference.
        kind: ``k1`` −r, ``k2`` r²/2, ``k3`` exp(r) − 1 − r, ``abs`` |r|, with r = reference − policy.

    Returns:
        (S,) nats.

    Raises:
        ValueError: for any other kind.

    Source: http://joschu.net/blog/kl-approx.html
    """
    r = reference - policy
    if kind == "k1":
        return -r
    if kind == "k2":
        return r.square() / 2
    if kind == "k3":
        return r.expm1() - r
    if kind == "abs":
        return r.abs()
    raise ValueError(f"kl estimator must be k1, k2, k3 or abs, not {kind!r}")


def gae(
    rewards: Tensor, values: Tensor, counts: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    Args:
        rewards: (S,) reward of each token.
        values: (S,) value of the state before each token; after the last token it is 0.
        counts: (N,) tokens of each sequence.
        gamma: discount, 0 to 1.
        lam: 0 (one step) to 1 (Monte Carlo).

    Returns:
        advantages (S,): A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t; returns (S,): A + V.

    Source: arXiv:1506.02438, equations 11–16
    """
    rewards_NC, values_NC = to_padded(rewards, counts), to_padded(values, counts)
    advantages_NC = torch.zeros_like(values_NC)
    # Pads are zeros in both: a sequence that ended contributes δ = 0 and A = 0 to the steps before its end.
    after, value_after = values_NC.new_zeros(len(counts)), values_NC.new_zeros(len(counts))
    for t in reversed(range(values_NC.shape[1])):
        delta = rewards_NC[:, t] + gamma * value_after - values_NC[:, t]
        after = delta + gamma * lam * after
        advantages_NC[:, t], value_after = after, values_NC[:, t]
    advantages = to_flat(advantages_NC, counts)
    return advantages, advantages + values


def imitation_loss(logps: Tensor, kind: str = "nll") -> Tensor:
    """−log p of each token (S,), or −p·log p with p a constant, so that unlikely tokens pull less.

    Args:
        logps: (S,) log p.
        kind: ``nll`` or ``dft``.

    Raises:
        ValueError: for any other kind.

    Source: dft arXiv:2508.05629, equation 9
    """
    if kind not in ("nll", "dft"):
        raise ValueError(f"imitation must be nll or dft, not {kind!r}")
    return -logps if kind == "nll" else -logps.detach().exp() * logps


def moments(x: Tensor, total: Total = alone) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and unbiased variance of x (K,) over all processes, () float64 each.

    A single value has variance 0; no value at all has mean 0 and variance 0.
    """
    double = x.double()
    sums = total(
        torch.stack([torch.tensor(float(len(x)), dtype=torch.float64, device=x.device), double.sum()])
    )
    count, mean = sums[0], sums[1] / sums[0].clamp(min=1)
    variance = total((double - mean).square().sum()) / (count - 1).clamp(min=1)
    return count, mean, variance


def whiten(x: Tensor, total: Total = alone, *, shift_mean: bool = True) -> Tensor:
    """(x − mean) · rsqrt(var + 1e-8) over all values of all processes; unbiased variance.

    Args:
        x: any shape.
        total: sum over all processes.
        shift_mean: False keeps the mean.

    Source: arXiv:2403.17031, detail 2.1
    """
    _, mean, variance = moments(x.flatten(), total)
    white = (x - mean) * (variance + 1e-8).rsqrt()
    return (white if shift_mean else white + mean).to(x.dtype)


@dataclass
class RunningMoments:
    """Count, mean and summed squared deviation of all scores seen so far (Chan's parallel update)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 before two scores were seen."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0

    def update(self, count: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Take in a batch of scores by its moments."""
        n, delta = float(count), float(mean) - self.mean
        if n == 0:
            return
        total = self.count + n
        self.squares += float(variance) * max(n - 1, 0) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total


def group_sum(x: Tensor, groups: Tensor) -> Tensor:
    """Sum of x (N,) over the sequences of the same group, at each of them → (N,)."""
    _, index = groups.unique(return_inverse=True)
    return x.new_zeros(int(index.max()) + 1 if len(index) else 0).index_add(0, index, x)[index]


def group_size(groups: Tensor) -> Tensor:
    """(N,) int64, how many sequences share the group of each."""
    return group_sum(torch.ones_like(groups), groups)


def group_moments(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of the group of each value (N,), NaN left out; a single value's is 0."""
    count = group_sum((~x.isnan()).to(x), groups)
    mean = group_sum(x.nan_to_num(), groups) / count.clamp(min=1)
    squares = group_sum((x - mean).nan_to_num().square(), groups)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def quantile(x: Tensor, q: float) -> float:
    """The q-quantile of x (K,), linear between its neighbours; infinite if there is none."""
    if not len(x):
        return math.inf
    place = q * (len(x) - 1)
    below, above = x.sort().values[[math.floor(place), math.ceil(place)]].tolist()
    return float(below + (place - math.floor(place)) * (above - below))


def _check(x: Tensor, counts: Tensor) -> None:
    if int(counts.sum()) != len(x):
        raise ValueError(f"counts add up to {int(counts.sum())}, but there are {len(x)} values")
