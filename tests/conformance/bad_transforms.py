"""A transform for each case, which fails that one and no other; named after the case."""

import random
from dataclasses import dataclass

import rlx


class Good(rlx.Transform):
    """The prompt in capitals, in a column of its own."""

    takes = frozenset({"prompt"})
    gives = frozenset({"loud"})

    def __call__(self, rows, tokenizer):
        return [{**row, "loud": row["prompt"].upper()} for row in rows]


class Builds(Good):
    def __init__(self, config):
        raise RuntimeError("no licence")


class ConfigDocumented(Good):
    @dataclass
    class Config:
        times: int = rlx.opt(1, "not frozen")


class DeclaresColumns(Good):
    takes = "prompt"


class TakesWhatItDeclares(Good):
    def __call__(self, rows, tokenizer):
        return [{**row, "loud": row["question"].upper()} for row in rows]


class GivesWhatItDeclares(Good):
    # The account of rows asks for the columns as well; it is kept by what runs build on.
    def __call__(self, rows, tokenizer):
        return [row if len(row) == 1 else {**row, "loud": row["prompt"].upper()} for row in rows]


class DroppedRowsAreCounted(Good):
    def __call__(self, rows, tokenizer):
        return tuple(super().__call__(rows, tokenizer))


class RowsNotMutated(Good):
    def __call__(self, rows, tokenizer):
        for row in rows:
            row["loud"] = row["prompt"].upper()
        return rows


class Deterministic(Good):
    def __call__(self, rows, tokenizer):
        return [{**row, "loud": f"{row['prompt']}{random.random()}"} for row in rows]


class TakesNoRows(Good):
    def __call__(self, rows, tokenizer):
        return super().__call__(rows, tokenizer) or [{"prompt": "", "loud": ""}]


class SurvivesUnusualText(Good):
    def __call__(self, rows, tokenizer):
        return [{**row, "loud": row["prompt"][0].upper() + row["prompt"][1:]} for row in rows]
