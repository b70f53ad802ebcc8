"""What holds of every reward: one score a completion, in order, whatever the text; its speed is told."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlx.core.models import load_policy
from rlx.core.reward_call import (
    RUN_STEP,
    STANDARD,
    Outcome,
    Signature,
    Unusable,
    Value,
    read_items,
    read_value,
    start,
)
from rlx.core.reward_pieces import Piece, taken_apart, together
from rlx.core.settings import Settings
from rlx.core.state import load_state, save_state
from rlx.core.text import safe_text
from rlx.core.tokenizer import load_tokenizer
from rlx.plugins.contract import Failed, Rewarded
from rlx.testing.kit import NotApplicable, Subject, case
from rlx.testing.texts import ORDINARY, UNUSUAL, column_values

Batch = dict[str, list[Any]]

DECLARED = ("columns_declared",)
COMPLETIONS = ("completions", "completion_ids")


def _batch(subject: Subject, texts: Sequence[str]) -> Batch:
    """Everything that a run would have for these completions, columns from sample rows or made up."""
    fn = _reward(subject)
    encode = subject.once("tokenizer", lambda: load_tokenizer(Settings()))
    ids = [encode(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts = [f"What is 5 + 7? ({number})" for number in range(len(texts))]
    batch: Batch = {
        "prompts": prompts, "prompt_texts": list(prompts), "completions": list(texts), "completion_ids": ids,
    }  # fmt: skip
    for column in Signature.of(fn, subject.shown).needed:
        batch[column] = column_values(subject, column, len(texts))
    return batch


def _reward(subject: Subject) -> Any:
    return subject.once("reward", lambda: _made(subject))


def _made(subject: Subject) -> Any:
    """The reward, built; one that needs a policy gets a new adapter of the packaged model."""
    fn = subject.make()
    if getattr(fn, "needs_policy", False):  # a plain function has no such attribute
        fn.attach(load_policy(Settings(lora_r=4)))
    return fn


def _result(subject: Subject, batch: Batch, fn: Any = None) -> Any:
    """What the reward returns for a copy of a batch; it raises what it raises."""
    return _returned(subject, copy.deepcopy(batch), fn)


def _returned(subject: Subject, batch: Batch, fn: Any = None) -> Any:
    """What the reward returns for a batch, given what its signature takes."""
    outcome = _outcome(subject, batch, fn)
    return outcome.result.values if isinstance(outcome.result, Rewarded) else outcome.result


def _outcome(subject: Subject, batch: Batch, fn: Any = None) -> Outcome:
    """One call of the reward; it raises what that raises."""
    fn = _reward(subject) if fn is None else fn
    signature = Signature.of(fn, subject.shown)
    given = {**batch, RUN_STEP: None}
    outcome = start(fn, {name: value for name, value in given.items() if signature.takes(name)}).result()
    if outcome.error is not None:
        raise outcome.error
    return outcome


def _items(subject: Subject, batch: Batch) -> list[Any]:
    result = _result(subject, batch)
    try:
        return read_items(result, len(batch["completions"]))
    except Unusable as fault:
        raise AssertionError(f"it {fault.what}; expected {fault.expected or 'one a completion'}") from None


def _scores(subject: Subject, batch: Batch, fn: Any = None) -> list[Value]:
    """Usable scores of a batch."""
    items = read_items(_result(subject, batch, fn), len(batch["completions"]))
    return [read_value(item, len(ids)) for item, ids in zip(items, batch["completion_ids"], strict=True)]


def _pick(batch: Batch, order: Sequence[int]) -> Batch:
    return {name: [values[number] for number in order] for name, values in batch.items()}


def _close(one: Value, other: Value) -> bool:
    if one is None or other is None:
        return one is other
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-6))


def _key(value: Value) -> tuple[float, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _spread(subject: Subject) -> float:
    """How far apart two calls with the same completions are, at most."""

    def measure() -> float:
        batch = _batch(subject, ORDINARY)
        one, two = (_scores(subject, batch) for _ in range(2))
        if any(len(_key(a)) != len(_key(b)) for a, b in zip(one, two, strict=True)):
            return math.inf
        pairs = [(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(_key(x), _key(y), strict=True)]
        return max((abs(a - b) for a, b in pairs), default=0.0)

    found: float = subject.once("spread", measure)
    return found


def _assert_repeatable(subject: Subject) -> None:
    if _spread(subject) > 1e-6:
        raise NotApplicable("its scores vary from call to call")


@case("reward")
def columns_declared(subject: Subject) -> str:
    """Given the standard arguments and the columns that it declares, it scores ordinary completions."""
    signature = Signature.of(_reward(subject), subject.shown)
    if not signature.names & set(COMPLETIONS):
        for name in signature.names:
            near = get_close_matches(name, COMPLETIONS, n=1, cutoff=0.85)
            assert not near, f"it takes a column called {name!r}; did you mean {near[0]!r}?"
    batch = _batch(subject, ORDINARY)
    declared = [name for name in batch if name not in STANDARD]
    try:
        _result(subject, batch)
    except (KeyError, TypeError) as error:
        raise AssertionError(
            f"it fails with {type(error).__name__}: {error}, given the columns that it declares: "
            f"{', '.join(declared) or 'none'}; name others in `columns` or in its signature"
        ) from error
    origin = "" if subject.rows else ", made up; --data gives rows of yours"
    return f"with the column{'s' * (len(declared) > 1)} {', '.join(declared)}{origin}" if declared else ""


@case("reward", after=DECLARED)
def returns_one_value_each(subject: Subject) -> None:
    """It returns one number, list of one number a token, or None for each completion."""
    batch = _batch(subject, ORDINARY)
    for number, (item, ids) in enumerate(zip(_items(subject, batch), batch["completion_ids"], strict=True)):
        try:
            read_value(item, len(ids))
        except Unusable as fault:
            if not _not_finite(item):
                raise AssertionError(f"it {fault.what} for completion {number}; {fault.expected}") from None


def _not_finite(item: Any) -> bool:
    """Whether this is a number, or holds one, that is NaN or infinite."""
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu().numpy()
    try:
        return not bool(np.isfinite(np.asarray(item, dtype=float)).all())
    except (TypeError, ValueError):  # no number at all
        return False


@case("reward", after=("returns_one_value_each",))
def finite_or_none(subject: Subject) -> None:
    """A score is a finite number; None, not NaN, says that the reward does not apply."""
    for text in (*ORDINARY, *UNUSUAL):
        try:
            result = _result(subject, _batch(subject, [text]))
        except Exception:  # whether it raises on such a text is another case
            continue
        for item in result:
            shown = safe_text(text, 40)
            assert not isinstance(item, Failed), f"it could not score {shown!r}: {item.reason}"
            assert item is None or not _not_finite(item), (
                f"it returned {item} for {shown!r}; return None where it does not apply"
            )


@case("reward", after=DECLARED)
def survives_unusual_text(subject: Subject) -> None:
    """Empty, very long, unbalanced and foreign text, and control characters do not make it raise."""
    for text in UNUSUAL:
        try:
            _result(subject, _batch(subject, [text]))
        except Exception as error:
            raise AssertionError(
                f"it raises {type(error).__name__}: {error} on the completion {safe_text(text, 40)!r}"
            ) from error


@case("reward", after=("returns_one_value_each", "finite_or_none"))
def order_follows_input(subject: Subject) -> None:
    """Completions in another order get their scores in that order."""
    _assert_repeatable(subject)
    batch = _batch(subject, ORDINARY)
    scores = _scores(subject, batch)
    for order in ([*reversed(range(len(ORDINARY)))], [3, 0, 5, 1, 4, 2]):
        turned = _scores(subject, _pick(batch, order))
        for place, number in enumerate(order):
            assert _close(turned[place], scores[number]), (
                f"completion {number} is scored {scores[number]}, and {turned[place]} in another order"
            )


@case("reward", after=("returns_one_value_each", "finite_or_none"))
def independent_of_batch(subject: Subject) -> None:
    """A completion is scored the same alone and among others."""
    _assert_repeatable(subject)
    batch = _batch(subject, ORDINARY)
    together = sorted(map(_key, _scores(subject, batch)))
    alone = sorted(_key(_scores(subject, _pick(batch, [n]))[0]) for n in range(len(ORDINARY)))
    for one, other in zip(alone, together, strict=True):
        same = len(one) == len(other) and bool(np.allclose(one, other, rtol=1e-4, atol=1e-6))
        assert same, f"scores are {together} in one batch, {alone} one by one"


@case("reward", after=("returns_one_value_each", "finite_or_none"))
def halves_make_the_whole(subject: Subject) -> None:
    """Declared independent, it tells of two halves what it tells of the whole; a metric of a call adds up."""
    fn = _reward(subject)
    if not getattr(fn, "independent", False):  # a plain function need not have the attribute
        raise NotApplicable("it does not declare itself independent: it is called once for a batch")
    if hasattr(fn, "state_dict") or getattr(fn, "needs_policy", False):
        raise NotApplicable("it keeps a state or needs the policy: it is called once for a batch")
    _assert_repeatable(subject)
    every = range(len(ORDINARY))
    whole, halves = (_told(subject, cuts) for cuts in ([every], [every[::2], every[1::2]]))
    for number, (one, other) in enumerate(zip(whole[0], halves[0], strict=True)):
        assert _close(one, other), (
            f"completion {number} is scored {one} in one call for all, {other} in one for half of them"
        )
    for name in {**whole[1], **halves[1]}:
        one, other = whole[1].get(name, []), halves[1].get(name, [])
        same = len(one) == len(other) and bool(np.allclose(one, other, rtol=1e-4, atol=1e-6))
        assert same, (
            f"its metric {name!r} is {one} of all, {other} of two halves: give one number a completion, or a "
            "count, which adds up"
        )
    for name in {**whole[2], **halves[2]}:
        one, other = whole[2].get(name, []), halves[2].get(name, [])
        assert one == other, f"its column {name!r} is {one} in one call for all, {other} in two"


def _told(subject: Subject, cuts: Sequence[Sequence[int]]) -> tuple[list[Value], Any, Any]:
    """Scores, metrics and columns of ordinary completions, put together from one call a cut."""
    batch, parts = _batch(subject, ORDINARY), []
    for places in cuts:
        outcome = _outcome(subject, _pick(copy.deepcopy(batch), places))
        parts.append(taken_apart(Piece(places, outcome)))
    try:
        items, metrics, columns = together(parts, len(ORDINARY))
    except Unusable as fault:
        raise AssertionError(f"it {fault.what}") from None
    ids = batch["completion_ids"]
    return [read_value(item, len(own)) for item, own in zip(items, ids, strict=True)], metrics, columns


@case("reward", after=DECLARED)
def inputs_not_mutated(subject: Subject) -> None:
    """What it is given is what it was, after the call."""
    batch = _batch(subject, ORDINARY)
    before = copy.deepcopy(batch)
    _returned(subject, batch)
    changed = [name for name, values in batch.items() if values != before[name]]
    assert not changed, f"it changes {', '.join(changed)}, which it was given"


@case("reward", after=DECLARED)
def takes_missing_values(subject: Subject) -> None:
    """Where a column that it needs has no value (None), it does not raise."""
    batch = _batch(subject, ORDINARY)
    needed = [name for name in batch if name not in STANDARD]
    if not needed:
        raise NotApplicable("it needs no columns")
    for name in needed:
        lacking = {**batch, name: [None] * len(ORDINARY)}
        try:
            _result(subject, lacking)
        except Exception as error:
            raise AssertionError(
                f"it raises {type(error).__name__}: {error} where {name!r} is None; return None for such rows"
            ) from error


@case("reward", after=("returns_one_value_each", "finite_or_none"))
def state_survives_a_checkpoint(subject: Subject) -> None:
    """A new one that was given the saved state scores as the old one goes on scoring."""
    fn = _made(subject)
    if not hasattr(fn, "state_dict"):
        raise NotApplicable("it keeps no state")
    batch = _batch(subject, ORDINARY)
    _scores(subject, batch, fn)
    state, other = through_a_checkpoint(fn.state_dict()), _made(subject)
    other.load_state_dict(state)
    one, two = (_scores(subject, batch, each) for each in (fn, other))
    assert all(map(_close, one, two)), f"it goes on with {one}, and with {two} after a checkpoint"


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a checkpoint.

    Raises:
        PluginError: it holds something that a checkpoint cannot keep.
    """
    with tempfile.TemporaryDirectory(prefix="rlx-testing-") as folder:
        save_state(Path(folder), state)
        return load_state(Path(folder))


@case("reward", after=("returns_one_value_each", "finite_or_none"))
def repeatable(subject: Subject) -> str:
    """Whether the same completions get the same scores again; told, never a failure."""
    spread = _spread(subject)
    return (
        "the same scores each time" if spread <= 1e-6 else f"varies by up to {spread:.3g} from call to call"
    )


@case("reward", after=DECLARED)
def speed(subject: Subject) -> str:
    """How many completions it scores in a second; told, never a failure."""
    batch = _batch(subject, ORDINARY * 8)
    began = time.perf_counter()
    _result(subject, batch)
    seconds = time.perf_counter() - began
    return f"{len(batch['completions']) / max(seconds, 1e-9):,.0f} completions a second"
