r"""accuracy: 1 where the final answer of a completion equals the data's as mathematics, else 0.

``1/2``, ``0.5`` and ``\frac{1}{2}`` are equal, so are ``x+1`` and ``1+x``. Reading and comparing is the work
of math-verify and SymPy, in worker processes: an expression such as ``9^{9^{9^9}}`` keeps them busy for ever.
Leaves out answers in words, which exact_match compares: here letters are variables.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Failed, Reward, Rewarded

# A word that is no LaTeX command and another one, or a number and a word: there the answer stands in prose.
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}[\s,]+[A-Za-z]{2,}|\A[-+.,/\d]+\s+[A-Za-z]{2,}")
_MARKED = ("\\boxed", "$", "\\(", "\\[")
HINT = "let such a completion count as wrong, or not at all: --accuracy.undecided wrong (or none)"
_SHOWN = 200  # characters of an answer in completions.jsonl


class Accuracy(Reward):
    r"""1.0 where the final answer equals the data's as mathematics, 0.0 where it does not.

    The answer of a completion is what follows the last ``####``; else what stands in the last
    ``\boxed{…}`` or behind words such as ``the answer is``; else, unless ``marked``, the last expression.
    The data's is read in the same way, or may stand alone. None where it is missing or cannot be read:
    the share of those is logged as ``reward/accuracy/unreadable_gold``, that of checks without a result
    as ``reward/accuracy/undecided``.
    """

    independent: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        """Options of accuracy."""

        column: str = opt("answer", "data-set column with the right answer or a solution that ends with it")
        marked: bool = opt(False, "an answer counts only where the completion marks it as one")
        timeout: float = opt(5.0, "longest check of one completion", gt=0, unit="seconds")
        workers: int = opt(4, "worker processes that check", ge=1)
        longest: int = opt(2000, "so much of the end of a completion is read", gt=0, unit="characters")
        undecided: str = opt(
            "error",
            "what a check that took too long or lost its worker makes of the completion: error (as "
            "reward_on_error says), none (not applicable), wrong (0)",
            choices=("error", "none", "wrong"),
        )

    def __init__(self, config: Config) -> None:
        from rlx.core.workers import Workers

        super().__init__(config)
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "reward 'accuracy' needs math-verify, which is not installed",
                code="E-CONFIG-EXTRA",
                hint='pip install "rlx[math]"',
            )
        self.columns = (config.column,)
        warm_up = ("1", "1", False)  # imports SymPy, which takes longer than many a check
        self._workers = Workers(compare, count=config.workers, deadline=config.timeout, warm_up=warm_up)

    def __call__(self, *, completions: list[str], **columns: list[Any]) -> Rewarded:
        """One score a completion; the answers that were read stand in the column ``answer``."""
        golds = ["" if gold is None else str(gold).strip() for gold in columns[self.config.column]]
        asked = [i for i, gold in enumerate(golds) if gold]
        items = [[golds[i], completions[i][-self.config.longest :], self.config.marked] for i in asked]
        found = dict(zip(asked, self._workers.map(items), strict=True))
        told = [found.get(i, {"gold": False}) for i in range(len(golds))]
        decided = [{} if isinstance(result, Failed) else result for result in told]
        unreadable = [float(not result["gold"]) if result else None for result in decided]
        return Rewarded(
            [self._score(result) for result in told],
            metrics={"undecided": [float(not result) for result in decided], "unreadable_gold": unreadable},
            columns={"answer": [result.get("answer") for result in decided]},
        )

    def _score(self, result: Any) -> float | Failed | None:
        if isinstance(result, Failed):
            told = replace(result, hint=HINT)
            return {"error": told, "none": None, "wrong": 0.0}[self.config.undecided]
        return float(result["right"]) if result["gold"] else None

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()


def compare(gold: str, completion: str, marked: bool) -> dict[str, Any]:
    """Whether two answers are equal. Runs in a worker, for it may never return.

    Args:
        gold: the data's answer, not blank.
        completion: the end of the completion.
        marked: an answer counts only where it is marked as one.

    Returns:
        ``gold``: whether the gold could be read; and if so ``right``, and the ``answer`` as the completion
        writes it, or None.
    """
    expected = _gold(gold)
    if not expected:
        return {"gold": False}
    given = _read(completion, marked)
    written = next((item[:_SHOWN] for item in given if isinstance(item, str)), None)
    right = any(_equal(one, other) for one in expected for other in given)
    return {"gold": True, "right": right, "answer": written}


def _equal(gold: Any, given: Any) -> bool:
    from math_verify import verify

    try:
        # Without its time limit, an alarm signal that C code never sees: the worker's deadline holds.
        return bool(verify(gold, given, timeout_seconds=None, raise_on_error=True))
    except (MemoryError, RecursionError):
        raise  # no verdict
    except Exception:  # what SymPy cannot compare, say a set and a number, is not equal
        return False


@functools.lru_cache(maxsize=256)
def _gold(text: str) -> list[Any]:
    """The data's answer, as an expression and as it is written; empty if it is no expression."""
    alone = "####" not in text and not _PROSE.search(text) and not any(mark in text for mark in _MARKED)
    found = _parsed(f"\\boxed{{{text}}}") if alone else _read(text, marked=False)
    return found if any(not isinstance(item, str) for item in found) else []


def _read(text: str, marked: bool) -> list[Any]:
    """The final answer of a text, as an expression and as it is written."""
    if "####" not in text:
        return _parsed(text, anywhere=not marked)
    last = text.rpartition("####")[2].strip().partition("\n")[0]
    boxed = "" if any(mark in last for mark in _MARKED) else f"\\boxed{{{last}}}"
    return (_parsed(boxed) if boxed else []) or _parsed(last)


def _parsed(text: str, anywhere: bool = True) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    kinds = [
        LatexExtractionConfig(try_extract_without_anchor=anywhere),
        ExprExtractionConfig(try_extract_without_anchor=anywhere),
    ]
    found: list[Any] = parse(text, kinds, parsing_timeout=None)
    return found
