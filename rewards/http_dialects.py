"""What is said to a reward server, and how its answer is read: three dialects, one strict reader.

``native`` is rlx's own: it carries everything, and an answer must name the items that it scores.
``llamafactory`` and ``openrlhf`` are what the clients of those trainers say; their servers answer with bare
lists, of which only the length can be checked. An answer that is not exactly what was asked for is an error,
never a score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rlx.core.servers import ServerError, excerpt, shown
from rlx.core.text import safe_text
from rlx.plugins.contract import Failed

DIALECTS = ("auto", "native", "llamafactory", "openrlhf")

Score = float | list[float] | Failed | None


@dataclass(frozen=True)
class Items:
    """N completions to be scored, with what belongs to them.

    Attributes:
        prompts: texts or message lists.
        texts: the prompts as the policy saw them.
        completions: texts.
        completion_ids: token ids.
        columns: data-set columns.
        step: the run's, None outside a run.
    """

    prompts: list[Any]
    texts: list[str]
    completions: list[str]
    completion_ids: list[list[int]]
    columns: Mapping[str, list[Any]]
    step: int | None = None

    def __len__(self) -> int:
        return len(self.completions)

    def take(self, index: Sequence[int]) -> Items:
        """The items numbered by index, in that order."""

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in index]

        columns = {name: pick(values) for name, values in self.columns.items()}
        return Items(
            pick(self.prompts),
            pick(self.texts),
            pick(self.completions),
            pick(self.completion_ids),
            columns,
            self.step,
        )


def request(dialect: str, items: Items, ids: Sequence[str], *, model: str, label_column: str) -> bytes:
    """The body of a request.

    Args:
        dialect: any of ``DIALECTS``; ``auto`` says it in all dialects at once.
        items: what is to be scored.
        ids: a name for each item.
        model: the ``model`` of a llamafactory request.
        label_column: data-set column that becomes the ``labels`` of an openrlhf request.

    Raises:
        ServerError: a column holds something that JSON does not have.
    """
    said: dict[str, Any] = {}
    whole = [prompt + completion for prompt, completion in zip(items.texts, items.completions, strict=True)]
    if dialect in ("auto", "llamafactory"):
        said |= {"model": model, "messages": whole}
    if dialect in ("auto", "openrlhf"):
        labels = items.columns.get(label_column, [None] * len(items))
        said |= {"query": whole, "prompts": items.texts, "labels": labels}
    if dialect in ("auto", "native"):
        said |= {
            "ids": list(ids),
            "prompts": items.texts,
            "completions": items.completions,
            "completion_ids": items.completion_ids,
            "columns": dict(items.columns),
            "step": items.step,
        }
        if any(isinstance(prompt, list) for prompt in items.prompts):
            said["conversations"] = [p if isinstance(p, list) else None for p in items.prompts]
    try:
        return json.dumps(said, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ServerError(
            "the data cannot be sent to the reward server as JSON",
            got=safe_text(error),
            expected="texts, finite numbers, true, false, null, and lists and mappings of them",
            hint="name the columns that the server needs: --http.columns answer",
        ) from None


def read(dialect: str, body: bytes, ids: Sequence[str]) -> tuple[str, list[Score]]:
    """The scores in an answer.

    Args:
        dialect: any of ``DIALECTS``; ``auto`` tells the dialect from the keys.
        body: the answer's body.
        ids: the names that the items had in the request.

    Returns:
        The dialect; one score an item, None where the reward does not apply, ``Failed`` where the server says
        so.

    Raises:
        ServerError: it is not what was asked for.
    """
    try:
        answer = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else safe_text(error, 120)
        raise _unlike(f"no JSON: {reason}", body, "JSON") from None
    if not isinstance(answer, dict):
        raise _unlike(f"JSON, but {_kind(answer)}", body, "a JSON object")
    if dialect == "auto":
        dialect = _dialect(answer)
    key = "rewards" if dialect == "openrlhf" else "scores"
    scores = answer.get(key)
    if not isinstance(scores, list):
        found = f"{key} is {_kind(scores)}" if key in answer else f"no key {key!r}"
        raise _unlike(found, body, f'{{"{key}": [one number an item]}}')
    if len(scores) != len(ids):
        raise _unlike(f"{len(scores)} {key}", body, f"{len(ids)}, one an item")
    failures: list[Any] = [None] * len(ids)
    if dialect == "native":
        if answer.get("ids") != list(ids):
            found = "other ids, or in another order" if "ids" in answer else "no ids"
            raise _unlike(found, body, "the ids of the request, in its order")
        failures = failures if answer.get("errors") is None else answer["errors"]
        if not isinstance(failures, list) or len(failures) != len(ids):
            raise _unlike("errors that do not fit", body, f"errors: a list of {len(ids)} texts or nulls")
    return dialect, [
        Failed(f"failed on the server: {shown(failure)}") if failure is not None else _score(score, i, body)
        for i, (score, failure) in enumerate(zip(scores, failures, strict=True))
    ]


def _dialect(answer: Mapping[str, Any]) -> str:
    if "rewards" in answer:
        return "openrlhf"
    return "native" if "ids" in answer else "llamafactory"


def _score(score: Any, item: int, body: bytes) -> Score:
    if score is None:
        return None
    for number in score if isinstance(score, list) else [score]:
        if not isinstance(number, int | float) or not _finite(number):
            raise _unlike(
                f"{_kind(number)} as the score of item {item}",
                body,
                "a finite number, a list of one number a token, or null where it does not apply",
            )
    checked: float | list[float] = score
    return checked


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond every float
        return False


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number that is not finite" if isinstance(value, float) else "a number")


def _unlike(found: str, body: bytes, expected: str) -> ServerError:
    return ServerError(
        f"the reward server's answer is not understood: {found}", got=excerpt(body), expected=expected
    )
