"""Rows through transforms, with an account of every row that does not come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlx.core.errors import DataError, PluginError, RlxError
from rlx.core.rows import Table
from rlx.core.text import safe_text
from rlx.plugins import references
from rlx.plugins.transforms import ROW, BadRow

Row = dict[str, Any]
SHOWN = 5  # places named in a message


@dataclass
class Ledger:
    """What happens to the rows of one data set.

    Attributes:
        table: the data set.
        on_bad_row: ``error`` or ``drop``.
        max_bad_rows: the share of rows that ``drop`` may leave out.
        report: lines for the user.
        dropped: reason → rows left out.
        bad: rows left out because they cannot be used.
    """

    table: Table
    on_bad_row: str
    max_bad_rows: float
    report: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    bad: int = 0

    def note(self, line: str) -> None:
        """Add a line to the report."""
        self.report.append(line)

    def places(self, rows: Sequence[Row]) -> str:
        """Where rows came from: the first five and how many more."""
        named = ", ".join(self.table.place(row[ROW]) for row in rows[:SHOWN])
        return named + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")

    def unusable(self, rows: Sequence[tuple[Row, str]]) -> None:
        """Rows that cannot be used, each with its reason: an error, or left out, as on_bad_row says.

        Raises:
            DataError: with on_bad_row error, or when more are bad than max_bad_rows allows.
        """
        if not rows:
            return
        reasons = Counter(reason for _, reason in rows)
        self.bad += len(rows)
        what = f"{self.bad} of {len(self.table)} rows of {self.table.name} cannot be used"
        got = "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common(SHOWN))
        where = self.places([row for row, _ in rows])
        if self.on_bad_row == "error":
            raise DataError(
                what,
                code="E-DATA-ROW",
                where=where,
                got=got,
                hint=f"mend them, or --on-bad-row drop (at most --max-bad-rows {self.max_bad_rows:g} of all)",
            )
        if self.bad > self.max_bad_rows * len(self.table):
            raise DataError(
                what,
                code="E-DATA-ROW",
                where=where,
                got=got,
                expected=f"at most {self.max_bad_rows:.2%} of the rows: max_bad_rows {self.max_bad_rows:g}",
                hint=f"mend them, or --max-bad-rows {min(1.0, 1.1 * self.bad / len(self.table)):.2g}",
            )
        self.drop(len(rows), f"cannot be used: {got} at {where}")

    def drop(self, count: int, reason: str, of: int | None = None) -> None:
        """Rows left out by a rule that the user chose, and why; ``of`` where they are not the table's."""
        self.dropped[reason] += count
        self.note(f"left out {count} of {of or len(self.table)} rows: {reason}")

    def check_left(self, rows: Sequence[Any]) -> None:
        """Refuse to go on without rows.

        Raises:
            DataError: ``0 of 24 rows left: 24 over 128 tokens``.
        """
        if not rows:
            why = "; ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            raise DataError(
                f"0 of {len(self.table)} rows of {self.table.name} left: {why}", code="E-DATA-EMPTY"
            )


def name_of(transform: Any) -> str:
    """The transform's name for messages."""
    return references.describe(
        "transform", transform if hasattr(transform, "__qualname__") else type(transform)
    )


def apply(transform: Any, rows: list[Row], tokenizer: Any, ledger: Ledger) -> list[Row]:
    """Rows through one transform.

    A transform that raises is called again with one row at a time, to find out which rows are to blame.

    Args:
        transform: built, with ``takes`` and ``gives``.
        rows: with their numbers under ROW.
        tokenizer: handed on.
        ledger: the account that is kept.

    Returns:
        What the transform gave, numbered.

    Raises:
        DataError: rows that cannot be used, as far as on_bad_row does not allow for them; no row left.
        PluginError: the transform fails, or gives something that is no list of rows.
    """
    try:
        out = transform([dict(row) for row in rows], tokenizer)
    except Exception as error:
        if isinstance(error, RlxError) and not isinstance(error, BadRow):
            raise
        rows = _without_failing(transform, rows, tokenizer, ledger, error)
        out = transform([dict(row) for row in rows], tokenizer) if rows else []
    out = _numbered(transform, rows, out)
    if len(out) < len(rows):
        ledger.drop(len(rows) - len(out), f"by transform {name_of(transform)}")
    elif len(out) > len(rows):
        ledger.note(f"transform {name_of(transform)}: {len(rows)} rows became {len(out)}")
    ledger.check_left(out)
    return out


def _without_failing(
    transform: Any, rows: list[Row], tokenizer: Any, ledger: Ledger, error: Exception
) -> list[Row]:
    failing: list[tuple[Row, Exception]] = []
    kept = []
    for row in rows:
        try:
            transform([dict(row)], tokenizer)
        except Exception as alone:  # a plugin may raise anything; it is told below
            failing.append((row, alone))
        else:
            kept.append(row)
    faults = [(row, alone) for row, alone in failing if not isinstance(alone, BadRow)]
    if not failing or (faults and ledger.on_bad_row == "error"):
        cause = faults[0][1] if faults else error
        together = f"all {len(rows)} rows together, none of them alone"
        place = ledger.table.place(faults[0][0][ROW]) if faults else together
        raise PluginError(
            f"transform {name_of(transform)} failed ({references.origin(transform)})",
            code="E-PLUGIN-TRANSFORM",
            where=place,
            got=f"{type(cause).__name__}: {safe_text(cause, 200)}",
            hint="mend the transform" + ", or leave such rows out: --on-bad-row drop" * bool(faults),
        ) from cause
    ledger.unusable([(row, _reason(transform, alone)) for row, alone in failing])
    return kept


def _reason(transform: Any, error: Exception) -> str:
    if isinstance(error, BadRow):
        return error.what
    return f"transform {name_of(transform)} raises {type(error).__name__}: {safe_text(error, 80)}"


def _numbered(transform: Any, rows: list[Row], out: Any) -> list[Row]:
    """The rows with their numbers; the shape of what a transform gave is checked on the way."""
    name = name_of(transform)
    if not isinstance(out, list):
        raise PluginError(
            f"transform {name} gave no list of rows ({references.origin(transform)})",
            code="E-PLUGIN-TRANSFORM",
            got=type(out).__name__,
            expected="a list of dicts",
            hint="return the rows at the end of __call__" if out is None else "",
        )
    gives = frozenset(transform.gives)
    numbered = []
    for index, row in enumerate(out):
        if not isinstance(row, dict) or not gives <= row.keys():
            raise PluginError(
                f"transform {name} gave a row of the wrong shape ({references.origin(transform)})",
                code="E-PLUGIN-TRANSFORM",
                where=f"row {index} of what it gave",
                got=f"a dict of {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__,
                expected="a dict" + (f" with {', '.join(sorted(gives))}" if gives else ""),
            )
        # A row made anew has lost its number: with as many rows as before it is the one at its place.
        number = row.get(ROW, rows[index][ROW] if len(out) == len(rows) else index)
        numbered.append({**row, ROW: number})
    return numbered
