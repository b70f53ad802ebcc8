"""What holds of every algorithm, measured on batches of known tokens; whole runs are in ``run_cases``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlx.core.batch import Batch
from rlx.core.streams import generator
from rlx.testing.kit import NotApplicable, Subject, case
from rlx.testing.lab import PROMPTS, UNEVEN, Lab, Measured, by_sequence

FINITE = ("loss_finite",)
FLOWS = ("gradient_flows",)
EQUAL = (4,)  # completion lengths of a batch that needs no padding
SHORT = (0, 1, 6, 1, 0, 3, 1)


def lab_of(subject: Subject) -> Lab:
    """The laboratory of an algorithm, one for all cases."""
    lab: Lab = subject.once("lab", lambda: Lab(subject))
    return lab


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def _moved(lab: Lab, batch: Any) -> Any:
    """Rollouts of a policy that has moved since it sampled, so that ratios are not 1; others as they are."""
    if not lab.online:
        return batch
    noise = torch.randn(batch.old.shape, generator=generator(17, "moved"))
    return replace(batch, old=batch.old + 0.1 * noise)


def _measured(lab: Lab, batch: Any) -> tuple[Batch, Measured]:
    algorithm = lab.algorithm
    prepared = lab.prepared(batch, algorithm)
    return prepared, lab.measure(algorithm, prepared, lab.scores(prepared))


def _finite(measured: Measured) -> None:
    assert math.isfinite(measured.value), f"the loss is {measured.value}"
    for name, gradient in measured.gradients.items():
        wrong = int((~gradient.isfinite()).sum())
        assert not wrong, f"the gradient in {name} is not finite at {wrong} of {len(gradient)} places"
    for name, values in measured.metrics.items():
        assert bool(values.isfinite().all()), f"the metric {name} is not finite"


@case("algorithm", after=("builds", "config_documented"))
def loss_finite(subject: Subject) -> None:
    """Loss, gradient and metrics of an ordinary batch are finite numbers."""
    lab = lab_of(subject)
    _finite(_measured(lab, _moved(lab, lab.batch()))[1])


@case("algorithm", after=FINITE)
def gradient_flows(subject: Subject) -> None:
    """The loss has a gradient in what the policy says of the tokens."""
    lab = lab_of(subject)
    _, measured = _measured(lab, _moved(lab, lab.batch()))
    largest = {name: float(g.abs().max()) if len(g) else 0.0 for name, g in measured.gradients.items()}
    policy = max(largest.get("logps", 0.0), largest.get("reward", 0.0))
    assert policy > 0, "the loss has no gradient in the log-probs: is something detached, or under no_grad?"


@case("algorithm", after=FLOWS)
def gradient_stays_in_completion(subject: Subject) -> None:
    """No gradient reaches the tokens of prompts, unless it says that it learns from them."""
    lab = lab_of(subject)
    if lab.pristine.learns_from_prompts:
        raise NotApplicable("it learns from prompts, as learns_from_prompts says")
    prepared, measured = _measured(lab, _moved(lab, lab.batch()))
    sequences = prepared.sequences
    places = torch.arange(len(sequences.ids)) - sequences.starts[sequences.owners]
    in_prompt = (places < sequences.prompt_lengths[sequences.owners])[sequences.scored]
    if "reward" in lab.pristine.needs:
        raise NotApplicable("a classifier scores whole sequences")
    reached = int((measured.gradients["logps"][in_prompt] != 0).sum())
    assert not reached, f"{reached} prompt tokens get a gradient; or set learns_from_prompts = True"


def _assert_same_over_parts(subject: Subject, counts: Sequence[int], splits: list[list[list[int]]]) -> None:
    """The gradient is the same however the rows are cut into micro-batches; rows by number."""
    lab = lab_of(subject)
    algorithm = lab.algorithm
    batch = lab.prepared(_moved(lab, lab.batch(counts)), algorithm)
    now, rows = lab.scores(batch), len(batch)
    found = []
    for split in splits:
        kept = [[number for number in part if number < rows] for part in split]
        found.append(lab.measure(algorithm, batch, now, [part for part in kept if part]))
    for other in found[1:]:
        for name, gradient in found[0].gradients.items():
            worst = float((gradient - other.gradients[name]).abs().max()) if len(gradient) else 0.0
            assert _close(gradient, other.gradients[name]), (
                f"the gradient in {name} differs by up to {worst:.3g}, of {float(gradient.abs().max()):.3g}"
            )


def _row_lengths(lab: Lab) -> Tensor:
    """Tokens of each row of the uneven batch, as it is after ``prepare``."""
    batch = lab.prepared(_moved(lab, lab.batch()), lab.algorithm)
    return batch.sequences.lengths.view(len(batch), -1).sum(dim=1)


@case("algorithm", after=FLOWS)
def invariant_to_padding(subject: Subject) -> None:
    """A row's gradient does not depend on how long the other rows of its micro-batch are."""
    lengths = _row_lengths(lab_of(subject))
    order = lengths.argsort(stable=True).tolist()
    rows = len(order) - len(order) % 2
    alike = [[order[i], order[i + 1]] for i in range(0, rows, 2)]
    mixed = [[order[i], order[rows - 1 - i]] for i in range(rows // 2)]
    rest = [order[rows:]]
    _assert_same_over_parts(subject, UNEVEN, [alike + rest, mixed + rest])


@case("algorithm", after=FLOWS)
def invariant_to_micro_batches(subject: Subject) -> None:
    """The gradient of a mini-batch is the same in one micro-batch, in uneven ones, and row by row."""
    lab = lab_of(subject)
    rows = PROMPTS * lab.each
    whole, single = [[*range(rows)]], [[number] for number in range(rows)]
    uneven = [[0], [*range(1, rows)]]
    _assert_same_over_parts(subject, EQUAL, [whole, uneven, single])


@case("algorithm", after=FLOWS)
def invariant_to_row_order(subject: Subject) -> None:
    """Prompts, and the completions of each, in another order give every sequence the same gradient."""
    lab = lab_of(subject)
    batch = _moved(lab, lab.batch(EQUAL))
    each = len(batch) // PROMPTS
    draw = generator(19, "order")
    prompts = torch.randperm(PROMPTS, generator=draw)
    within = torch.stack([torch.randperm(each, generator=draw) for _ in range(PROMPTS)])
    order = (prompts[:, None] * each + within).flatten()
    turned = batch.take(order)
    if getattr(batch, "mismatched", None) is not None:  # of whole batches of labeled rows only
        turned = replace(turned, mismatched=batch.mismatched.take(order))
    one, other = (
        by_sequence(measured, prepared) for prepared, measured in (_measured(lab, b) for b in (batch, turned))
    )
    assert one.keys() == other.keys(), "with the rows in another order it learns from other sequences"
    for key, gradients in one.items():
        for name, gradient in gradients.items():
            worst = float((gradient - other[key][name]).abs().max()) if len(gradient) else 0.0
            assert _close(gradient, other[key][name]), (
                f"the gradient of a sequence in {name} differs by {worst:.3g} in another order of rows"
            )


@case("algorithm", after=FINITE)
def first_step_has_ratio_one(subject: Subject) -> None:
    """Before the policy moves away from what it sampled, ratios are 1 and nothing is clipped."""
    lab = lab_of(subject)
    if not lab.online:
        raise NotApplicable("it does not sample")
    batch = lab.batch()
    now = lab.scores(batch)
    if "reward" in lab.pristine.needs or len(now.logps) != len(batch.old):
        raise NotApplicable("the policy is a classifier")
    _, measured = _measured(lab, replace(batch, old=now.logps))
    expected = {"policy/ratio": 1.0, "policy/approx_kl": 0.0, "policy/clip_fraction": 0.0}
    logged = {name: value for name, value in expected.items() if name in measured.metrics}
    if not logged:
        raise NotApplicable(f"it logs none of {', '.join(expected)}")
    for name, value in logged.items():
        found = measured.mean(name)
        assert abs(found - value) < 1e-4, (
            f"{name} is {found:.5g} where the policy has not moved, not {value:g}"
        )


@case("algorithm", after=FINITE)
def no_margin_at_the_reference(subject: Subject) -> None:
    """Where the policy is its reference, margins of implicit rewards and the KL are 0."""
    lab = lab_of(subject)
    if "reference" not in lab.pristine.needs:
        raise NotApplicable("it needs no reference")
    batch = lab.batch()
    same = lab.scores(batch).logps
    more = {"old": same} if lab.online else {}
    prepared, measured = _measured(lab, replace(batch, reference=same, **more))
    names = ("rewards/margins", "kl") if lab.online else ("rewards/margins",)
    told = {**prepared.metrics, **measured.metrics}
    logged = [name for name in names if name in told]
    if not logged:
        raise NotApplicable(f"it logs none of {', '.join(names)}")
    for name in logged:
        largest = float(told[name].abs().max())
        assert largest < 1e-4, f"{name} is up to {largest:.4g} where policy and reference agree, not 0"


@case("algorithm", after=FINITE)
def empty_completions_stay_finite(subject: Subject) -> None:
    """Completions of no and of one token leave loss, gradient and metrics finite."""
    lab = lab_of(subject)
    _finite(_measured(lab, _moved(lab, lab.batch(SHORT)))[1])


@case("algorithm", after=FINITE)
def unscorable_rewards_stay_out(subject: Subject) -> None:
    """Completions to which no reward applies (NaN) do not reach the loss of the others."""
    lab = lab_of(subject)
    if not lab.online:
        raise NotApplicable("it does not sample")
    batch = _moved(lab, lab.batch())
    missing = torch.rand(len(batch), generator=generator(23, "missing")) < 0.4
    missing[: lab.each] = True  # of the first prompt all
    for which in (missing, torch.ones_like(missing)):
        score = batch.score.masked_fill(which, math.nan)
        some = replace(batch, score=score, rewards={name: score for name in batch.rewards})
        _finite(_measured(lab, some)[1])
