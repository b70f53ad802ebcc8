"""Prompts for sampling: rows rendered through the chat template, as token ids, none over the limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, DataError
from rlx.core.row_chain import Ledger, apply
from rlx.core.row_source import Row, columns_of, note_gaps, note_repeats, open_rows
from rlx.core.settings import Settings
from rlx.core.tokens import tokenised
from rlx.plugins.transforms import ROW
from rlx.plugins.transforms.chat import ChatTemplate


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

    @property
    def texts(self) -> list[str]:
        """The rendered prompts."""
        return self.prompts.texts

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
    limit = _length_limit(settings, tokenizer, max_positions)
    needed = columns_needed or {}
    opened = open_rows(settings, tokenizer, transforms, eats="prompts", needed=needed, evaluation=evaluation)
    ledger, template = opened.ledger, opened.template
    rows = apply(template, opened.rows, tokenizer, ledger)
    texts = [row["_text"] for row in rows]
    ids = tokenised(tokenizer, texts, special=not template.templated(tokenizer))
    rows, ids = _fitted(rows, ids, tokenizer, limit, settings, ledger)
    lengths = [len(i) for i in ids]
    how = "through the chat template" if template.templated(tokenizer) else "as plain text"
    override = " of --chat-template" if template.override else ""
    ledger.note(
        f"{len(ids)} prompts {how}{override}: {min(lengths)} to {max(lengths)} tokens, "
        f"mean {sum(lengths) / len(ids):.1f}"
    )
    note_gaps(rows, needed, ledger)
    note_repeats([row["_text"] for row in rows], "prompts", ledger)
    if not evaluation and len(rows) < settings.batch_size:
        ledger.note(
            f"{len(rows)} rows are fewer than one batch of {settings.batch_size}: rows repeat within a batch"
        )
    return PromptData(_prompts(rows, ids), opened.fingerprint(ids), ledger.report)


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


def _prompts(rows: list[Row], ids: list[list[int]]) -> Prompts:
    columns = [column for column in columns_of(rows) if column not in ChatTemplate.gives]
    return Prompts(
        ids=ids,
        texts=[row["_text"] for row in rows],
        messages=[row["_messages"] for row in rows],
        columns={column: [row.get(column) for row in rows] for column in columns},
        rows=[row[ROW] for row in rows],
    )
