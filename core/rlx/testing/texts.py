"""Texts that models write, and texts that break things."""

from __future__ import annotations

import copy
from typing import Any

from rlx.testing.kit import Subject

ORDINARY = (
    "The sum is 5 + 7 = 12. Answer: 12",
    "I think it is 94.",
    "<think>\n5 and 7 are 12.\n</think>\n<answer>\n12\n</answer>",
    "no no no no no no no no",
    "Let me see. Ann has 7 more than 5, which makes 12, or so it seems to me. Answer: 13",
    "12",
)
UNUSUAL = (
    "", " ", "\n\n\n", "\x00", "é 漢字 🎉 \u202e \u200b", "١٢ ½ ∞", "NaN", "1e999", "-" * 60, "word " * 150,
    "<think>", "</answer>", "\\boxed{", "((((((((((", "Answer: ", "%s {0} {x!r}", "'; DROP TABLE x; --",
)  # fmt: skip

KNOWN: dict[str, Any] = {"answer": "12", "solution": "12", "label": True, "ground_truth": "12"}


def column_values(subject: Subject, column: str, count: int) -> list[Any]:
    """Values of a data-set column, from the sample rows or made up.

    Args:
        subject: a reward or judge that needs the column.
        column: its name.
        count: how many values.

    Raises:
        AssertionError: there are sample rows, and none has the column.
    """
    given = [row[column] for row in subject.rows or [] if column in row]
    if subject.rows and not given:
        raise AssertionError(f"it needs the column {column!r}, which the sample rows do not have")
    values = given or [KNOWN.get(column, f"{column} of a row")]
    return [copy.deepcopy(values[number % len(values)]) for number in range(count)]
