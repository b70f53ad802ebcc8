"""Prompts with answers to them as token ids: what preference data and demonstrations have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlx.core.row_chain import Ledger, apply
from rlx.core.row_source import Opened, Row, note_gaps, note_repeats, open_rows
from rlx.core.settings import Settings
from rlx.core.tokens import fitted, split_tokenised
from rlx.plugins.transforms.answers import RenderAnswers, special_texts
from rlx.plugins.transforms.chat import ChatTemplate


@dataclass(frozen=True)
class Answered:
    """Rows as token ids, all within the limit.

    Attributes:
        opened: the rows' origin.
        rows: those that are left.
        texts: the rendered prompt of each.
        prompts: token ids of each prompt.
        answers: token ids of each answer to it, in the order of the columns.
        limit: most tokens of prompt and answer.
    """

    opened: Opened
    rows: list[Row]
    texts: list[str]
    prompts: list[list[int]]
    answers: list[list[list[int]]]
    limit: int

    @property
    def ledger(self) -> Ledger:
        """The account of the rows."""
        return self.opened.ledger

    def fingerprint(self, ids: object) -> str:
        """SHA-256 of the rows as they were read and of what was made of them."""
        return self.opened.fingerprint(ids)


def places_of(rows: Sequence[int], mine: Sequence[int] | None) -> list[int]:
    """The places in a batch that are this process's."""
    return list(range(len(rows)) if mine is None else mine)


def length_limit(settings: Settings, tokenizer: Any, max_positions: int | None) -> tuple[int, str]:
    """The most tokens of a sequence to learn from, and the rule that says so."""
    # Tokenizers without a limit say 10**30.
    positions = max_positions or (tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None)
    if positions is None or settings.max_length <= positions:
        return settings.max_length, f"max_length {settings.max_length}"
    return positions, f"the {positions} positions of the model, less than max_length {settings.max_length}"


def load_answered(
    settings: Settings,
    tokenizer: Any,
    transforms: Sequence[Any] = (),
    *,
    eats: str,
    columns_needed: Mapping[str, Iterable[str]] | None = None,
    evaluation: bool = False,
    max_positions: int | None = None,
    check: Callable[[Row], str] = lambda row: "",
) -> Answered:
    """Prompts and answers of a run.

    Args:
        settings: the data options.
        tokenizer: of the policy.
        transforms: built transforms, in order.
        eats: ``pairs``, ``labeled``, or ``demonstrations`` that have a prompt.
        columns_needed: name of what needs columns → data-set columns.
        evaluation: the evaluation data instead of the training data.
        max_positions: the longest sequence the model can take, in tokens; by default the tokenizer's own
            limit.
        check: what else is wrong with a row, in a few words.

    Raises:
        DataError: missing or unfit data, as far as possible all problems of one kind together.
        ConfigError: options that cannot be kept.
        PluginError: a transform that fails or breaks its contract.
    """
    needed = columns_needed or {}
    opened = open_rows(settings, tokenizer, transforms, eats=eats, needed=needed, evaluation=evaluation)
    found = answered(opened, settings, tokenizer, max_positions, check)
    note_gaps(found.rows, needed, opened.ledger)
    repeats = [repr((row["_prompt"], row["_answers"])) for row in found.rows]
    note_repeats(repeats, "rows", opened.ledger)
    if not evaluation and len(found.rows) < settings.batch_size:
        opened.ledger.note(
            f"{len(found.rows)} rows are fewer than one batch of {settings.batch_size}: rows repeat within a "
            "batch"
        )
    return found


def answered(
    opened: Opened,
    settings: Settings,
    tokenizer: Any,
    max_positions: int | None,
    check: Callable[[Row], str] = lambda row: "",
) -> Answered:
    """Opened rows rendered, tokenised, and cut to the limit; arguments and errors as in ``load_answered``."""
    ledger, template = opened.ledger, opened.template
    rows = rendered(opened, tokenizer, check)
    ids = tokenised_answers(rows, len(opened.answers), tokenizer)
    limit = length_limit(settings, tokenizer, max_positions)
    kept = _fitted(rows, ids, limit, settings.truncation_mode, ledger)
    rows = [row for row, _, _ in kept]
    lengths = [len(prompt) + len(answer) for _, prompt, answers in kept for answer in answers]
    note_size(lengths, rows, template, " and ".join(opened.answers), ledger)
    return Answered(
        opened,
        rows,
        [row["_prompt"] for row in rows],
        [prompt for _, prompt, _ in kept],
        [answers for _, _, answers in kept],
        limit[0],
    )


def rendered(opened: Opened, tokenizer: Any, check: Callable[[Row], str] = lambda row: "") -> list[Row]:
    """Opened rows with what ``RenderAnswers`` gives; arguments and errors as in ``load_answered``."""
    ledger = opened.ledger
    rows = apply(RenderAnswers(opened.template, opened.answers), opened.rows, tokenizer, ledger)
    ledger.unusable([(row, reason) for row in rows if (reason := check(row))])
    rows = [row for row in rows if not check(row)]
    ledger.check_left(rows)
    _note_empty(rows, opened.answers, ledger)
    _note_open_turns(rows, tokenizer, ledger)
    return rows


def note_size(
    lengths: Sequence[int], rows: Sequence[Row], template: ChatTemplate, what: str, ledger: Ledger
) -> None:
    """How many rows there are, how they were rendered, and how long the sequences are."""
    through = sum(not row["_text"] for row in rows)
    how = {0: "as plain text", len(rows): "through the chat template"}.get(
        through, f"({through} of them through the chat template, the others as plain text)"
    )
    override = " of --chat-template" if template.override and through else ""
    ledger.note(
        f"{len(rows)} rows {how}{override}, {what}: {min(lengths)} to {max(lengths)} tokens, "
        f"mean {sum(lengths) / len(lengths):.1f}"
    )


def tokenised_answers(rows: list[Row], sides: int, tokenizer: Any) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of the prompt and of each answer; text ends with end-of-sequence."""
    out: list[Any] = [None] * len(rows)
    for text in (False, True):
        numbers = [number for number, row in enumerate(rows) if row["_text"] == text]
        found = [
            split_tokenised(
                tokenizer,
                [rows[number]["_prompt"] for number in numbers],
                [rows[number]["_answers"][side] for number in numbers],
                special=text,
            )
            for side in range(sides)
        ]
        for place, number in enumerate(numbers):
            # One prompt for all answers: where a token reaches into one of them, all begin before that token.
            start = min(len(side[place][0]) for side in found)
            prompt = found[0][place][0][:start]
            answers = [side[place][0][start:] + side[place][1] for side in found]
            if text and tokenizer.eos_token_id is not None:
                end = tokenizer.eos_token_id
                answers = [ids if ids and ids[-1] == end else [*ids, end] for ids in answers]
            out[number] = (prompt, answers)
    return out


def _fitted(
    rows: list[Row],
    ids: list[tuple[list[int], list[list[int]]]],
    limit: tuple[int, str],
    mode: str,
    ledger: Ledger,
) -> list[tuple[Row, list[int], list[list[int]]]]:
    """Rows with a prompt, cut to the limit; what the rule cuts and leaves out is told."""
    longest, rule = limit
    ledger.unusable([(row, "prompt has no tokens") for row, (p, _) in zip(rows, ids, strict=True) if not p])
    kept, cut, dropped = [], 0, 0
    for row, (prompt, answers) in zip(rows, ids, strict=True):
        if not prompt:
            continue
        fit = fitted(prompt, answers, longest, mode)
        if fit is None:
            dropped += 1
            continue
        cut += fit != (prompt, answers)
        kept.append((row, *fit))
    if cut:
        what = "completions at the end" if mode == "keep_start" else "prompts at the start"
        ledger.note(f"cut {what} in {cut} rows: {rule}")
    if dropped:
        why = {"keep_start": "prompt alone over", "keep_end": "completion alone over", "drop": "over"}[mode]
        ledger.drop(dropped, f"{why} {rule}", len(rows))
    ledger.check_left(kept)
    return kept


def _note_empty(rows: list[Row], columns: Sequence[str], ledger: Ledger) -> None:
    for column in columns:
        empty = [row for row in rows if row.get(column) == ""]
        if empty:
            ledger.note(
                f"warning: {column} is empty in {len(empty)} of {len(rows)} rows, where only the end is "
                f"learned: {ledger.places(empty)}"
            )


def _note_open_turns(rows: list[Row], tokenizer: Any, ledger: Ledger) -> None:
    ends = tuple(special_texts(tokenizer))
    never = [row for row in rows if not row["_text"] and not any(a.endswith(ends) for a in row["_answers"])]
    if never:
        ledger.note(
            f"warning: in {len(never)} of {len(rows)} rows the chat template ends the answer with no special "
            "token: the model does not learn to stop"
        )
