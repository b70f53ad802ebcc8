"""A reward for each case, which fails that one and no other; named after the case."""

import math
import random
from dataclasses import dataclass

import rlx


class Good(rlx.Reward):
    """Longer is better."""

    def __call__(self, completions, **columns):
        return [len(text) / 100 for text in completions]


class Builds(Good):
    def __init__(self, config):
        raise RuntimeError("no licence")


class ConfigDocumented(Good):
    @dataclass(frozen=True)
    class Config:
        scale: float = rlx.opt(-1.0, "what a character is worth", gt=0)


class ColumnsDeclared(Good):
    def __call__(self, completions, **columns):
        return [
            float(str(answer) in text) for text, answer in zip(completions, columns["answer"], strict=True)
        ]


class ReturnsOneValueEach(Good):
    def __call__(self, completions, **columns):
        return super().__call__(completions)[:1] * (len(completions) + 1)


class FiniteOrNone(Good):
    def __call__(self, completions, **columns):
        return [text.count("a") / len(text) if text else math.nan for text in completions]


class SurvivesUnusualText(Good):
    def __call__(self, completions, **columns):
        return [len(text.encode("latin-1")) / 100 for text in completions]


class OrderFollowsInput(Good):
    def __call__(self, completions, **columns):
        return sorted(super().__call__(completions))


class IndependentOfBatch(Good):
    def __call__(self, completions, **columns):
        longest = max(map(len, completions)) or 1
        return [len(text) / longest for text in completions]


class HalvesMakeTheWhole(Good):
    """Its metric is a mean, given as if it were a count."""

    independent = True

    def __call__(self, completions, **columns):
        mean = sum(map(len, completions)) / len(completions)
        return rlx.Rewarded(super().__call__(completions), metrics={"length": mean})


class InputsNotMutated(Good):
    def __call__(self, completions, **columns):
        scores = super().__call__(completions)
        completions.clear()
        return scores


class TakesMissingValues(Good):
    def __call__(self, completions, answer, **columns):
        return [float(text.endswith(right.strip())) for text, right in zip(completions, answer, strict=True)]


class StateSurvivesACheckpoint(Good):
    """What it remembers is no state that a checkpoint can keep."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = set()

    def __call__(self, completions, **columns):
        self.seen.update(completions)
        return super().__call__(completions)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = set(state["seen"])


class Noisy(Good):
    """No failure: that it varies is told."""

    def __call__(self, completions, **columns):
        return [random.random() for _ in completions]
