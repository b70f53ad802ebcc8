"""What a reward is given, all of a batch or a part of it, and its answers to parts put together.

A reward that is called several times for one batch leaves what one call with all of it would have left:
values and columns in the order of the batch; a metric of one number a completion averaged over all of them; a
metric that is one number for a call added up, as counts are.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlx.core.batch import Prompts
from rlx.core.errors import DataError, RlxError
from rlx.core.options import close
from rlx.core.reward_call import (
    RUN_STEP,
    Extras,
    Outcome,
    Signature,
    Unusable,
    definition,
    has_gradient,
    read_items,
    unwrap,
)

Metric = float | list[float | None]


@dataclass(frozen=True)
class Asked:
    """N completions that rewards are asked about.

    Attributes:
        prompts: one a completion.
        completions: texts.
        completion_ids: token ids.
        step: of the run, None outside one.

    Raises:
        ValueError: they differ in number.
    """

    prompts: Prompts
    completions: list[str]
    completion_ids: list[list[int]]
    step: int | None

    def __post_init__(self) -> None:
        prompts, texts, ids = len(self.prompts), len(self.completions), len(self.completion_ids)
        if not prompts == texts == ids:
            counts = f"{prompts} prompts, {texts} completions, {ids} lists of ids"
            raise ValueError(f"one prompt and one list of ids a completion, but there are {counts}")

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True)
class Piece:
    """One call of a reward that has ended.

    Attributes:
        places: of the completions it was given, in the batch.
        outcome: how it ended.
    """

    places: Sequence[int]
    outcome: Outcome


@dataclass(frozen=True)
class Part:
    """What one call returned, taken apart.

    Attributes:
        places: of its completions in the batch.
        items: one a completion, not read yet.
        extras: metrics and columns.
        gradient: it was given with a gradient.
    """

    places: Sequence[int]
    items: list[Any]
    extras: Extras
    gradient: bool


def arguments(name: str, fn: Any, signature: Signature, asked: Asked) -> dict[str, Any]:
    """Copies of what a reward's signature takes, so that it may do with them as it likes.

    Args:
        name: the reward's, for messages.
        fn: the reward.
        signature: its own.
        asked: what it is asked about.

    Raises:
        DataError: a column that it needs is not there.
    """
    prompts = asked.prompts
    for column in signature.needed:
        if column not in prompts.columns:
            near = close(column, list(prompts.columns))
            raise DataError(
                f"reward {name!r} needs the column {column!r}{near}",
                code="E-DATA-COLUMN",
                where=definition(fn),
                got=", ".join(prompts.columns) or "no columns beside the prompt",
            )
    named = {
        column: copy.deepcopy(values) for column, values in prompts.columns.items() if signature.takes(column)
    }
    # After the columns: one that happens to have a standard name never hides the real thing.
    if signature.takes("prompts"):
        either = zip(prompts.messages, prompts.texts, strict=True)
        named["prompts"] = [
            text if messages is None else copy.deepcopy(messages) for messages, text in either
        ]
    if signature.takes("prompt_texts"):
        named["prompt_texts"] = list(prompts.texts)
    if signature.takes("completions"):
        named["completions"] = list(asked.completions)
    if signature.takes("completion_ids"):
        named["completion_ids"] = [list(ids) for ids in asked.completion_ids]
    return named | ({RUN_STEP: asked.step} if signature.takes(RUN_STEP) else {})


def taken_apart(piece: Piece) -> Part:
    """What a call returned.

    Raises:
        Unusable: it raised, or returned something that is not one item a completion.
        BaseException: KeyboardInterrupt or SystemExit, as the reward raised it.
    """
    error = piece.outcome.error
    if error is not None and not isinstance(error, Exception | asyncio.CancelledError):
        raise error
    if error is not None:
        own = error if isinstance(error, RlxError) else None
        told = (own.expected, own.hint) if own else ("", "")
        message = f"{type(error).__name__}: {own.what if own else error}"
        if own:
            message += f"; where: {own.where}" if own.where else ""
            message += f"; got: {own.got}" if own.got else ""
        raise Unusable(f"raised {type(error).__name__}", message, *told) from error
    values, extras = unwrap(piece.outcome.result, len(piece.places))
    return Part(piece.places, read_items(values, len(piece.places)), extras, has_gradient(values))


def together(parts: Sequence[Part], count: int) -> tuple[list[Any], dict[str, list[float]], dict[str, Any]]:
    """Items, metrics and columns of a batch.

    Args:
        parts: of every completion of the batch, each once.
        count: completions of the batch.

    Returns:
        One item a completion; for each metric the numbers to average; for each column one value a completion.

    Raises:
        Unusable: a metric is one number in one call, and one a completion in another.
    """
    items: list[Any] = [None] * count
    metrics: dict[str, list[tuple[Part, Metric]]] = {}
    columns: dict[str, list[Any]] = {}
    for part in sorted(parts, key=lambda part: part.places[0]):  # sums of metrics depend on the order
        _put(items, part.places, part.items)
        for name, told in part.extras.metrics.items():
            metrics.setdefault(name, []).append((part, told))
        for name, values in part.extras.columns.items():
            _put(columns.setdefault(name, [None] * count), part.places, values)
    return items, {name: _metric(name, told, count) for name, told in metrics.items()}, columns


def seconds(pieces: Sequence[Piece]) -> float:
    """Time during which at least one of the calls was under way."""
    spent, until = 0.0, float("-inf")
    for outcome in sorted((piece.outcome for piece in pieces), key=lambda outcome: outcome.began):
        end = outcome.began + outcome.seconds
        spent += max(0.0, end - max(until, outcome.began))
        until = max(until, end)
    return spent


def _metric(name: str, told: Sequence[tuple[Part, Metric]], count: int) -> list[float]:
    numbers = [metric for _, metric in told if isinstance(metric, float)]
    if len(numbers) == len(told):
        return [sum(numbers)]
    if numbers:
        what = f"returned its metric {name!r} as one number in one call and as one a completion in another"
        raise Unusable(what, f"{len(numbers)} of {len(told)} calls gave one number", "the same in every call")
    found: list[float | None] = [None] * count
    for part, metric in told:
        _put(found, part.places, metric)
    return [number for number in found if number is not None]


def _put(into: list[Any], places: Sequence[int], values: Any) -> None:
    for place, value in zip(places, values, strict=True):
        into[place] = value
