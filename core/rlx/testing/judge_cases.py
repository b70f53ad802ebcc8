"""What holds of every judge: one verdict a pair, in order, whatever the text; its bias and speed are told."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from typing import Any

from rlx.core.settings import Settings
from rlx.core.text import safe_text
from rlx.core.tokenizer import load_tokenizer
from rlx.testing.kit import NotApplicable, Subject, case
from rlx.testing.texts import ORDINARY, UNUSUAL, column_values

Pairs = list[tuple[str, str]]
WORKS = ("returns_one_verdict_each",)
PAIRS: Pairs = [(one, other) for number, one in enumerate(ORDINARY) for other in ORDINARY[number + 1 :]]


def _arguments(subject: Subject, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Everything that whoever asks a judge may give it by name, as far as its signature takes it."""
    judge = _judge(subject)
    encode = subject.once("tokenizer", lambda: load_tokenizer(Settings()))
    prompts = [f"What is 5 + 7? ({number})" for number in range(len(pairs))]
    named: dict[str, Any] = {
        "prompts": prompts,
        "pairs": list(pairs),
        "prompt_texts": list(prompts),
        "pair_ids": [
            tuple(encode(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in pairs
        ],
        "rows": [*range(len(pairs))],
    }
    parameters = inspect.signature(judge.judge).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    declared = judge.columns if hasattr(judge, "columns") else ()  # the protocol does not ask for it
    for column in dict.fromkeys([*declared, *parameters]):
        if column not in named and (
            column in declared or parameters[column].kind is not parameters[column].VAR_KEYWORD
        ):
            named[column] = column_values(subject, column, len(pairs))
    return {name: value for name, value in named.items() if everything or name in parameters}


def _judge(subject: Subject) -> Any:
    return subject.once("judge", subject.make)


def _verdicts(subject: Subject, arguments: dict[str, Any]) -> Any:
    given = copy.deepcopy(arguments)
    prompts, pairs = given.pop("prompts"), given.pop("pairs")
    return _judge(subject).judge(prompts, pairs, **given)


def _again(subject: Subject) -> float:
    """The share of pairs that get the same verdict when asked about again."""

    def measure() -> float:
        arguments = _arguments(subject, PAIRS)
        one, two = (_verdicts(subject, arguments) for _ in range(2))
        same = [bool(a == b) for a, b in zip(one, two, strict=True)]
        return sum(same) / len(same)

    found: float = subject.once("again", measure)
    return found


@case("judge")
def returns_one_verdict_each(subject: Subject) -> None:
    """It returns a list with 0, 1 or None for each pair."""
    verdicts = _verdicts(subject, _arguments(subject, PAIRS))
    assert isinstance(verdicts, list | tuple), f"it returned a {type(verdicts).__name__}, not a list"
    assert len(verdicts) == len(PAIRS), f"it returned {len(verdicts)} verdicts for {len(PAIRS)} pairs"
    for number, verdict in enumerate(verdicts):
        good = verdict is None or (isinstance(verdict, int) and verdict in (0, 1) and verdict is not True)
        assert good and verdict is not False, f"the verdict on pair {number} is {verdict!r}, not 0, 1 or None"


@case("judge", after=WORKS)
def order_follows_input(subject: Subject) -> None:
    """Pairs in another order get their verdicts in that order."""
    if _again(subject) < 1:
        raise NotApplicable("its verdicts vary from call to call")
    arguments = _arguments(subject, PAIRS)
    verdicts = _verdicts(subject, arguments)
    order = [*reversed(range(len(PAIRS)))]
    turned = _verdicts(subject, {name: [v[n] for n in order] for name, v in arguments.items()})
    for place, number in enumerate(order):
        assert turned[place] == verdicts[number], (
            f"the verdict on pair {number} is {verdicts[number]}, in another order of pairs {turned[place]}"
        )


@case("judge", after=WORKS)
def takes_no_pairs(subject: Subject) -> None:
    """No pairs get no verdicts."""
    verdicts = _verdicts(subject, _arguments(subject, []))
    assert len(verdicts) == 0, f"it returned {len(verdicts)} verdicts for no pairs"


@case("judge", after=WORKS)
def survives_unusual_text(subject: Subject) -> None:
    """Empty, very long and foreign completions do not make it raise."""
    for text in UNUSUAL:
        for pair in ((text, ORDINARY[0]), (ORDINARY[0], text)):
            try:
                _verdicts(subject, _arguments(subject, [pair]))
            except Exception as error:
                raise AssertionError(
                    f"it raises {type(error).__name__}: {error} on the completion {safe_text(text, 40)!r}"
                ) from error


@case("judge", after=WORKS)
def inputs_not_mutated(subject: Subject) -> None:
    """What it is given is what it was, after the call."""
    given = _arguments(subject, PAIRS)
    before = copy.deepcopy(given)
    rest = {name: value for name, value in given.items() if name not in ("prompts", "pairs")}
    _judge(subject).judge(given["prompts"], given["pairs"], **rest)
    changed = [name for name, values in given.items() if values != before[name]]
    assert not changed, f"it changes {', '.join(changed)}, which it was given"


@case("judge", after=WORKS)
def repeatable(subject: Subject) -> str:
    """How often the same pair gets the same verdict again; told, never a failure."""
    return f"the same verdict on {_again(subject):.0%} of the pairs when asked again"


@case("judge", after=WORKS)
def sides(subject: Subject) -> str:
    """How often the verdict turns with the sides, which a run draws for each pair; told, never a failure."""
    one = _verdicts(subject, _arguments(subject, PAIRS))
    two = _verdicts(subject, _arguments(subject, [(b, a) for a, b in PAIRS]))
    turned = sum(x == y if x is None else y == 1 - x for x, y in zip(one, two, strict=True))
    return f"{turned} of {len(PAIRS)} verdicts turn when the sides are swapped"


@case("judge", after=WORKS)
def speed(subject: Subject) -> str:
    """How many pairs it compares in a second; told, never a failure."""
    arguments = _arguments(subject, PAIRS)
    began = time.perf_counter()
    _verdicts(subject, arguments)
    return f"{len(PAIRS) / max(time.perf_counter() - began, 1e-9):,.0f} pairs a second"
