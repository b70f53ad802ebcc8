"""Reward on held-out prompts: one sample each, drawn with the same random numbers at every evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlx.core.meter import Meter
from rlx.core.order import share
from rlx.core.streams import stream_seed

if TYPE_CHECKING:
    from rlx.core.batch import Rollouts
    from rlx.core.loop import Run


def evaluate(run: Run) -> dict[str, float]:
    """Sample one completion of each held-out prompt and reward it.

    The seed of a sample depends on its row alone, so two evaluations differ by the policy and not by luck.

    Returns:
        Metrics under ``eval/``, those of callbacks (``on_evaluate``) included.

    Raises:
        ValueError: if two callbacks report the same metric.
    """
    metrics: dict[str, float] = {}
    if run.eval_data is not None:
        metrics = _sampled(run)
    for result in run.events.emit("on_evaluate", run=run):
        for name, value in (result or {}).items():
            if name in metrics:
                raise ValueError(f"on_evaluate: two sources report the metric {name!r}; rename one of them")
            metrics[name] = value
    return metrics


def _sampled(run: Run) -> dict[str, float]:
    data, seed = run.eval_data, run.settings.seed
    mine = list(share(len(data), run.accelerator.process_index, run.accelerator.num_processes))
    prompts = data.take(mine)
    completions = run.studio.sample(prompts, 1, [stream_seed(seed, "evaluate", row) for row in mine])
    rollouts: Rollouts = run.studio.reward(prompts, completions, mine)
    run.studio.clock.seconds.clear()  # the clock belongs to training
    run.evaluated = rollouts
    meter = Meter()
    meter.add("eval/completion/length", rollouts.sequences.counts.float())
    meter.add("eval/completion/eos_rate", rollouts.finished.float())
    if rollouts.score is not None:
        meter.add("eval/reward", rollouts.score[~rollouts.score.isnan()])
        for name, values in rollouts.rewards.items():
            meter.add(f"eval/reward/{name}", values[~values.isnan()])
    return meter.means(run.accelerator)
