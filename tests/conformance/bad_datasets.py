"""A data set for each case, which fails that one and no other; named after the case."""

import random
from dataclasses import dataclass

import rlx


class Good:
    """Questions and answers."""

    def rows(self, split):
        first = {"train": 0, "test": 100}[split]
        return [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(first, first + 20)]


class Builds(Good):
    def __init__(self):
        raise RuntimeError("no licence")


class ConfigDocumented(Good):
    @dataclass(frozen=True)
    class Config:
        size: int = rlx.opt(5, "a default that its bounds do not allow", le=3)

    def __init__(self, config):
        pass


class GivesRows(Good):
    def rows(self, split):
        return [tuple(row.values()) for row in super().rows(split)]


class ColumnsAreConstant(Good):
    def rows(self, split):
        return [{**row, "hint": "add"} if n == 7 else row for n, row in enumerate(super().rows(split))]


class SameRowsEachTime(Good):
    def rows(self, split):
        rows = super().rows(split)
        random.shuffle(rows)
        return rows


class SplitsDoNotOverlap(Good):
    def rows(self, split):
        return super().rows("train")[: 20 if split == "train" else 3]


class FitsAnAlgorithm(Good):
    def rows(self, split):
        return [{"q": row["prompt"], "a": row["answer"]} for row in super().rows(split)]
