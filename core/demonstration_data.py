"""Demonstrations as token ids: prompts with completions, conversations or texts; what of them is learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlx.core.answered import length_limit, note_size, places_of, rendered, tokenised_answers
from rlx.core.batch import Demonstrations, Sequences
from rlx.core.errors import ConfigError
from rlx.core.row_chain import Ledger, apply, name_of
from rlx.core.row_source import Opened, Row, note_gaps, note_repeats, open_rows
from rlx.core.settings import Settings
from rlx.core.tokens import cut_places, tokenised
from rlx.plugins.transforms import ROW
from rlx.plugins.transforms.answers import RenderDialogue
from rlx.plugins.transforms.packing import Packing


@dataclass(frozen=True)
class Document:
    """One sequence to imitate.

    Attributes:
        ids: token ids.
        prompt_length: leading tokens that are prompt.
        learned: a flag a token; the first one never is, no token precedes it.
    """

    ids: list[int]
    prompt_length: int
    learned: list[bool]

    def piece(self, start: int, end: int) -> Document:
        """Tokens ``start`` to ``end`` (not included) as a document of their own."""
        learned = [False, *self.learned[start + 1 : end]][: end - start]
        return Document(self.ids[start:end], max(0, min(self.prompt_length, end) - start), learned)


@dataclass(frozen=True)
class DemonstrationData:
    """Demonstrations, each row one document or, packed, several.

    Attributes:
        documents: the documents of each row.
        texts: the rendered text of each document before packing.
        rows: row numbers in the data set, one a document before packing.
        fingerprint: SHA-256 of rows, token ids and learned flags; a resumed run compares it.
        report: what was read, mapped, left out and cut, and warnings; one line each.
    """

    documents: list[list[Document]]
    texts: list[str]
    rows: list[int]
    fingerprint: str
    report: list[str]

    def __len__(self) -> int:
        return len(self.documents)

    def batch(self, rows: Sequence[int], mine: Sequence[int] | None = None) -> Demonstrations:
        """The rows of one batch that belong to this process; a packed row gives several sequences.

        Args:
            rows: numbers of the rows of the whole batch, over all processes.
            mine: places in ``rows`` that are this process's; None for all.
        """
        picked = [one for place in places_of(rows, mine) for one in self.documents[rows[place]]]
        return Demonstrations(
            Sequences(
                ids=torch.tensor([i for one in picked for i in one.ids], dtype=torch.long),
                lengths=torch.tensor([len(one.ids) for one in picked], dtype=torch.long),
                prompt_lengths=torch.tensor([one.prompt_length for one in picked], dtype=torch.long),
                groups=torch.arange(len(picked)),
                scored=torch.tensor([flag for one in picked for flag in one.learned], dtype=torch.bool),
            )
        )


def load_demonstrations(
    settings: Settings,
    tokenizer: Any,
    transforms: Sequence[Any] = (),
    *,
    columns_needed: Mapping[str, Iterable[str]] | None = None,
    evaluation: bool = False,
    max_positions: int | None = None,
) -> DemonstrationData:
    """The demonstrations of a run.

    What is learned: the completion where rows have a prompt and a completion, else every token after the
    first; with ``completion_only_loss: false`` every token after the first; with ``assistant_only_loss`` the
    assistant's turns of a conversation, each with the token that ends it.

    Args:
        settings: the data options.
        tokenizer: of the policy.
        transforms: built transforms, in order.
        columns_needed: name of what needs columns → data-set columns.
        evaluation: the evaluation data instead of the training data.
        max_positions: the longest sequence the model can take, in tokens; by default the tokenizer's own
            limit.

    Raises:
        DataError: missing or unfit data, as far as possible all problems of one kind together.
        ConfigError: options that cannot be kept.
        PluginError: a transform that fails or breaks its contract.
    """
    needed = columns_needed or {}
    opened = open_rows(
        settings, tokenizer, transforms, eats="demonstrations", needed=needed, evaluation=evaluation
    )
    ledger = opened.ledger
    _check_options(settings, opened)
    if opened.answers and not settings.assistant_only_loss:
        rows, documents = _with_prompt(opened, settings, tokenizer)
    else:
        rows, documents = _whole(opened, settings, tokenizer)
    limit = length_limit(settings, tokenizer, max_positions)
    splits = opened.packing is not None and opened.packing.splits
    rows, documents = _fitted(rows, documents, limit, settings, ledger, splits)
    note_size([len(one.ids) for one in documents], rows, opened.template, "demonstrations", ledger)
    learned = sum(sum(one.learned) for one in documents)
    total = sum(len(one.ids) for one in documents)
    ledger.note(f"{learned} of {total} tokens are learned")
    note_gaps(rows, needed, ledger)
    texts = [row["_whole"] for row in rows]
    note_repeats(texts, "demonstrations", ledger)
    packed = [[document] for document in documents]
    if opened.packing is not None:
        packed = _packed(documents, limit[0], opened.packing, ledger)
    if not evaluation and len(packed) < settings.batch_size:
        ledger.note(
            f"{len(packed)} rows are fewer than one batch of {settings.batch_size}: rows repeat within a "
            "batch"
        )
    fingerprint = opened.fingerprint([[(one.ids, one.learned) for one in row] for row in packed])
    return DemonstrationData(packed, texts, [row[ROW] for row in rows], fingerprint, ledger.report)


def _packed(
    documents: list[Document], longest: int, packing: Packing, ledger: Ledger
) -> list[list[Document]]:
    """Documents, or pieces of them, put together into rows of at most so many tokens."""
    groups = packing.groups([len(one.ids) for one in documents], longest)
    packed = [[documents[p.document].piece(p.start, p.end) for p in group] for group in groups]
    sizes = [sum(len(one.ids) for one in row) for row in packed]
    how = packing.config.strategy if type(packing) is Packing else name_of(packing)
    ledger.note(
        f"packed {len(documents)} demonstrations into {len(packed)} rows of at most {max(sizes)} tokens, "
        f"{sum(sizes) / (len(packed) * max(sizes)):.1%} full, by {how}"
    )
    return packed


def _check_options(settings: Settings, opened: Opened) -> None:
    """Which tokens to learn has to be a question that the rows can answer."""
    if settings.completion_only_loss and settings.assistant_only_loss:
        raise ConfigError(
            "completion_only_loss and assistant_only_loss are both set",
            code="E-CONFIG-CONFLICT",
            hint="keep one of the two",
        )
    if settings.completion_only_loss and not opened.answers:
        raise ConfigError(
            "completion_only_loss needs demonstrations with a prompt and a completion",
            code="E-CONFIG-CONFLICT",
            got=f"{opened.table.name} has {'messages' if 'messages' in opened.rows[0] else 'text'}",
            hint="--assistant-only-loss true learns the assistant's turns of messages",
        )
    if settings.assistant_only_loss and not any(isinstance(_dialogue(row), list) for row in opened.rows):
        raise ConfigError(
            "assistant_only_loss needs conversations",
            code="E-CONFIG-CONFLICT",
            got=f"{opened.table.name} has text",
            hint="leave it out; of rows with a prompt and a completion only the completion is learned",
        )


def _dialogue(row: Row) -> Any:
    """The messages of a row; None for text."""
    if isinstance(row.get("messages"), list):
        return row["messages"]
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return None
    start = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    end = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return [*start, *end]


def _with_prompt(opened: Opened, settings: Settings, tokenizer: Any) -> tuple[list[Row], list[Document]]:
    """Documents of a prompt and a completion."""
    rows = rendered(opened, tokenizer)
    rows = [{**row, "_whole": row["_prompt"] + row["_answers"][0]} for row in rows]
    only = settings.completion_only_loss is not False
    documents = []
    for prompt, (answer,) in tokenised_answers(rows, 1, tokenizer):
        learned = [not only] * len(prompt) + [True] * len(answer)
        documents.append(Document(prompt + answer, len(prompt), [False, *learned[1:]]))
    return rows, documents


def _whole(opened: Opened, settings: Settings, tokenizer: Any) -> tuple[list[Row], list[Document]]:
    """Documents of a conversation or a text."""
    rows = [{**row, "messages": _dialogue(row)} for row in opened.rows]
    rows = apply(
        RenderDialogue(opened.template, settings.assistant_only_loss), rows, tokenizer, opened.ledger
    )
    documents = []
    for row in rows:
        (ids,) = tokenised(tokenizer, [row["_whole"]], special=row["_text"])
        end = tokenizer.eos_token_id
        if row["_text"] and end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        learned = [True] * len(ids)
        if row["_spans"] is not None:
            places = cut_places(
                tokenizer, row["_whole"], ids, [cut for span in row["_spans"] for cut in span]
            )
            learned = [False] * len(ids)
            for start, stop in zip(places[::2], places[1::2], strict=True):
                learned[start:stop] = [True] * (stop - start)
        documents.append(Document(ids, 0, [False, *learned[1:]]))
    return rows, documents


def _fitted(
    rows: list[Row],
    documents: list[Document],
    limit: tuple[int, str],
    settings: Settings,
    ledger: Ledger,
    splits: bool,
) -> tuple[list[Row], list[Document]]:
    """Documents cut to the limit, unless packing splits them; none in which nothing is learned."""
    longest, rule = limit
    kept, over, cut = [], 0, 0
    for row, one in zip(rows, documents, strict=True):
        if len(one.ids) > longest and not splits:
            if settings.truncation_mode == "drop":
                over += 1
                continue
            start = len(one.ids) - longest if settings.truncation_mode == "keep_end" else 0
            one, cut = one.piece(start, start + longest), cut + 1
        kept.append((row, one))
    if cut:
        side = "end" if settings.truncation_mode == "keep_start" else "start"
        ledger.note(f"cut {cut} demonstrations at the {side}: {rule}")
    if over:
        ledger.drop(over, f"over {rule}")
    useful = [(row, one) for row, one in kept if any(one.learned)]
    if len(useful) < len(kept):
        ledger.drop(len(kept) - len(useful), f"nothing to learn within {rule}")
    ledger.check_left(useful)
    return [row for row, _ in useful], [one for _, one in useful]
