"""Evaluation on held-out rows: the reward of samples, or the loss and its metrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlx.core.errors import ConfigError
from rlx.core.meter import Meter
from rlx.core.order import share
from rlx.core.peers import agreed
from rlx.core.streams import stream_seed
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from rlx.core.data import PromptData
    from rlx.core.loop import Run


def evaluate(run: Run) -> dict[str, float]:
    """Evaluate the policy as it is.

    Online algorithms sample one completion of each held-out prompt and reward it. The seed of a sample
    depends on its row alone, so two evaluations differ by the policy and not by luck. Other algorithms take
    their loss and its metrics over the held-out rows, without gradient and without dropout.

    Returns:
        Metrics under ``eval/``, those of callbacks (``on_evaluate``) included.

    Raises:
        ConfigError: two callbacks report the same metric.
    """
    with _unchanged(run):
        metrics = _measured_as_it_is(run)
        for result in run.events.emit("on_evaluate", run=run):
            for name, value in (result or {}).items():
                if name in metrics:
                    raise ConfigError(
                        f"two report the metric {safe_text(name, 80)!r}",
                        code="E-CONFIG-METRIC",
                        where=f"on_evaluate of {', '.join(run.callbacks)}",
                        hint="rename one of them; win_rate has the option metric",
                    )
                metrics[name] = value
        run.evaluations += 1
        return metrics


def evaluate_once_more(run: Run) -> dict[str, float]:
    """The same for a callback that gave the policy other weights for a moment: no callback is told.

    Returns:
        Metrics under ``eval/``. ``run.evaluated`` still holds the samples of the policy itself.
    """
    shown = run.evaluated
    try:
        with _unchanged(run):
            return _measured_as_it_is(run)
    finally:
        run.evaluated = shown


@contextmanager
def _unchanged(run: Run) -> Iterator[None]:
    """The clock, and what rewards and algorithm remember, belong to training: evaluating changes nothing."""
    seconds, rewards = dict(run.studio.clock.seconds), run.studio.reward_state()
    algorithm = copy.deepcopy(run.algorithm.state_dict())
    try:
        yield
    finally:
        run.studio.clock.seconds = seconds
        run.studio.load_reward_state(rewards)
        run.algorithm.load_state_dict(algorithm)


def _measured_as_it_is(run: Run) -> dict[str, float]:
    if run.eval_data is None:
        return {}
    measure: Any = _sampled if run.algorithm.eats == "prompts" else _measured
    metrics: dict[str, float] = measure(run, run.eval_data)
    return metrics


def _sampled(run: Run, data: PromptData) -> dict[str, float]:
    mine = list(share(len(data), run.accelerator.process_index, run.accelerator.num_processes))
    prompts = data.take(mine)
    seeds = [stream_seed(run.settings.seed, "evaluate", row) for row in mine]
    with agreed(run, "the evaluation"):
        _, rollouts = run.studio.sample_and_reward(prompts, 1, seeds, mine, run.global_step)
    run.evaluated = rollouts
    meter = Meter()
    meter.add("eval/completion/length", rollouts.sequences.counts.float())
    meter.add("eval/completion/eos_rate", rollouts.finished.float())
    if rollouts.score is not None:
        meter.add("eval/reward", rollouts.total_score[~rollouts.total_score.isnan()])
        for name, values in rollouts.rewards.items():
            meter.add(f"eval/reward/{name}", values[~values.isnan()])
    for name, values in rollouts.metrics.items():
        if not name.endswith("/seconds"):  # speed is that of training
            meter.add(f"eval/{name}", values)
    return meter.means(run.accelerator)


def _measured(run: Run, data: Any) -> dict[str, float]:
    parts, meter = math.ceil(len(data) / run.settings.batch_size), Meter()
    for part in range(parts):
        # Batches of one size, more or less: in a last one of one row nothing could be compared.
        rows = list(share(len(data), part, parts))
        mine = list(share(len(rows), run.accelerator.process_index, run.accelerator.num_processes))
        with agreed(run, "measuring the evaluation"):
            batch = run.studio.compare(data.batch(rows, mine), run.algorithm.needs)
        with agreed(run, "the preparation of a batch"):
            batch = run.algorithm.prepare(batch, run.score)
        sizes = run.updater.sizes(batch)
        with agreed(run, "measuring the evaluation"):
            loss, metrics = run.updater.measure(batch, sizes)
        # Every batch's loss is a mean over its rows already: it counts as often as it has rows.
        metrics.sums["loss"], metrics.counts["loss"] = loss.double() * len(rows), len(mine)
        meter.merge(metrics)
        for name, values in batch.metrics.items():
            meter.add(name, values)
    return {f"eval/{name}": value for name, value in meter.means(run.accelerator).items()}
