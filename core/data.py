"""The way of the data: rows → transforms → prompts as token ids, every fault found before a weight is loaded.

The chain of transforms is: the user's column mapping, the user's transforms, the ones that the rows' format
asks for (``rlx.plugins.transforms.columns.detect``), the chat template. It is checked as a chain, columns
taken against columns given, before a row passes through it. Nothing is left out, cut or mapped without a line
in the report.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, DataError, ErrorGroup, RlxError
from rlx.core.row_chain import Ledger, apply, name_of
from rlx.core.rows import Table, is_registered, read_rows
from rlx.core.settings import Settings
from rlx.core.text import safe_text
from rlx.plugins.transforms import ROW
from rlx.plugins.transforms.chat import ChatTemplate, ConversationPrompt
from rlx.plugins.transforms.columns import ColumnMap, InstructionPrompt, detect

Row = dict[str, Any]

# What a needed column is often called; only ever suggested, never taken.
SYNONYMS = {
    "answer": ("solution", "target", "label", "ground_truth", "gold", "final_answer", "output", "response")
}


@dataclass(frozen=True)
class PromptData:
    """Prompts ready for sampling.

    Attributes:
        prompts: all of them, in the order of the data.
        fingerprint: SHA-256 of rows and token ids; a resumed run compares it.
        report: what was read, mapped, left out and cut, and warnings; one line each.
    """

    prompts: Prompts
    fingerprint: str
    report: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, index: Sequence[int]) -> Prompts:
        """The prompts numbered by index, in that order; numbers may repeat."""
        return self.prompts.take(index)

    def batch(self, rows: Sequence[int], mine: Sequence[int] | None = None) -> Prompts:
        """The prompts of one batch that belong to this process.

        Args:
            rows: row numbers of the whole batch, over all processes.
            mine: places in ``rows`` that are this process's; None for all.
        """
        return self.take([rows[place] for place in (range(len(rows)) if mine is None else mine)])


def load_prompts(
    settings: Settings,
    tokenizer: Any,
    transforms: Sequence[Any] = (),
    *,
    columns_needed: Mapping[str, Iterable[str]] | None = None,
    evaluation: bool = False,
    max_positions: int | None = None,
) -> PromptData:
    """The prompts of a run.

    Args:
        settings: the data options, and max_completion_length.
        tokenizer: of the policy.
        transforms: built transforms, in order.
        columns_needed: reward name → data-set columns that it needs.
        evaluation: the evaluation data instead of the training data.
        max_positions: the longest sequence the model can take, in tokens; by default the tokenizer's own
            limit.

    Raises:
        DataError: missing or unfit data, as far as possible all problems of one kind together.
        ConfigError: options that cannot be kept, such as completions longer than the model.
        PluginError: a transform that fails or breaks its contract.
    """
    source, split = _source(settings, evaluation)
    if source is None:
        raise DataError("there is no evaluation data", code="E-DATA-MISSING", hint="--eval-dataset PATH")
    limit = _length_limit(settings, tokenizer, max_positions)
    table = read_rows(
        source,
        split=split,
        config=settings.dataset_config,
        limit=settings.max_eval_rows if evaluation else settings.max_rows,
    )
    ledger = Ledger(table, settings.on_bad_row, settings.max_bad_rows)
    ledger.note(f"{table.name}: {len(table)} rows")
    mapping = _mapping(settings, table, evaluation)
    needed = columns_needed or {}
    _check_chain(settings, table, mapping, transforms, needed)
    rows = [{**row, ROW: number} for number, row in enumerate(table.rows)]
    if mapping:
        ledger.note("columns: " + ", ".join(f"{wanted} ← {found}" for wanted, found in mapping.items()))
        rows = apply(ColumnMap(ColumnMap.Config(columns=mapping)), rows, tokenizer, ledger)
    for transform in transforms:
        rows = apply(transform, rows, tokenizer, ledger)
    _raise(_lacking(settings, _columns(rows), rows, needed, table))
    for transform in _for_format(rows, ledger):
        rows = apply(transform, rows, tokenizer, ledger)
    template = ChatTemplate(
        ChatTemplate.Config(template=settings.chat_template, system_prompt=settings.system_prompt)
    )
    rows = apply(template, rows, tokenizer, ledger)
    ids = _tokenised(rows, tokenizer, special=not template.templated(tokenizer))
    rows, ids = _fitted(rows, ids, tokenizer, limit, settings, ledger)
    lengths = [len(i) for i in ids]
    how = "through the chat template" if template.templated(tokenizer) else "as plain text"
    override = " of --chat-template" if template.override else ""
    ledger.note(
        f"{len(ids)} prompts {how}{override}: {min(lengths)} to {max(lengths)} tokens, "
        f"mean {sum(lengths) / len(ids):.1f}"
    )
    _note_gaps(rows, needed, ledger)
    _note_repeats(rows, ledger)
    if not evaluation and len(rows) < settings.batch_size:
        ledger.note(
            f"{len(rows)} rows are fewer than one batch of {settings.batch_size}: rows repeat within a batch"
        )
    return PromptData(_prompts(rows, ids), _fingerprint(table, ids), ledger.report)


def check_data(
    settings: Settings,
    tokenizer: Any,
    transforms: Sequence[Any] = (),
    *,
    columns_needed: Mapping[str, Iterable[str]] | None = None,
    max_positions: int | None = None,
) -> tuple[PromptData, PromptData | None]:
    """Training data and, where there is any, evaluation data; the problems of both are told at once.

    Args and errors are those of ``load_prompts``. Rows that are in both are counted in the evaluation's
    report.
    """
    loaded: list[PromptData] = []
    problems: list[RlxError] = []
    for evaluation in (False, True):
        if _source(settings, evaluation)[0] is None:
            continue
        try:
            loaded.append(
                load_prompts(
                    settings,
                    tokenizer,
                    transforms,
                    columns_needed=columns_needed,
                    evaluation=evaluation,
                    max_positions=max_positions,
                )
            )
        except RlxError as error:
            for problem in error.problems if isinstance(error, ErrorGroup) else [error]:
                if str(problem) not in map(str, problems):
                    problems.append(problem)
    if problems:
        raise problems[0] if len(problems) == 1 else ErrorGroup(problems)
    train, test = loaded[0], loaded[1] if len(loaded) > 1 else None
    if test is not None:
        test.report.extend(overlap(train, test))
    return train, test


def overlap(train: PromptData, evaluation: PromptData) -> list[str]:
    """A warning with a count and an example if evaluation prompts are also training prompts, else no line."""
    seen = set(train.prompts.texts)
    both = [text for text in evaluation.prompts.texts if text in seen]
    if not both:
        return []
    return [
        f"warning: {len(both)} of {len(evaluation)} evaluation prompts are training prompts too, for example "
        f"{safe_text(both[0], 80)!r}"
    ]


def _source(settings: Settings, evaluation: bool) -> tuple[Any, str]:
    """The data set and the split to read; a registered data set brings its own held-out split."""
    if not evaluation:
        return settings.dataset, settings.dataset_split
    if settings.eval_dataset is None and is_registered(settings.dataset):
        return settings.dataset, "test"
    return settings.eval_dataset, "test"


def _length_limit(settings: Settings, tokenizer: Any, max_positions: int | None) -> tuple[int, str]:
    """The longest prompt allowed, and the rule that says so."""
    # Tokenizers without a limit say 10**30.
    positions = max_positions or (tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None)
    if positions is None or settings.max_prompt_length + settings.max_completion_length <= positions:
        return settings.max_prompt_length, f"max_prompt_length {settings.max_prompt_length}"
    room = positions - settings.max_completion_length
    if room < 1:
        raise ConfigError(
            "completions fill the model's whole context",
            code="E-CONFIG-LENGTH",
            got=f"max_completion_length {settings.max_completion_length}",
            expected=f"less than the model's {positions} positions",
            hint=f"--max-completion-length {max(1, positions // 2)}",
        )
    return (
        room,
        f"{positions} positions of the model less max_completion_length {settings.max_completion_length}",
    )


def _columns(rows: Iterable[Row]) -> list[str]:
    """Every column, in the order in which they first occur."""
    return list(dict.fromkeys(column for row in rows for column in row if column != ROW))


def _mapping(settings: Settings, table: Table, evaluation: bool) -> dict[str, str]:
    """The user's wanted=found; evaluation data may already have the names that are wanted."""
    if not evaluation:
        return settings.columns
    present = set(_columns(table.rows))
    return {w: f for w, f in settings.columns.items() if f in present or w not in present}


def _check_chain(
    settings: Settings,
    table: Table,
    mapping: Mapping[str, str],
    transforms: Sequence[Any],
    needed: Mapping[str, Iterable[str]],
) -> None:
    """Columns taken against columns given, all along the chain, before a row passes through it."""
    present = _columns(table.rows)
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
    _raise(problems + _lacking(settings, available, table.rows, needed, table))


def _lacking(
    settings: Settings,
    columns: list[str],
    rows: Sequence[Row],
    needed: Mapping[str, Iterable[str]],
    table: Table,
) -> list[DataError]:
    """A problem for each column that the run needs and the rows do not have."""
    problems = []
    if "prompt" not in columns and detect(columns, rows) is None:
        problems.append(_missing(settings.algo, "prompt", columns, table))
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


def _raise(problems: Sequence[RlxError]) -> None:
    if problems:
        raise problems[0] if len(problems) == 1 else ErrorGroup(list(problems))


def _for_format(rows: list[Row], ledger: Ledger) -> list[Any]:
    """The transforms that bring the rows' format into the column ``prompt``."""
    columns = _columns(rows)
    found = None if "prompt" in columns else detect(columns, rows)
    if found is None:
        return []
    if found.name == "instruction":
        ledger.note("prompt ← instruction, a blank line, input")
        return [InstructionPrompt(InstructionPrompt.Config())]
    ((wanted, column),) = found.columns.items()
    rename = [ColumnMap(ColumnMap.Config(columns=found.columns))] if wanted != column else []
    if found.name == "conversation":
        ledger.note(f"prompt ← {column}, up to the last user turn")
        return [*rename, ConversationPrompt(ConversationPrompt.Config())]
    ledger.note(f"prompt ← {column}")
    return rename


def _tokenised(rows: list[Row], tokenizer: Any, *, special: bool) -> list[list[int]]:
    """Token ids of each rendered prompt; special: plain text, which begins with what begins a text."""
    texts = [row["_text"] for row in rows]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    eos = tokenizer.eos_token
    if not special or eos is None:
        return ids
    # Some tokenizers end every text with end-of-sequence, after which there is nothing to say.
    return [
        one[:-1] if one and one[-1] == tokenizer.eos_token_id and not text.endswith(eos) else one
        for one, text in zip(ids, texts, strict=True)
    ]


def _fitted(
    rows: list[Row],
    ids: list[list[int]],
    tokenizer: Any,
    limit: tuple[int, str],
    settings: Settings,
    ledger: Ledger,
) -> tuple[list[Row], list[list[int]]]:
    """Rows and token ids without empty prompts, and none over the limit, by the rule of prompt_overflow."""
    longest, rule = limit
    ledger.unusable([(row, "prompt has no tokens") for row, one in zip(rows, ids, strict=True) if not one])
    kept = [(row, one) for row, one in zip(rows, ids, strict=True) if one]
    over = [(row, one) for row, one in kept if len(one) > longest]
    if over and settings.prompt_overflow == "error":
        most = max(len(one) for _, one in over)
        raise DataError(
            f"{len(over)} of {len(ids)} prompts of {ledger.table.name} are longer than {longest} tokens",
            code="E-DATA-LONG",
            where=ledger.places([row for row, _ in over]),
            got=f"up to {most} tokens",
            expected=f"at most {longest}: {rule}",
            hint="--prompt-overflow drop, or truncate_left"
            + (f", or --max-prompt-length {most}" if longest == settings.max_prompt_length else ""),
        )
    if over and settings.prompt_overflow == "drop":
        ledger.drop(len(over), f"over {rule}")
        kept = [(row, one) for row, one in kept if len(one) <= longest]
    elif over:
        ledger.note(f"cut {len(over)} prompts on the left to {longest} tokens: {rule}")
        kept = [(_cut(row, one, longest, tokenizer), one[-longest:]) for row, one in kept]
    ledger.check_left(kept)
    return [row for row, _ in kept], [one for _, one in kept]


def _cut(row: Row, ids: list[int], longest: int, tokenizer: Any) -> Row:
    return {**row, "_text": tokenizer.decode(ids[-longest:])} if len(ids) > longest else row


def _note_gaps(rows: list[Row], needed: Mapping[str, Iterable[str]], ledger: Ledger) -> None:
    """Rewards get None for a value that is not there; not every reward can do with that."""
    for column in sorted({column for columns in needed.values() for column in columns}):
        empty = [row for row in rows if row.get(column) is None]
        if empty:
            ledger.note(
                f"warning: {column} is missing in {len(empty)} of {len(rows)} rows: {ledger.places(empty)}"
            )


def _note_repeats(rows: list[Row], ledger: Ledger) -> None:
    counts = Counter(row["_text"] for row in rows)
    if len(counts) < len(rows):
        text, most = counts.most_common(1)[0]
        ledger.note(
            f"warning: {len(rows) - len(counts)} of {len(rows)} prompts are copies of another; "
            f"{most} times {safe_text(text, 80)!r}"
        )


def _prompts(rows: list[Row], ids: list[list[int]]) -> Prompts:
    columns = [column for column in _columns(rows) if column not in ChatTemplate.gives]
    return Prompts(
        ids=ids,
        texts=[row["_text"] for row in rows],
        messages=[row["_messages"] for row in rows],
        columns={column: [row.get(column) for row in rows] for column in columns},
        rows=[row[ROW] for row in rows],
    )


def _fingerprint(table: Table, ids: list[list[int]]) -> str:
    return hashlib.sha256(f"{table.fingerprint}{json.dumps(ids)}".encode()).hexdigest()
