"""What holds of every data set: rows that an algorithm can use, the same each time, splits apart."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from rlx.core.errors import RlxError
from rlx.core.row_source import columns_of
from rlx.plugins.loading import EATS
from rlx.plugins.transforms.formats import find_way
from rlx.testing.kit import NotApplicable, Subject, case

GIVES = ("gives_rows",)


def _rows(subject: Subject, split: str = "train") -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = subject.once(("rows", split), lambda: subject.make().rows(split))
    return made


def _written(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _test_rows(subject: Subject) -> list[dict[str, Any]]:
    try:
        return _rows(subject, "test")
    except RlxError as error:
        raise NotApplicable("it has no test split") from error


@case("dataset")
def gives_rows(subject: Subject) -> str:
    """``rows("train")`` is a list of dicts from column to value."""
    rows = _rows(subject)
    assert isinstance(rows, list), f"rows('train') gave a {type(rows).__name__}, not a list"
    assert rows, "the train split has no rows"
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    assert wrong is None, f"row {wrong} is a {type(rows[wrong or 0]).__name__}, not a dict"
    return f"{len(rows)} rows"


@case("dataset", after=GIVES)
def columns_are_constant(subject: Subject) -> None:
    """Every row has the same columns, in every split."""
    rows = _rows(subject)
    first = set(rows[0])
    for split, found in (("train", rows), ("test", _test_rows(subject))):
        for number, row in enumerate(found):
            odd = sorted(map(str, set(row) ^ first))
            assert not odd, f"row {number} of {split} differs from the first of train in {', '.join(odd)}"


@case("dataset", after=GIVES)
def same_rows_each_time(subject: Subject) -> None:
    """Two of them with the same options give the same rows, whatever was drawn before."""
    for split in ("train", "test"):
        one = _rows(subject) if split == "train" else _test_rows(subject)
        random.seed(12345)
        two = subject.make().rows(split)
        assert list(map(_written, one)) == list(map(_written, two)), (
            f"the rows of {split} are others each time"
        )


@case("dataset", after=GIVES)
def splits_do_not_overlap(subject: Subject) -> None:
    """No row of the test split, and no prompt, is in the train split."""
    rows, held_out = _rows(subject), _test_rows(subject)
    for name, key in (
        ("rows", _written),
        ("prompts", lambda row: _written({"": row.get("prompt", id(row))})),
    ):
        both = {*map(key, rows)} & {*map(key, held_out)}
        assert not both, f"{len(both)} {name} of the test split are in the train split, as {min(both)[:100]}"


@case("dataset", after=GIVES)
def fits_an_algorithm(subject: Subject) -> str:
    """Its columns are those that prompts, pairs, labelled completions or demonstrations are made of."""
    rows = _rows(subject)
    fits = [eats for eats in EATS if find_way(columns_of(rows), rows, eats) is not None]
    assert fits, f"no algorithm can use the columns {', '.join(columns_of(rows))} without a mapping"
    return ", ".join(fits)
