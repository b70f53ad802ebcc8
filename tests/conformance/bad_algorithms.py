"""An algorithm for each case, which fails that one and no other; named after the case."""

from dataclasses import dataclass, replace

import torch

import rlx
from rlx.algorithms.orpo import ORPO
from rlx.core.functional import segment_sum


class Good(rlx.Algorithm):
    """Clipped policy gradient with the mean reward of the batch as baseline; it watches the KL."""

    @dataclass(frozen=True)
    class Config:
        clip: float = rlx.opt(0.2, "clip range of the ratio", gt=0)

    completions_per_prompt = 2
    needs = frozenset({"reference"})

    def prepare(self, batch, score):
        batch = batch.take(self.usable(batch))
        advantages = self.advantages(batch, score).repeat_interleave(batch.sequences.counts)
        return replace(batch, advantages=advantages, metrics={"kl": self.kl(batch)})

    def usable(self, batch):
        return (~batch.score.isnan()).nonzero()[:, 0]

    def advantages(self, batch, score):
        total, count = score.total(torch.stack([batch.score.sum(), torch.tensor(float(len(batch)))]))
        return batch.score - total / count.clamp(min=1)

    def kl(self, batch):
        return batch.old - batch.reference

    def loss(self, batch, now):
        ratio = self.ratio(batch, now)
        clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
        terms = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
        return rlx.Loss({"tokens": self.terms(terms, batch)}, {"policy/ratio": ratio})

    def ratio(self, batch, now):
        return (now.logps - batch.old).exp()

    def terms(self, terms, batch):
        return terms


class Builds(Good):
    def __init__(self, config):
        raise RuntimeError("no licence")


class ConfigDocumented(Good):
    @dataclass(frozen=True)
    class Config:
        clip: float = rlx.opt(0.2, "a default that its bounds do not allow", gt=1)


class LossFinite(Good):
    def terms(self, terms, batch):
        return terms * float("nan")


class GradientFlows(Good):
    def ratio(self, batch, now):
        return super().ratio(batch, now).detach()


class GradientStaysInCompletion(ORPO):
    """Imitates the prompts of chosen texts, and does not say so."""

    def __init__(self, config):
        super().__init__(config)
        self.learns_from_prompts = False


class InvariantToPadding(Good):
    """Divides by the longest completion of the micro-batch, as means over padded rows do."""

    def terms(self, terms, batch):
        return terms / batch.sequences.counts.max().clamp(min=1)


class InvariantToMicroBatches(Good):
    """Divides by the rows of the micro-batch."""

    def terms(self, terms, batch):
        return terms / max(1, len(batch))


class InvariantToRowOrder(Good):
    """The first row counts twice."""

    def advantages(self, batch, score):
        advantages = super().advantages(batch, score)
        advantages[:1] *= 2
        return advantages


class FirstStepHasRatioOne(Good):
    def ratio(self, batch, now):
        return (now.logps - batch.old + 0.05).exp()


class NoMarginAtTheReference(Good):
    def kl(self, batch):
        return batch.old.exp() - batch.reference


class EmptyCompletionsStayFinite(Good):
    """A mean over each completion, also over one without tokens."""

    loss_per = ("sequences",)

    def loss(self, batch, now):
        loss, counts = super().loss(batch, now), batch.sequences.counts
        return replace(loss, terms={"sequences": segment_sum(loss.terms["tokens"], counts) / counts})


class UnscorableRewardsStayOut(Good):
    def usable(self, batch):
        return torch.arange(len(batch))


class ResumesBitForBit(Good):
    """Its baseline moves from batch to batch, and is in no checkpoint."""

    def __init__(self, config):
        super().__init__(config)
        self.baseline = 0.0

    def advantages(self, batch, score):
        advantages = super().advantages(batch, score) + 0.1 * self.baseline
        self.baseline += 0.5
        return advantages


class LearnsABandit(Good):
    def terms(self, terms, batch):
        return -terms


class TwoProcessesTrainAsOne(Good):
    """The baseline of each process is its own."""

    def advantages(self, batch, score):
        return batch.score - (batch.score.mean() if len(batch) else 0)
