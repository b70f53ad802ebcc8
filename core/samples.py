"""Sample completions as they are written down, and data that must not be written whole."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlx.core.batch import Rollouts

DATA = ("dataset", "eval_dataset")
LONGEST_VALUE = 20_000  # characters of a data-set column's value, as JSON, that are kept beside a completion


def lines(run: Any, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """The samples that belong to a log line: of the last rollouts, and of the evaluation that it reports.

    Args:
        run: its ``rollouts``, ``evaluated`` and option ``log_completions`` are read.
        metrics: the log line.

    Returns:
        A dict a sample, as ``samples`` gives it, with ``step``, and ``eval`` for held-out ones.
    """
    limit, step = run.config.settings.log_completions, int(metrics["step"])
    evaluated = [name.startswith("eval/") for name in metrics if name != "step"]
    found: list[dict[str, Any]] = []
    if limit and run.rollouts is not None and not all(evaluated):
        found += [{"step": step, **sample} for sample in samples(run.rollouts, limit)]
    if limit and run.evaluated is not None and any(evaluated):
        found += [{"step": step, "eval": True, **sample} for sample in samples(run.evaluated, limit)]
    return found


def samples(rollouts: Rollouts, limit: int) -> list[dict[str, Any]]:
    """Completions with what was said about them, one of each prompt first.

    Args:
        rollouts: completions with their scores.
        limit: how many; -1 for all.

    Returns:
        Dicts with ``prompt``, ``completion``, ``score``, ``rewards`` and ``finished``, and ``columns`` where
        rewards told some; None where no reward applies. And what it takes to score them anew: ``row`` and
        ``data``, the row's number and its columns, those left out that are long or that JSON does not have;
        ``messages`` of a conversation; ``completion_ids``.
    """
    groups = rollouts.sequences.groups.tolist()
    firsts = {group: place for place, group in reversed(list(enumerate(groups)))}
    order = [*sorted(firsts.values()), *sorted(set(range(len(groups))) - set(firsts.values()))]
    chosen = order if limit < 0 else order[:limit]
    finished = rollouts.finished.tolist()
    score = [math.nan] * len(groups) if rollouts.score is None else rollouts.total_score.tolist()
    rewards = {name: values.tolist() for name, values in (rollouts.rewards or {}).items()}
    told = rollouts.reward_columns or {}
    prompts, tokens = rollouts.prompts, _completion_ids(rollouts, chosen)
    return [
        {
            "prompt": prompts.texts[i],
            "completion": rollouts.texts[i],
            "score": _number(score[i]),
            "rewards": {name: _number(values[i]) for name, values in rewards.items()},
            "finished": finished[i],
            **({"columns": {name: values[i] for name, values in told.items()}} if told else {}),
            "row": prompts.rows[i],
            "data": {name: values[i] for name, values in prompts.columns.items() if _fits(values[i])},
            **({} if prompts.messages[i] is None else {"messages": prompts.messages[i]}),
            "completion_ids": ids,
        }
        for i, ids in zip(chosen, tokens, strict=True)
    ]


def without_rows(options: Mapping[str, Any], hidden: Collection[str] = ()) -> dict[str, Any]:
    """Options for others to see: what a data set given in Python holds is left out.

    Options of components are looked through as well: a callback may have data of its own.

    Args:
        options: as the config has them, at any depth.
        hidden: names of texts of which only the length is told.
    """
    return {name: _shown(name, value, hidden) for name, value in options.items()}


def _shown(name: str, value: Any, hidden: Collection[str]) -> Any:
    if name in hidden and isinstance(value, str) and value:
        return f"{len(value)} characters"
    if name in DATA:
        return _shown_data(value)
    if isinstance(value, Mapping):
        return without_rows(value, hidden)
    if isinstance(value, list | tuple):
        return [_shown("", one, hidden) for one in value]
    return value


def _shown_data(value: Any) -> Any:
    if not _names_data(value):
        count = f"{len(value)} rows" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
        return f"{count} given in Python"
    if isinstance(value, Mapping):  # the options of a named data set may be rows, too
        return {name: _shown_data(one) if _holds_rows(one) else one for name, one in value.items()}
    return [_shown_data(one) for one in value] if isinstance(value, list) else value


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value)


def _names_data(value: Any) -> bool:
    """Whether a value of a data option says where rows are, instead of holding them."""
    if isinstance(value, list):  # a mixture
        return bool(value) and all(
            isinstance(one, Mapping) and "fraction" in one and _names_data(one) for one in value
        )
    if isinstance(value, Mapping):
        return isinstance(value.get("name"), str)
    return value is None or isinstance(value, str | Path)


def _completion_ids(rollouts: Rollouts, chosen: list[int]) -> list[list[int]]:
    """Token ids of the completions numbered by chosen."""
    sequences = rollouts.sequences
    ids, ends = sequences.ids.tolist(), (sequences.starts + sequences.lengths).tolist()
    begins = (sequences.starts + sequences.prompt_lengths).tolist()
    return [ids[begins[i] : ends[i]] for i in chosen]


def _fits(value: Any) -> bool:
    """Whether a value of a data-set column is kept beside a completion."""
    try:
        return len(json.dumps(value)) <= LONGEST_VALUE
    except (TypeError, ValueError):  # an image, say
        return False


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
