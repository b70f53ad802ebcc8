"""Tensor maths of preference optimisation. Pure functions, torch only; call them with any tensors.

Legend: R pairs, N = 2R sequences in the order chosen, rejected, chosen, …, S scored tokens one after another.
r is a log-ratio of a whole completion, log policy − log reference, in nats; Δ is always chosen − rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from rlx.core.functional import gather_rows, segment_mean, spread

if TYPE_CHECKING:
    from torch import Tensor

    from rlx.core.functional import Total

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # exp of it is still finite in float32


def sides(per_sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected sequences: (2R, …) → (R, …), (R, …)."""
    return per_sequence[0::2], per_sequence[1::2]


def places(counts: Tensor) -> Tensor:
    """(S,) int64, the place of each token in its sequence, from 0; counts (N,) tokens of each."""
    return torch.arange(int(counts.sum()), device=counts.device) - spread(counts.cumsum(0) - counts, counts)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x ≤ 0, any shape: the log-prob that an event of log-prob x does not happen.

    Accurate at both ends. Where float32 cannot tell exp(x) from 1, x counts as −1.2e-7, so that values stay
    above −16 and gradients finite.

    Source: https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.6931472, (-x.expm1()).log(), (-x.exp()).log1p())


def power(x: Tensor, exponent: float) -> Tensor:
    """(t^exponent − 1) / exponent for log t = x, any shape: x itself at 0 (Box–Cox).

    The gradient ends where t^exponent would leave float32's range.
    """
    if abs(exponent) < 1e-6:
        return x
    return (exponent * x).clamp(max=LARGEST_EXPONENT).expm1() / exponent


def f_score(ratio: Tensor, kind: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """f′(exp(r)) of an f-divergence, up to a constant that cancels in Δ.

    Args:
        ratio: (R,) r.
        kind: ``reverse_kl`` r, ``forward_kl`` 1 − exp(−r), ``js_divergence`` log 2 + log σ(r), or
            ``alpha_divergence`` (exp((α−1)r) − 1)/(α−1).
        alpha: α of the last one; 0 is forward_kl, 1 is reverse_kl.

    Raises:
        ValueError: for any other kind.

    Source: arXiv:2309.16240
    """
    if kind == "js_divergence":
        return 0.6931471805599453 + F.logsigmoid(ratio)
    exponents = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha_divergence": alpha - 1}
    if kind not in exponents:
        raise ValueError(f"f-divergence must be one of {', '.join(F_DIVERGENCES)}, not {kind!r}")
    return power(ratio, exponents[kind])


def smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """−(1−ε) log σ(x) − ε log σ(−x), any shape: logistic loss, a label being wrong with probability ε."""
    loss = -(1 - smoothing) * F.logsigmoid(logits)
    return loss - smoothing * F.logsigmoid(-logits) if smoothing else loss


@dataclass(frozen=True)
class Comparison:
    """What a loss of a pair may look at.

    Attributes:
        chosen: (R,) r of the chosen completion.
        rejected: (R,) r of the rejected one.
        delta: (R,) difference of their scores f(r).
        mean_delta: (R,) the same, each score divided by its completion's tokens.
        beta: strength of the pull to the reference.
        smoothing: ε, probability that a label is wrong.
        tau: temperature of discopop's blend.
    """

    chosen: Tensor
    rejected: Tensor
    delta: Tensor
    mean_delta: Tensor
    beta: float
    smoothing: float = 0.0
    tau: float = 0.05


def _exo(c: Comparison) -> Tensor:
    """KL of (σ(βΔ), σ(−βΔ)) from (1−ε, ε)."""
    x, epsilon = c.beta * c.delta, torch.tensor(c.smoothing, dtype=c.delta.dtype, device=c.delta.device)
    better = x.sigmoid() * (F.logsigmoid(x) - (-epsilon).log1p())
    return better + (-x).sigmoid() * (F.logsigmoid(-x) - epsilon.log())


def _robust(c: Comparison) -> Tensor:
    """The logistic loss, unbiased although labels are flipped with probability ε."""
    x, epsilon = c.beta * c.delta, c.smoothing
    return (epsilon * F.logsigmoid(-x) - (1 - epsilon) * F.logsigmoid(x)) / (1 - 2 * epsilon)


def _discopop(c: Comparison) -> Tensor:
    """Logistic loss (1−m) + exponential loss m, with m = σ(βΔ/τ); in logs, so that no 0·∞ arises."""
    x = c.beta * c.delta
    return -F.logsigmoid(x) * (-x / c.tau).sigmoid() + (F.logsigmoid(x / c.tau) - x).exp()


# Sources: sigmoid arXiv:2305.18290 eq. 7; hinge arXiv:2305.10425; ipo arXiv:2310.12036 eq. 17, per token as
# its authors use it; exo_pair arXiv:2402.00856 eq. 16; nca_pair arXiv:2402.05369; robust arXiv:2403.00409;
# bco_pair arXiv:2404.04656 without its running mean; sppo_hard arXiv:2405.00675 eq. 4.7; apo_zero, apo_down
# arXiv:2408.06266 eq. 7, 8; discopop arXiv:2406.08414 eq. 5; sigmoid_norm arXiv:2411.15124.
PAIR_LOSSES: dict[str, Callable[[Comparison], Tensor]] = {
    "sigmoid": lambda c: -F.logsigmoid(c.beta * c.delta),
    "hinge": lambda c: F.relu(1 - c.beta * c.delta),
    "ipo": lambda c: (c.mean_delta - 1 / (2 * c.beta)).square(),
    "exo_pair": _exo,
    "nca_pair": lambda c: (
        -F.logsigmoid(c.beta * c.chosen)
        - (F.logsigmoid(-c.beta * c.chosen) + F.logsigmoid(-c.beta * c.rejected)) / 2
    ),
    "robust": _robust,
    "bco_pair": lambda c: -F.logsigmoid(c.beta * c.chosen) - F.logsigmoid(-c.beta * c.rejected),
    "sppo_hard": lambda c: (c.chosen - 1 / (2 * c.beta)).square() + (c.rejected + 1 / (2 * c.beta)).square(),
    "apo_zero": lambda c: (-c.beta * c.chosen).sigmoid() + (c.beta * c.rejected).sigmoid(),
    "apo_down": lambda c: (c.beta * c.chosen).sigmoid() + (c.beta * (c.rejected - c.chosen)).sigmoid(),
    "discopop": _discopop,
    "sigmoid_norm": lambda c: -F.logsigmoid(c.beta * c.mean_delta),
}


def preference_loss(
    kind: str,
    chosen: Tensor,
    rejected: Tensor,
    counts: Tensor,
    *,
    beta: float,
    smoothing: float = 0.0,
    tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:
    """The loss of each pair, from the log-ratios of its two completions.

    Args:
        kind: a key of ``PAIR_LOSSES``.
        chosen: (R,) r of the chosen completions; their log-probs if there is no reference.
        rejected: (R,) r of the rejected ones.
        counts: (2R,) scored tokens of each completion; 0 counts as 1.
        beta: strength of the pull to the reference.
        smoothing: ε of ``robust`` and ``exo_pair``.
        tau: temperature of ``discopop``.
        f_divergence: one of ``F_DIVERGENCES``, for the losses of Δ.
        f_alpha: α of ``alpha_divergence``.

    Returns:
        (R,)
    """
    scores = [f_score(ratio, f_divergence, f_alpha) for ratio in (chosen, rejected)]
    means = [score / n.clamp(min=1) for score, n in zip(scores, sides(counts), strict=True)]
    seen = Comparison(
        chosen, rejected, scores[0] - scores[1], means[0] - means[1], beta, smoothing=smoothing, tau=tau
    )
    return PAIR_LOSSES[kind](seen)


def verbosity_weights(counts: Tensor, alpha: float) -> Tensor:
    """(S,) weight of each token in LD-DPO: 1 as long as both completions of a pair go on, then alpha.

    Args:
        counts: (2R,) scored tokens of each completion.
        alpha: 1 counts every token alike, 0 cuts the longer completion to the length of the shorter.

    Source: arXiv:2409.06411
    """
    shared = counts.view(-1, 2).amin(1).repeat_interleave(2)
    return torch.where(places(counts) < spread(shared, counts), 1.0, alpha)


def policy_weights(logps: Tensor, square: Tensor, counts: Tensor) -> Tensor:
    """How likely the policy is to have written each pair itself, detached (WPO).

    Args:
        logps: (S,) log-prob of each token under the policy.
        square: (S,) log Σ_v p(v)², the expected value of it, by which it is aligned.
        counts: (2R,) tokens of each completion.

    Returns:
        (R,) product over both completions of exp(mean(logps − square)); an empty one counts 1.

    Source: arXiv:2406.11827, equation 2
    """
    chosen, rejected = sides(segment_mean((logps - square).detach(), counts).exp())
    return chosen * rejected


def partners(values: Tensor, others: Tensor) -> Tensor:
    """For each of values (K,) the one of others (K,) that has the same rank → (K,)."""
    ranks = values.argsort(stable=True).argsort()
    return others.sort().values[ranks]


def sorted_anchors(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], total: Total) -> Tensor:
    """What ``sorted_loss`` needs to know of the pairs of all processes.

    aot_unpaired is Σ_k g(r_c(k) − r_r(k)), with r_c(k) the k-th smallest of all r_c and r_r(k) that of all
    r_r. Moving the r_c of one pair moves one r_c(k), hence ∂/∂r_c = g′(r_c − a) where a is the r_r(k) of the
    same rank, a number for this purpose; likewise ∂/∂r_r = −g′(b − r_r), b being the r_c(k) of the rank of
    r_r. Given its a and b, a pair has the gradient of the sort over everything, wherever the other pairs are.
    aot sorts log-prob gaps lp_c − lp_r against those of the reference, numbers anyway: one partner a pair.

    Args:
        policy: log-probs of the chosen (R,) and of the rejected completions (R,), without gradient.
        reference: the same under the reference.
        total: sum over all processes.

    Returns:
        (R, 3): the reference's gap at the rank of this pair's gap; a; b.

    Source: arXiv:2406.05882
    """
    ratios = [lp - base for lp, base in zip(policy, reference, strict=True)]
    mine = torch.stack([policy[0] - policy[1], reference[0] - reference[1], *ratios], dim=1)
    rows, first = gather_rows(mine, total)
    gap, base_gap, chosen, rejected = rows.unbind(dim=1)
    found = [partners(gap, base_gap), partners(chosen, rejected), partners(rejected, chosen)]
    return torch.stack(found, dim=1)[first : first + len(mine)]


def sorted_loss(
    kind: str,
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    anchors: Tensor,
    *,
    beta: float,
    smoothing: float = 0.0,
) -> Tensor:
    """A pair's share in a loss of sorted values: the shares sum to it, and so do their gradients.

    Args:
        kind: ``aot`` or ``aot_unpaired``.
        policy: log-probs of the chosen (R,) and of the rejected completions (R,).
        reference: the same under the reference.
        anchors: (R, 3) from ``sorted_anchors``.
        beta: strength of the pull to the reference.
        smoothing: ε.

    Returns:
        (R,)
    """
    if kind == "aot":
        return smoothed(beta * (policy[0] - policy[1] - anchors[:, 0]), smoothing)
    chosen, rejected = (lp - base for lp, base in zip(policy, reference, strict=True))
    from_chosen = smoothed(beta * (chosen - anchors[:, 1]), smoothing)
    from_rejected = smoothed(beta * (anchors[:, 2] - rejected), smoothing)
    both = from_chosen + from_rejected
    # Every rank is seen from both of its ends: half of the value, but all of the gradient.
    return both - both.detach() / 2


def contrastive_loss(
    kind: str,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    smoothing: float = 0.0,
    gamma: float = 0.5,
    alpha: float = 0.0,
) -> Tensor:
    """The loss of each pair (R,) without a reference (CPO, SimPO, AlphaPO); or of log-ratios, with one.

    Args:
        kind: ``sigmoid`` −log σ(βΔ), ``hinge`` relu(1 − βΔ), ``ipo`` (Δ − 1/(2β))², ``simpo``
            −log σ(βΔ − gamma).
        chosen: (R,) log-probs of the chosen completions: means of their tokens for simpo and ipo, else sums.
        rejected: (R,) those of the rejected ones.
        beta: scale of the rewards.
        smoothing: ε of ``sigmoid`` and ``simpo``.
        gamma: margin of ``simpo``.
        alpha: rewards are (1 − p^−alpha)/alpha in the place of log p; 0 for log p.

    Source: arXiv:2401.08417; simpo arXiv:2405.14734, equation 6; ipo arXiv:2310.12036; alpha arXiv:2501.03884
    """
    delta = power(chosen, -alpha) - power(rejected, -alpha)
    if kind == "hinge":
        return F.relu(1 - beta * delta)
    if kind == "ipo":
        return (delta - 1 / (2 * beta)).square()
    if kind not in ("sigmoid", "simpo"):
        raise ValueError(f"a loss of pairs must be sigmoid, hinge, ipo or simpo, not {kind!r}")
    return smoothed(beta * delta - (gamma if kind == "simpo" else 0.0), smoothing)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """−β log σ of the log odds ratio of each pair (R,), and that ratio (R,) (ORPO).

    Args:
        chosen: (R,) mean log-prob of a token of the chosen completions: log p in the odds p/(1 − p).
        rejected: (R,) that of the rejected ones.
        beta: weight, the paper's λ.

    Source: arXiv:2403.07691, equations 4 and 7
    """
    odds = chosen - rejected - log1mexp(chosen) + log1mexp(rejected)
    return -beta * F.logsigmoid(odds), odds


def labelled_loss(
    ratio: Tensor,
    desirable: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """weight·(1 − σ(β(r − kl))) of desirable completions, weight·(1 − σ(β(kl − r))) of the others (N,) (KTO).

    Args:
        ratio: (N,) r.
        desirable: (N,) bool.
        kl: () or (N,) the point of reference, not negative; 0 gives apo_zero_unpaired.
        beta: strength of the pull to the reference.
        desirable_weight: weight of the desirable ones.
        undesirable_weight: weight of the others.

    Source: arXiv:2402.01306; with kl 0 arXiv:2408.06266, equation 7
    """
    above = torch.where(desirable, ratio - kl, kl - ratio)
    return torch.where(desirable, desirable_weight, undesirable_weight) * (-beta * above).sigmoid()


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, centering: float | None = None
) -> Tensor:
    """−log σ(chosen − rejected − margin) + centering·(chosen + rejected)² of each pair (R,) (Bradley–Terry).

    Args:
        chosen: (R,) scores of the chosen completions.
        rejected: (R,) scores of the rejected ones.
        margin: (R,) or a number: how much better the chosen one is to be.
        centering: pull of the scores of a pair towards mean 0; None for none.

    Source: arXiv:2203.02155, equation 1; margin arXiv:2307.09288, equation 2; centring arXiv:2312.09244
    """
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss if centering is None else loss + centering * (chosen + rejected).square()


def of_chosen(per_token: Tensor, counts: Tensor) -> Tensor:
    """The values (S,) of the tokens of chosen completions alone; counts (2R,) tokens of each completion."""
    return per_token[spread(torch.arange(len(counts), device=counts.device) % 2 == 0, counts)]


def comparison_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What every pairwise method reports of its rewards (R,) of both sides, a value a pair."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }
