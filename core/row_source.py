"""Rows opened: read, mapped, through the transforms, the columns checked before a row passes.

The chain of transforms is: the user's column mapping, the user's transforms, the ones that the rows' format
asks for (``rlx.plugins.transforms.formats``). It is checked as a chain, columns taken against columns given,
before a row passes through it. Nothing is left out or mapped without a line in the report.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rlx.core.errors import ConfigError, DataError, ErrorGroup, RlxError
from rlx.core.row_chain import Ledger, apply, name_of
from rlx.core.rows import Table, is_registered, read_rows
from rlx.core.settings import Settings
from rlx.core.text import safe_text
from rlx.plugins.transforms import ROW
from rlx.plugins.transforms.chat import ChatTemplate
from rlx.plugins.transforms.columns import ColumnMap
from rlx.plugins.transforms.formats import REQUIRED, find_way
from rlx.plugins.transforms.packing import Packing

Row = dict[str, Any]

# What a needed column is often called; only ever suggested, never taken.
SYNONYMS = {
    "answer": ("solution", "target", "label", "ground_truth", "gold", "final_answer", "output", "response"),
    "chosen": ("preferred", "winner", "better", "accepted", "response_chosen", "answer_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "response_rejected", "answer_rejected"),
    "completion": ("answer", "solution", "target", "answers"),
    "label": ("desirable", "is_good", "thumbs_up", "score"),
}


@dataclass(frozen=True)
class Opened:
    """Rows in the columns that an algorithm reads.

    Attributes:
        table: the data set as it was read.
        ledger: the account of its rows.
        rows: what came out of the transforms.
        answers: the columns that hold what is learned from; empty for prompts, dialogues and texts.
        template: renders the rows.
        packing: puts demonstrations together, or None.
    """

    table: Table
    ledger: Ledger
    rows: list[Row]
    answers: tuple[str, ...]
    template: ChatTemplate
    packing: Packing | None

    def fingerprint(self, ids: object) -> str:
        """SHA-256 of the rows as they were read and of the token ids made of them."""
        return hashlib.sha256(f"{self.table.fingerprint}{json.dumps(ids)}".encode()).hexdigest()


def open_rows(
    settings: Settings,
    tokenizer: Any,
    transforms: Sequence[Any],
    *,
    eats: str,
    needed: Mapping[str, Iterable[str]],
    evaluation: bool,
) -> Opened:
    """The rows of a run, ready to be rendered.

    Args:
        settings: the data options.
        tokenizer: handed to transforms.
        transforms: built transforms, in order.
        eats: what the algorithm eats.
        needed: reward name → data-set columns that it needs.
        evaluation: the evaluation data instead of the training data.

    Raises:
        DataError: missing or unfit data, as far as possible all problems of one kind together.
        ConfigError: a stage that is given twice, or has nothing to do.
        PluginError: a transform that fails or breaks its contract.
    """
    template, packing = _staged(settings, transforms, eats)
    transforms = [transform for transform in transforms if stage_of(transform) == "rows"]
    source, split = source_of(settings, evaluation)
    if source is None:
        raise DataError("there is no evaluation data", code="E-DATA-MISSING", hint="--eval-dataset PATH")
    table = read_rows(
        source,
        split=split,
        config=settings.dataset_config,
        limit=settings.max_eval_rows if evaluation else settings.max_rows,
        eats=eats,
    )
    ledger = Ledger(table, settings.on_bad_row, settings.max_bad_rows)
    ledger.note(f"{table.name}: {len(table)} rows")
    mapping = _mapping(settings, table, evaluation)
    _check_chain(settings, table, mapping, transforms, needed, eats)
    rows = [{**row, ROW: number} for number, row in enumerate(table.rows)]
    if mapping:
        ledger.note("columns: " + ", ".join(f"{wanted} ← {found}" for wanted, found in mapping.items()))
        rows = apply(ColumnMap(ColumnMap.Config(columns=mapping)), rows, tokenizer, ledger)
    for transform in transforms:
        rows = apply(transform, rows, tokenizer, ledger)
    raise_all(_lacking(settings, columns_of(rows), rows, needed, table, eats))
    way = find_way(columns_of(rows), rows, eats)
    assert way is not None  # or something would have been lacking
    for line in way.notes:
        ledger.note(line)
    for transform in way.transforms:
        rows = apply(transform, rows, tokenizer, ledger)
    return Opened(table, ledger, rows, way.answers, template, packing)


def stage_of(transform: Any) -> str:
    """When a transform acts: ``rows``, ``template`` or ``packing``; one that does not say acts on rows."""
    return str(getattr(transform, "stage", "rows"))


def _staged(settings: Settings, transforms: Sequence[Any], eats: str) -> tuple[ChatTemplate, Packing | None]:
    """What renders rows and what packs them: of the transforms, or else by the options."""
    options = {
        "template": ("chat_template or system_prompt", (settings.chat_template, settings.system_prompt)),
        "packing": ("packing", (settings.packing,)),
    }
    unset = {"template": ("auto", None), "packing": (False,)}
    found: dict[str, Any] = {}
    for transform in transforms:
        stage, name = stage_of(transform), name_of(transform)
        if stage == "rows":
            continue
        if stage == "packing" and eats != "demonstrations":
            raise ConfigError(
                f"transform {name} packs demonstrations, and there are none",
                code="E-CONFIG-CONFLICT",
                got=f"an algorithm that eats {eats}",
                hint="leave it out",
            )
        rival = found[stage] if stage in found else None
        if rival is not None or options[stage][1] != unset[stage]:
            other = f"the option {options[stage][0]}" if rival is None else f"transform {name_of(rival)}"
            raise ConfigError(
                f"transform {name} and {other} are both there for the same stage",
                code="E-CONFIG-CONFLICT",
                got=stage,
                hint="keep one of the two",
            )
        found[stage] = transform
    if "template" not in found:
        how = ChatTemplate.Config(template=settings.chat_template, system_prompt=settings.system_prompt)
        found["template"] = ChatTemplate(how)
    if settings.packing:
        found["packing"] = Packing(Packing.Config(strategy=settings.packing_strategy))
    return found["template"], found.get("packing")


def source_of(settings: Settings, evaluation: bool) -> tuple[Any, str]:
    """The data set and the split to read; a registered data set brings its own held-out split."""
    if not evaluation:
        return settings.dataset, settings.dataset_split
    if settings.eval_dataset is None and is_registered(settings.dataset):
        return settings.dataset, "test"
    return settings.eval_dataset, "test"


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Every column, in the order in which they first occur."""
    return list(dict.fromkeys(column for row in rows for column in row if column != ROW))


def _mapping(settings: Settings, table: Table, evaluation: bool) -> dict[str, str]:
    """The user's wanted=found; evaluation data may already have the names that are wanted."""
    if not evaluation:
        return settings.columns
    present = set(columns_of(table.rows))
    return {w: f for w, f in settings.columns.items() if f in present or w not in present}


def _check_chain(
    settings: Settings,
    table: Table,
    mapping: Mapping[str, str],
    transforms: Sequence[Any],
    needed: Mapping[str, Iterable[str]],
    eats: str,
) -> None:
    """Columns taken against columns given, all along the chain, before a row passes through it."""
    present = columns_of(table.rows)
    problems = [
        _missing("columns", found, present, table) for found in mapping.values() if found not in present
    ]
    available = [*present, *mapping]
    for transform in transforms:
        absent = sorted(set(transform.takes) - set(available))
        problems += [
            _missing(f"transform {name_of(transform)}", column, available, table) for column in absent
        ]
        available += sorted(transform.gives)
    raise_all(problems + _lacking(settings, available, table.rows, needed, table, eats))


def _lacking(
    settings: Settings,
    columns: list[str],
    rows: Sequence[Row],
    needed: Mapping[str, Iterable[str]],
    table: Table,
    eats: str,
) -> list[DataError]:
    """A problem for each column that the run needs and the rows do not have."""
    problems: list[DataError] = []
    if find_way(columns, rows, eats) is None:
        absent = [column for column in REQUIRED[eats] if column not in columns] or ["prompt"]
        problems += [_missing(settings.algo, column, columns, table) for column in absent]
    for reward, wanted in needed.items():
        absent = sorted(set(wanted) - set(columns) - {"prompt"})
        problems += [_missing(f"reward {reward}", column, columns, table) for column in absent]
    return problems


def _missing(owner: str, column: str, columns: list[str], table: Table) -> DataError:
    """The D1 error, with the column that was most likely meant."""
    synonyms = [name for name in SYNONYMS.get(column, ()) if name in columns]
    texts = [c for c in columns if isinstance(table.rows[0].get(c), str | list)] if column == "prompt" else []
    likely = next(iter([*get_close_matches(column, columns, n=1), *synonyms, *texts]), None)
    if owner == "columns":
        what = f"columns maps from {safe_text(column, 80)!r}, which {table.name} does not have"
        hint = f"did you mean {likely!r}?" if likely else ""
    else:
        what = f"{owner} needs the column {column!r}, which {table.name} does not have"
        hint = f"--columns {column}={safe_text(likely, 80) if likely else 'NAME'}"
    return DataError(
        what,
        code="E-DATA-COLUMN",
        got=safe_text(", ".join(columns)),
        expected=safe_text(column, 80),
        hint=hint,
    )


def raise_all(problems: Sequence[RlxError]) -> None:
    """Raise the problems together; nothing where there are none."""
    if problems:
        raise problems[0] if len(problems) == 1 else ErrorGroup(list(problems))


def note_gaps(rows: list[Row], needed: Mapping[str, Iterable[str]], ledger: Ledger) -> None:
    """Rewards get None for a value that is not there; not every reward can do with that."""
    for column in sorted({column for columns in needed.values() for column in columns}):
        empty = [row for row in rows if row.get(column) is None]
        if empty:
            ledger.note(
                f"warning: {column} is missing in {len(empty)} of {len(rows)} rows: {ledger.places(empty)}"
            )


def note_repeats(texts: Sequence[str], what: str, ledger: Ledger) -> None:
    """A warning with a count and an example where texts occur more than once."""
    counts = Counter(texts)
    if len(counts) < len(texts):
        text, most = counts.most_common(1)[0]
        ledger.note(
            f"warning: {len(texts) - len(counts)} of {len(texts)} {what} are copies of another; "
            f"{most} times {safe_text(text, 80)!r}"
        )
