"""A judge for each case, which fails that one and no other; named after the case."""

from dataclasses import dataclass

import rlx


class Good:
    """The longer one is better."""

    def judge(self, prompts, pairs):
        return [None if len(one) == len(other) else int(len(other) > len(one)) for one, other in pairs]


class Builds(Good):
    def __init__(self):
        raise RuntimeError("no licence")


class ConfigDocumented(Good):
    @dataclass
    class Config:
        margin: float = rlx.opt(0.0, "not frozen")

    def __init__(self, config):
        pass


class ReturnsOneVerdictEach(Good):
    def judge(self, prompts, pairs):
        return [one > other for one, other in pairs]


class OrderFollowsInput(Good):
    def judge(self, prompts, pairs):
        return sorted(super().judge(prompts, pairs), key=lambda verdict: (verdict is None, verdict))


class TakesNoPairs(Good):
    def judge(self, prompts, pairs):
        return super().judge(prompts, pairs) or [None]


class SurvivesUnusualText(Good):
    def judge(self, prompts, pairs):
        return [int(other.split()[0] > one.split()[0]) for one, other in pairs]


class InputsNotMutated(Good):
    def judge(self, prompts, pairs):
        verdicts = super().judge(prompts, pairs)
        pairs.sort()
        return verdicts
