"""Small data for tests: rows of every form that an algorithm eats, and rewards that tell texts apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

FORMS = (
    "prompts, text", "prompts, messages",
    "pairs, text", "pairs, text without prompt", "pairs, messages", "pairs, messages without prompt",
    "labeled, text", "labeled, messages",
    "demonstrations, text", "demonstrations, text with prompt", "demonstrations, messages",
    "demonstrations, messages with prompt",
)  # fmt: skip
USUAL = {
    "prompts": "prompts, text",
    "pairs": "pairs, text",
    "labeled": "labeled, text",
    "demonstrations": "demonstrations, text with prompt",
}


def user(text: str) -> dict[str, str]:
    """A turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """A turn of the assistant."""
    return {"role": "assistant", "content": text}


def row(number: int, form: str) -> dict[str, Any]:
    """A row of one of ``FORMS``; lengths differ from row to row.

    Args:
        number: of the row; another one gives another row.
        form: what it is for, and how it is written.
    """
    x, y = 20 + 7 * number, 3 + number
    thing = ("pens", "books", "red apples")[number % 3]
    question = f"Amy has {x} {thing}. Ann has {y} more than Amy. How many {thing} does Ann have?"
    right = f" {x} + {y} = {x + y}. Answer: {x + y}"
    wrong = (f" {x} - {y} = {x - y}. Answer: {x - y}", " I think it is 94.")[number % 2]
    label, answer = number % 3 > 0, right if number % 3 else wrong
    rows: dict[str, dict[str, Any]] = {
        "prompts, text": {"prompt": question, "answer": str(x + y)},
        "prompts, messages": {"prompt": [user(question)], "answer": str(x + y)},
        "pairs, text": {"prompt": question, "chosen": right, "rejected": wrong},
        "pairs, text without prompt": {"chosen": question + right, "rejected": question + wrong},
        "pairs, messages": {
            "prompt": [user(question)], "chosen": [assistant(right)], "rejected": [assistant(wrong)],
        },
        "pairs, messages without prompt": {
            "chosen": [user(question), assistant(right)], "rejected": [user(question), assistant(wrong)],
        },
        "labeled, text": {"prompt": question, "completion": answer, "label": label},
        "labeled, messages": {"prompt": [user(question)], "completion": [assistant(answer)], "label": label},
        "demonstrations, text": {"text": question + right},
        "demonstrations, text with prompt": {"prompt": question, "completion": right},
        "demonstrations, messages": {"messages": [user(question), assistant(right)]},
        "demonstrations, messages with prompt": {
            "prompt": [user(question)], "completion": [assistant(right)],
        },
    }  # fmt: skip
    return rows[form]


def rows(eats: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """``count`` rows for an algorithm, text with a prompt.

    Args:
        eats: ``prompts``, ``pairs``, ``labeled`` or ``demonstrations``.
        count: how many.
        first: number of the first one.
    """
    return [row(number, USUAL[eats]) for number in range(first, first + count)]


def ranked(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward from 0 to 1 that no two different texts share, so that nothing is a tie."""
    return [int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 16**6 for text in completions]


def even(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A reward of 1 for each completion whose first token has an even number, 0 for any other."""
    return [float(bool(ids) and ids[0] % 2 == 0) for ids in completion_ids]
