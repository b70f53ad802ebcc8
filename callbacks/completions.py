"""Sample completions into completions.jsonl, a few at each log line. They stay on this machine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from rlx.core.batch import Rollouts


class LogCompletions(Callback):
    """Writes ``log_completions`` completions at each log line, and as many at each evaluation."""

    observer: ClassVar[bool] = True

    @hookimpl
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """Write samples of the last rollouts, and of the evaluation that this line reports."""
        limit = run.config.settings.log_completions
        if not run.is_main or limit == 0:
            return
        step = int(metrics["step"])
        if run.rollouts is not None and not all(
            name.startswith("eval/") or name == "step" for name in metrics
        ):
            for sample in samples(run.rollouts, limit):
                run.folder.log_completions({"step": step, **sample})
        if run.evaluated is not None and any(name.startswith("eval/") for name in metrics):
            for sample in samples(run.evaluated, limit):
                run.folder.log_completions({"step": step, "eval": True, **sample})


def samples(rollouts: Rollouts, limit: int) -> list[dict[str, Any]]:
    """Completions with what was said about them, one of each prompt first.

    Args:
        rollouts: completions with their scores.
        limit: how many; -1 for all.

    Returns:
        Dicts with ``prompt``, ``completion``, ``score``, ``rewards`` and ``finished``; None where no reward
        applies.
    """
    groups = rollouts.sequences.groups.tolist()
    firsts = {group: place for place, group in reversed(list(enumerate(groups)))}
    order = [*sorted(firsts.values()), *sorted(set(range(len(groups))) - set(firsts.values()))]
    chosen = order if limit < 0 else order[:limit]
    finished = rollouts.finished.tolist()
    score = [math.nan] * len(groups) if rollouts.score is None else rollouts.score.tolist()
    rewards = {name: values.tolist() for name, values in (rollouts.rewards or {}).items()}
    return [
        {
            "prompt": rollouts.prompts.texts[i],
            "completion": rollouts.texts[i],
            "score": _number(score[i]),
            "rewards": {name: _number(values[i]) for name, values in rewards.items()},
            "finished": finished[i],
        }
        for i in chosen
    ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
