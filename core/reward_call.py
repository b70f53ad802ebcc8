"""One call of one reward: what its signature takes, plain or async, and reading what it returned.

Everything that is not a finite number, a list of one number a token, or None becomes an ``Unusable``; what is
done about it is decided in ``rlx.core.scoring``.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx.core.errors import PluginError
from rlx.plugins.contract import Failed, Rewarded

STANDARD = ("prompts", "prompt_texts", "completions", "completion_ids")
RUN_STEP = "run_step"  # no list: given only to rewards that name it
LARGEST = torch.finfo(torch.float32).max

RESERVED = ("seconds", "errors")  # metrics of every reward
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Value = float | list[float] | None


class Unusable(Exception):
    """A reward's result, or one item of it, that cannot become a score.

    Args:
        what: what the reward did, to follow its name: ``returned nan``.
        got: what came back; it may quote a completion, so it is not safe to print as it is.
        expected: what is accepted instead.
        hint: what to do; empty for what is said of every unusable result.
    """

    def __init__(self, what: str, got: str, expected: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.got, self.expected, self.hint = what, got, expected, hint


@dataclass(frozen=True)
class Signature:
    """Which arguments a reward takes, all by name.

    Attributes:
        names: parameters that can be given by name.
        everything: it has ``**columns``, so it gets all there is.
        needed: data-set columns without which it cannot be called.
    """

    names: frozenset[str]
    everything: bool
    needed: tuple[str, ...]

    @classmethod
    def of(cls, fn: Any, name: str) -> Signature:
        """The signature of a reward.

        Args:
            fn: a function or built object.
            name: the reward's name, for messages.

        Raises:
            PluginError: it cannot be called, is a class that nobody built, or does not take completions.
        """
        if not callable(fn) or isinstance(fn, type):
            fault = "is a class that nobody built" if isinstance(fn, type) else "cannot be called"
            expected = "a function, or an object with __call__"
            raise PluginError(
                f"reward {name!r} {fault}", code="E-PLUGIN-REWARD", got=repr(fn)[:80], expected=expected
            )
        parameters = _parameters(fn)
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names = frozenset(p.name for p in by_name)
        positional = any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters)
        if positional or not (everything or names & {"completions", "completion_ids"}):
            raise PluginError(
                f"reward {name!r} does not take the completions by name",
                code="E-PLUGIN-REWARD",
                where=definition(fn),
                got=f"({', '.join(map(str, parameters))})",
                expected=f"(completions, …): any of {', '.join(STANDARD)} and names of data-set columns",
            )
        required = [p.name for p in by_name if p.default is p.empty and p.name not in (*STANDARD, RUN_STEP)]
        declared = getattr(fn, "columns", ())  # optional: plain functions have none
        declared = [declared] if isinstance(declared, str) else [*declared]
        return cls(names, everything, tuple(dict.fromkeys([*declared, *required])))

    def takes(self, name: str) -> bool:
        """Whether the reward is given the argument."""
        return name in self.names or (self.everything and name != RUN_STEP)


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except ValueError:
        return []  # written in C without a signature: it cannot be known to take completions by name


def definition(fn: Callable[..., Any]) -> str:
    """``file:line`` at which a reward is defined, or its module and name where there is no Python source."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    called = fn if inspect.isfunction(fn) or inspect.ismethod(fn) else type(fn).__call__
    code = getattr(inspect.unwrap(called), "__code__", None)  # None: written in C
    if code is None:
        return f"{type(fn).__module__}.{type(fn).__qualname__}"
    return f"{code.co_filename}:{code.co_firstlineno}"


@dataclass(frozen=True)
class Outcome:
    """How one call of a reward ended.

    Attributes:
        result: what it returned, None after an error.
        error: what it raised.
        seconds: from the call to the end.
        began: when it was called, ``time.perf_counter()``.
    """

    result: Any
    error: BaseException | None
    seconds: float
    began: float


def start(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> Future[Outcome]:
    """Call a reward. A plain one has ended when this returns, an async one goes on in the background."""
    began = time.perf_counter()
    result, error = None, None
    try:
        result = fn(**arguments)
    except Exception as raised:  # becomes a RewardError with this as its cause, or is counted
        error = raised
    if inspect.isawaitable(result):
        return asyncio.run_coroutine_threadsafe(_finish(result, began), _event_loop())
    done: Future[Outcome] = Future()
    done.set_result(Outcome(result, error, time.perf_counter() - began, began))
    return done


async def _finish(awaitable: Awaitable[Any], began: float) -> Outcome:
    try:
        return Outcome(await awaitable, None, time.perf_counter() - began, began)
    except BaseException as raised:
        # A SystemExit that left this function would end the loop's thread; the caller would wait for ever.
        return Outcome(None, raised, time.perf_counter() - began, began)


def _event_loop() -> asyncio.AbstractEventLoop:
    """The one loop, whichever thread asks first."""
    with _STARTING[0]:
        return _new_event_loop()


@functools.cache
def _new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own.

    It runs beside the caller's, so notebooks with a running loop work; and it stays, so that a client which
    an async reward keeps between calls does not find its loop closed.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rlx-rewards", daemon=True).start()
    return loop


_STARTING = [threading.Lock()]


def _after_fork() -> None:
    """Threads do not survive a fork, and a lock may be held by one of them."""
    _STARTING[0] = threading.Lock()
    _new_event_loop.cache_clear()


os.register_at_fork(after_in_child=_after_fork)


def has_gradient(result: Any) -> bool:
    """Whether a reward's result, or an item of it, is a tensor that requires grad."""
    items = result if isinstance(result, list | tuple) else [result]
    return any(isinstance(item, Tensor) and item.requires_grad for item in items)


def read_items(result: Any, count: int) -> list[Any]:
    """A reward's result as a list of one item a completion.

    Args:
        result: what the reward returned: a list, a tuple, or an array or tensor of one dimension.
        count: how many completions it was given.

    Raises:
        Unusable: anything else, or another number of items.
    """
    if isinstance(result, Tensor | np.ndarray):
        if result.ndim != 1:
            shape = f"{kind(result)} of shape {tuple(result.shape)}"
            raise Unusable(f"returned a {shape}", shape, f"shape ({count},): one number a completion")
        result = _plain(result)
    if not isinstance(result, list | tuple):
        expected = f"a list of {count} numbers, one a completion"
        raise Unusable(f"returned {kind(result)}", f"{kind(result)} {result!r}", expected)
    if len(result) != count:
        pairs = "one per prompt-completion pair"
        raise Unusable(
            f"returned {len(result)} rewards, but {count} were expected ({pairs})", f"{len(result)} values"
        )
    return list(result)


def read_value(item: Any, length: int) -> Value:
    """One item of a result: a number, a list of one number a token, or None.

    Args:
        item: the item; a tensor or array of no or one dimension will do.
        length: tokens of the completion.

    Raises:
        Unusable: ``Failed``, not a number, not finite in float32, or another number of items than tokens.
    """
    if item is None:
        return None
    if isinstance(item, Failed):
        raise Unusable("failed", item.reason, hint=item.hint)
    if isinstance(item, Tensor | np.ndarray) and item.ndim == 1:
        item = _plain(item)
    if not isinstance(item, list | tuple):
        return _number(item)
    if len(item) != length:
        expected = f"one number, or one for each of its {length} tokens"
        raise Unusable(f"returned a list of {len(item)} numbers", f"{len(item)} numbers", expected)
    return [_number(token) for token in item]


@dataclass(frozen=True)
class Extras:
    """What a reward told beside its values, checked, under the names that it gave.

    Attributes:
        metrics: name → one number for the call, or N numbers or None.
        columns: name → N values that JSON can hold.
    """

    metrics: dict[str, float | list[float | None]]
    columns: dict[str, list[Any]]


def unwrap(result: Any, count: int) -> tuple[Any, Extras]:
    """What a reward returned, taken apart.

    Args:
        result: values alone, or ``Rewarded``.
        count: how many completions the reward was given.

    Raises:
        Unusable: a metric or column that is not as ``Rewarded`` says.
    """
    if not isinstance(result, Rewarded):
        return result, Extras({}, {})
    for what, told in (("metrics", result.metrics), ("columns", result.columns)):
        if not isinstance(told, Mapping):
            raise Unusable(f"returned {kind(told)} as its {what}", repr(told), "a mapping from names")
    metrics = {_name(name, "metric"): _metric(name, told, count) for name, told in result.metrics.items()}
    columns = {_name(name, "column"): _column(name, told, count) for name, told in result.columns.items()}
    return result.values, Extras(metrics, columns)


def _name(name: Any, what: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or (what == "metric" and name in RESERVED):
        expected = f"a word of letters, digits, _, - and .; as a metric not {' or '.join(RESERVED)}"
        raise Unusable(f"returned a {what} under an unfit name", repr(name), expected)
    return name


def _metric(name: str, told: Any, count: int) -> float | list[float | None]:
    """One metric: a number, or one a completion."""
    several = isinstance(told, list | tuple) or (isinstance(told, Tensor | np.ndarray) and told.ndim == 1)
    items = _items(f"metric {name!r}", told, count) if several else []
    try:
        return [None if item is None else _number(item) for item in items] if several else _number(told)
    except Unusable as fault:
        expected = f"a finite number, or {count} of them or None"
        raise Unusable(f"{fault.what} in its metric {name!r}", fault.got, expected) from None


def _column(name: str, told: Any, count: int) -> list[Any]:
    """The values of one column."""
    items = _items(f"column {name!r}", told, count)
    for item in items:
        whole = isinstance(item, str | bool | int | None)
        if not whole and not (isinstance(item, float) and math.isfinite(item)):
            expected = "texts, finite numbers, True, False or None"
            raise Unusable(f"returned {kind(item)} in its column {name!r}", repr(item), expected)
    return items


def _items(what: str, told: Any, count: int) -> list[Any]:
    items = _plain(told) if isinstance(told, Tensor | np.ndarray) else told
    if not isinstance(items, list | tuple) or len(items) != count:
        got = f"{len(items)} values" if isinstance(items, list | tuple) else kind(items)
        raise Unusable(f"returned a {what} that is not one value a completion", got, f"{count} values")
    return list(items)


def kind(value: Any) -> str:
    """The type of a value, for messages."""
    return "None" if value is None else type(value).__name__


def _plain(array: Any) -> Any:
    """A tensor or array as Python numbers."""
    return array.detach().cpu().tolist() if isinstance(array, Tensor) else array.tolist()


def _number(item: Any) -> float:
    if isinstance(item, Tensor | np.ndarray | np.generic) and item.ndim == 0:
        item = _plain(item)
    expected = "a finite number, or None where it does not apply"
    if not isinstance(item, numbers.Real):
        raise Unusable(f"returned {kind(item)}", f"{kind(item)} {item!r}", expected)
    try:
        number = float(item)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Unusable(f"returned {number}", str(number), expected)
    if abs(number) > LARGEST:
        raise Unusable(
            f"returned {number}", f"{number}, which is inf in float32", f"{expected}, at most {LARGEST:.4g}"
        )
    return number
