"""Preference data as token ids: pairs, and single completions that are desirable or not.

Tokenised once, when the run is checked; a batch is made of lists of ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlx.core.answered import Answered, load_answered, places_of
from rlx.core.batch import Labeled, Pairs, Sequences
from rlx.core.errors import DataError
from rlx.core.row_chain import Ledger
from rlx.core.settings import Settings
from rlx.core.tokens import fitted
from rlx.plugins.transforms import ROW

Row = dict[str, Any]

EQUAL_PAIRS = 0.1  # the largest share of pairs without a difference
TRUE, FALSE = ("true", "1", "1.0", "yes", "desirable"), ("false", "0", "0.0", "-1", "no", "undesirable")


@dataclass(frozen=True)
class PairData:
    """Preference pairs.

    Attributes:
        texts: the rendered prompts.
        prompts, chosen, rejected: token ids, a list a pair.
        margins: how much better the chosen one is, a number a pair; None where the data does not say.
        rows: row numbers in the data set.
        fingerprint: SHA-256 of rows and token ids; a resumed run compares it.
        report: what was read, mapped, left out and cut, and warnings; one line each.
    """

    texts: list[str]
    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    margins: list[float] | None
    rows: list[int]
    fingerprint: str
    report: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: Sequence[int], mine: Sequence[int] | None = None) -> Pairs:
        """The pairs of one batch that belong to this process.

        Args:
            rows: numbers of the pairs of the whole batch, over all processes.
            mine: places in ``rows`` that are this process's; None for all.
        """
        places = places_of(rows, mine)
        picked = [rows[place] for place in places]
        sequences = Sequences.from_lists(
            [self.prompts[row] for row in picked for _ in range(2)],
            [side[row] for row in picked for side in (self.chosen, self.rejected)],
            groups=[place for place in places for _ in range(2)],
        )
        if self.margins is None:
            return Pairs(sequences)
        margins = [self.margins[row] for row in picked]
        return Pairs(sequences, margin=torch.tensor(margins, dtype=torch.float32))


@dataclass(frozen=True)
class LabeledData:
    """Completions that are desirable or not.

    Attributes:
        texts: the rendered prompts.
        prompts, completions: token ids, a list a row.
        desirable: a flag a row.
        max_length: most tokens of a prompt with any completion.
        truncation_mode: how a prompt with another row's completion is cut to it.
        rows, fingerprint, report: as in ``PairData``.
    """

    texts: list[str]
    prompts: list[list[int]]
    completions: list[list[int]]
    desirable: list[bool]
    max_length: int
    truncation_mode: str
    rows: list[int]
    fingerprint: str
    report: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: Sequence[int], mine: Sequence[int] | None = None) -> Labeled:
        """The rows of one batch that belong to this process, and their mismatched pairs.

        Args:
            rows: numbers of the rows of the whole batch, over all processes.
            mine: places in ``rows`` that are this process's; None for all.

        Returns:
            ``mismatched`` is each prompt with the completion of the next row of the whole batch, the last one
            with the first's; None for a batch of one row.
        """
        places = places_of(rows, mine)
        picked = [rows[place] for place in places]
        # Rows of one prompt make a group, in which it is computed once.
        first: dict[tuple[int, ...], int] = {}
        for place, row in enumerate(rows):
            first.setdefault(tuple(self.prompts[row]), place)
        groups = [first[tuple(self.prompts[row])] for row in picked]
        mismatched = None
        if len(rows) > 1:
            following = [rows[(place + 1) % len(rows)] for place in places]
            cut = [self._mismatched(row, other) for row, other in zip(picked, following, strict=True)]
            mismatched = Sequences.from_lists([p for p, _ in cut], [c for _, c in cut], groups=groups)
        return Labeled(
            Sequences.from_lists(
                [self.prompts[row] for row in picked],
                [self.completions[row] for row in picked],
                groups=groups,
            ),
            desirable=torch.tensor([self.desirable[row] for row in picked], dtype=torch.bool),
            mismatched=mismatched,
        )

    def _mismatched(self, row: int, other: int) -> tuple[list[int], list[int]]:
        """A prompt and another row's completion, cut where together they are too long."""
        prompt, completion = self.prompts[row], self.completions[other]
        cut = fitted(prompt, [completion], self.max_length, self.truncation_mode)
        if cut is not None:
            return cut[0], cut[1][0]
        # Either of them fits by itself; the prompt leaves the completion what room there is.
        return prompt, completion[: max(0, self.max_length - len(prompt))]


def load_pairs(settings: Settings, tokenizer: Any, transforms: Sequence[Any] = (), **more: Any) -> PairData:
    """The preference pairs of a run; arguments and errors are those of ``load_answered``."""
    found = load_answered(settings, tokenizer, transforms, eats="pairs", **more)
    chosen, rejected = ([answers[side] for answers in found.answers] for side in (0, 1))
    _check_differ(found, chosen, rejected)
    margins = None
    if any(row.get("margin") is not None for row in found.rows):
        margins = [_margin(row, found.ledger) for row in found.rows]
        found.ledger.note(f"margins from {min(margins):g} to {max(margins):g}")
    return PairData(
        found.texts,
        found.prompts,
        chosen,
        rejected,
        margins,
        [row[ROW] for row in found.rows],
        found.fingerprint([found.prompts, chosen, rejected, margins]),
        found.ledger.report,
    )


def load_labeled(
    settings: Settings, tokenizer: Any, transforms: Sequence[Any] = (), **more: Any
) -> LabeledData:
    """The labelled completions of a run; arguments and errors are those of ``load_answered``."""
    found = load_answered(settings, tokenizer, transforms, eats="labeled", check=check_label, **more)
    labels = [bool(label_of(row.get("label"))) for row in found.rows]
    good = sum(labels)
    found.ledger.note(f"{good} desirable and {len(labels) - good} undesirable completions")
    if good in (0, len(labels)):
        found.ledger.note(
            f"warning: every label is {bool(good)}: there is nothing to tell apart, and no weight of the two "
            "sides can mend it; rows of the other label are needed"
        )
    completions = [answers[0] for answers in found.answers]
    return LabeledData(
        found.texts,
        found.prompts,
        completions,
        labels,
        found.limit,
        settings.truncation_mode,
        [row[ROW] for row in found.rows],
        found.fingerprint([found.prompts, completions, labels]),
        found.ledger.report,
    )


def label_of(value: Any) -> bool | None:
    """A label as a truth value: booleans, 0 and 1, and the usual words; None for anything else."""
    word = str(value).strip().lower()
    return True if word in TRUE else False if word in FALSE else None


def check_label(row: Mapping[str, Any]) -> str:
    """What is wrong with a row's label, in a few words; nothing for a good one."""
    if label_of(row.get("label")) is None:
        return f"label is {type(row.get('label')).__name__}, not true or false"
    return ""


def _check_differ(found: Answered, chosen: list[list[int]], rejected: list[list[int]]) -> None:
    """Pairs without a difference have no gradient: a few are told, many are an error."""
    same = [row for row, one, other in zip(found.rows, chosen, rejected, strict=True) if one == other]
    if not same:
        return
    what = f"{len(same)} of {len(chosen)} pairs have the same chosen and rejected tokens"
    if len(same) > EQUAL_PAIRS * len(chosen):
        raise DataError(
            f"{what}: there is nothing to learn from them",
            code="E-DATA-SAME",
            where=found.ledger.places(same),
            expected=f"at most {EQUAL_PAIRS:.0%} of such pairs",
            hint="check the columns chosen and rejected, and whether max_length cuts the difference off",
        )
    found.ledger.note(f"warning: {what}: {found.ledger.places(same)}")


def _margin(row: Row, ledger: Ledger) -> float:
    """The margin of a pair; where one has a margin, all need one."""
    value = row.get("margin")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise DataError(
        "margin is not a finite number",
        code="E-DATA-ROW",
        where=ledger.places([row]),
        got=type(value).__name__ if not isinstance(value, float) else str(value),
        hint="give every pair a margin, or leave the column out",
    )
