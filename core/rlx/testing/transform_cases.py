"""What holds of every transform: it takes and gives the columns that it declares, and changes no row."""

from __future__ import annotations

import copy
import random
from typing import Any

from rlx.core.errors import PluginError
from rlx.core.row_chain import Ledger, apply
from rlx.core.rows import Table
from rlx.core.settings import Settings
from rlx.core.text import safe_text
from rlx.core.tokenizer import load_tokenizer
from rlx.plugins.transforms import ROW, BadRow
from rlx.testing.data import assistant, user
from rlx.testing.kit import NotApplicable, Subject, case
from rlx.testing.texts import UNUSUAL

Row = dict[str, Any]

COUNT = 6
DECLARED = ("declares_columns",)
WORKS = ("takes_what_it_declares",)


def _value(column: str, number: int) -> Any:
    """A value of a column that data sets usually have; a short text for any other."""
    question, right, wrong = f"What is 5 + {number}?", f"It is {5 + number}.", f"It is {6 + number}."
    known: dict[str, Any] = {
        "prompt": question, "question": question, "instruction": question, "input": f"number {number}",
        "output": right, "response": right, "completion": right, "chosen": right, "rejected": wrong,
        "answer": str(5 + number), "solution": str(5 + number), "label": number % 2 == 0, "score": number / 7,
        "text": f"{question} {right}", "messages": [user(question), assistant(right)],
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": right}],
    }  # fmt: skip
    return known.get(column, f"{column} {number}")


def _transform(subject: Subject) -> Any:
    return subject.once("transform", subject.make)


def _tokenizer(subject: Subject) -> Any:
    return subject.once("tokenizer", lambda: load_tokenizer(Settings()))


def _rows(subject: Subject, also: tuple[str, ...] = ()) -> list[Row]:
    """Sample rows with the columns that it takes and some others, given by the author or made up."""
    if subject.rows is not None:
        return copy.deepcopy(subject.rows)
    columns = [*_transform(subject).takes, *also]
    return [{name: _value(name, number) for name in columns} for number in range(COUNT)]


def _applied(subject: Subject, rows: list[Row]) -> list[Row]:
    try:
        return list(_transform(subject)(rows, _tokenizer(subject)))
    except BadRow as error:
        raise NotApplicable(f"the sample rows do not fit it ({error.what}); give rows that do") from error


@case("transform")
def declares_columns(subject: Subject) -> None:
    """``takes`` and ``gives`` are collections of column names."""
    transform = _transform(subject)
    for name in ("takes", "gives"):
        declared = getattr(transform, name)
        good = isinstance(declared, frozenset | set | tuple | list) and all(
            isinstance(c, str) for c in declared
        )
        assert good, f"{name} is {declared!r}; write frozenset({{'prompt', …}})"


@case("transform", after=DECLARED)
def takes_what_it_declares(subject: Subject) -> None:
    """Rows with no other columns than those in ``takes`` are enough."""
    transform = _transform(subject)
    rows = [{name: row[name] for name in transform.takes if name in row} for row in _rows(subject)]
    try:
        _applied(subject, rows)
    except NotApplicable:
        raise
    except Exception as error:
        columns = ", ".join(sorted(transform.takes)) or "nothing"
        raise AssertionError(
            f"it raises {type(error).__name__}: {error} on rows with {columns} alone; what else does it need?"
        ) from error


@case("transform", after=WORKS)
def gives_what_it_declares(subject: Subject) -> None:
    """Every row that comes out has the columns in ``gives``."""
    gives = frozenset(_transform(subject).gives)
    for number, row in enumerate(_applied(subject, _rows(subject))):
        missing = sorted(gives - set(row))
        assert not missing, f"row {number} of what it gave lacks {', '.join(missing)}, which gives promises"


@case("transform", after=WORKS)
def dropped_rows_are_counted(subject: Subject) -> None:
    """It gives a list of rows, so that those left out are counted and reported."""
    given = _rows(subject)
    rows = [{**row, ROW: number} for number, row in enumerate(given)]
    ledger = Ledger(Table(given, "sample rows"), "drop", 1.0)
    try:
        out = apply(_transform(subject), rows, _tokenizer(subject), ledger)
    except PluginError as error:
        raise AssertionError(f"{error.what}: {error.got}; expected {error.expected}") from error
    counted = sum(ledger.dropped.values())
    assert counted == max(0, len(given) - len(out)), f"{len(given)} rows became {len(out)}, {counted} counted"


@case("transform", after=WORKS)
def rows_not_mutated(subject: Subject) -> None:
    """The rows that it is given are what they were, after the call."""
    rows = _rows(subject)
    before = copy.deepcopy(rows)
    _applied(subject, rows)
    assert rows == before, "it changes the rows that it is given; make new ones: {**row, 'column': value}"


@case("transform", after=WORKS)
def deterministic(subject: Subject) -> None:
    """The same rows give the same rows again."""
    random.seed(1)
    one = _applied(subject, _rows(subject))
    random.seed(2)
    two = _applied(subject, _rows(subject))
    assert one == two, "called twice with the same rows, it gives others"


@case("transform", after=DECLARED)
def takes_no_rows(subject: Subject) -> None:
    """No rows give no rows."""
    out = _applied(subject, [])
    assert out == [], f"no rows became {len(out)}"


@case("transform", after=WORKS)
def survives_unusual_text(subject: Subject) -> None:
    """Empty, very long and foreign text, and control characters do not make it raise anything but BadRow."""
    for text in UNUSUAL:
        row = {name: _with_text(value, text) for name, value in _rows(subject)[0].items()}
        try:
            _transform(subject)([row], _tokenizer(subject))
        except BadRow:
            continue
        except Exception as error:
            raise AssertionError(
                f"it raises {type(error).__name__}: {error} on the text {safe_text(text, 40)!r}"
            ) from error


def _with_text(value: Any, text: str) -> Any:
    """The value with its texts replaced: a text itself, and what the turns of a dialogue say."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [_with_text(item, text) for item in value]
    if isinstance(value, dict):
        return {key: text if key in ("content", "value") else item for key, item in value.items()}
    return value
