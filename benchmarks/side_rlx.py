"""One side of benchmarks/compare.py: a few steps of rlx, timed. Reads a job, writes a result, both JSON."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import workload

import rlx
from rlx.plugins.contract import Completions


class Replay:
    """A generator whose completions are known beforehand."""

    def generate(self, prompts, n, sampling, seeds):
        ids = [workload.replayed(prompt, place) for prompt in prompts for place in range(n)]
        return Completions(ids, None, [one[-1] == workload.END for one in ids])

    def sync(self, policy):
        """Nothing to take over."""

    def close(self):
        """Nothing to give back."""


class Steps:
    """Notes losses, ends of steps and phases."""

    def __init__(self):
        self.losses, self.phases, self.watch = [], [], None

    @rlx.hookimpl
    def on_loss(self, loss: float) -> None:
        self.losses.append(loss)

    @rlx.hookimpl
    def on_step_end(self, metrics: dict) -> None:
        self.watch.step()
        self.phases.append({name: value for name, value in metrics.items() if name.startswith("time/")})


def options(job, reward):
    """The run's options: those of the workload, and rlx's own defaults for the rest."""
    algo, folder = job["algo"], Path(job["folder"])
    given = {
        "algo": algo.removesuffix("_packed"),
        "model": str(folder / ("classifier" if algo == "reward" else "policy")),
        "dataset": workload.rows_for(algo, json.loads((folder / "rows.json").read_text())),
        "chat_template": "none",
        "batch_size": workload.batch_rows(algo),
        "max_steps": job["steps"],
        "shuffle": False,
        "seed": job.get("seed", 0),
        "learning_rate": workload.CHECK_RATE if job["check"] else workload.RATE,
        "logging_steps": 1,
        "adam_epsilon": 1e-5
        if job["check"]
        else 1e-8,  # no step of full size from a gradient of mere rounding
        "plots": False,
        "progress": "none",
        "mixed_precision": {"float32": "no", "bfloat16": "bf16"}[job["precision"]],
    }
    if algo == "sft_packed":
        given |= {"packing": True, "packing_strategy": "wrapped", "max_length": workload.PACKED}
    if algo in workload.GENERATIONS:
        given |= {
            "max_completion_length": workload.LONGEST,
            "temperature": 1.0,
            "log_completions": 0,
            "num_generations": workload.GENERATIONS[algo],
            "reward": [reward],
        }
    if algo == "ppo":
        given |= {"num_ppo_epochs": 1, "value_model": str(folder / "classifier")}
        given["reward"] = [{"name": "reward_model", "model": str(folder / "judge")}]
    if job["check"] and algo in workload.GENERATIONS:
        given["generator"] = Replay()
    return given | job.get("options", {})


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    reward, steps = workload.Parity(), Steps()
    sampled = []

    class Count:
        @rlx.hookimpl
        def on_rollouts(self, rollouts) -> None:
            sampled.append(int(rollouts.sequences.counts.sum()))

    with tempfile.TemporaryDirectory() as out:
        given = options(job, reward)
        run = rlx.prepare(**given, callback=[steps, Count()], output_dir=f"{out}/run")
        with run:
            steps.watch = workload.Watch()
            for _ in run:
                pass
            result = steps.watch.result()
    timed = steps.phases[1:]
    phases = {name: statistics.median(one.get(name, 0.0) for one in timed) for name in (timed or [{}])[-1]}
    result |= {"losses": steps.losses, "tokens": sampled[1:], "phases": phases}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
