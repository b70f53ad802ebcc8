"""An update of GRPO with and without the completions that have no gradient, side by side.

Four prompts with eight completions each on the models of ``workload``; in some groups all rewards are equal.
Both ways take turns in one process on the same batch, and CPU time is counted, so that a noisy machine slows
both; the table gives medians, the median ratio of neighbours, and tokens that went through the trunk.
Run: ``python benchmarks/idle.py`` (writes benchmarks/results/idle.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import side_rlx
import torch
import workload

import rlx
from rlx.core.probe import trunk_of


def prepared(size: str, folder: str) -> tuple[Any, Any]:
    """A run of GRPO with known completions, and its first batch."""
    workload.write(f"{folder}/{size}", size, steps=1)
    rows = workload.rows_for("grpo", json.loads(Path(folder, size, "rows.json").read_text()))
    run = rlx.prepare(
        algo="grpo", model=f"{folder}/{size}/policy", dataset=rows, reward=workload.Parity(), beta=0.0,
        generator=side_rlx.Replay(), batch_size=4, num_generations=8, max_completion_length=workload.LONGEST,
        chat_template="none", learning_rate=workload.RATE, warmup_steps=0, max_steps=1, mixed_precision="no",
        plots=False, progress="none", log_completions=0, output_dir=f"{folder}/run-{size}",
    )  # fmt: skip
    return run, run.prepare(run.roll_out())


def measure(run: Any, batch: Any, runs: int) -> dict[str, dict[str, Any]]:
    """CPU seconds and tokens of an update, all rows fed or only those with a gradient."""
    idle, fed = run.algorithm.idle, []
    ways = {"all": lambda batch: None, "active": idle}
    trunk_of(run.policy.model).register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found: dict[str, dict[str, Any]] = {way: {"seconds": []} for way in ways}
    for turn in range(runs + 1):
        for way, asked in ways.items():
            run.algorithm.idle = asked
            fed.clear()
            start = time.process_time()
            run.updater(batch)
            if turn:  # the first one warms up
                found[way]["seconds"].append(time.process_time() - start)
            found[way]["tokens"] = sum(fed)
    del run.algorithm.idle
    return found


def main() -> None:
    """Measure every share of idle groups, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="updates of each way")
    parser.add_argument("--size", choices=list(workload.VOCABULARY), action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# An update of GRPO, all completions fed and only those with a gradient",
        "",
        "Random Qwen2 in float32: small is 56M parameters, tiny 0.2M; 4 prompts × 8 completions.",
        f"{date.today()}, {platform.machine()}, 1 thread, torch {torch.__version__};",
        f"{arguments.runs} updates of each way, optimizer step included.",
        "",
        "| model | idle groups | tokens all | active | CPU s all | active | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.size or workload.VOCABULARY:
            run, batch = prepared(size, folder)
            owners = torch.repeat_interleave(batch.sequences.groups, batch.sequences.counts)
            for groups in (0, 1, 2, 3, 4):
                flat = replace(batch, advantages=batch.advantages * (owners >= groups))
                found = measure(run, flat, arguments.runs * (1 if size == "small" else 6))
                every, active = found["all"], found["active"]
                medians = [statistics.median(one["seconds"]) for one in (every, active)]
                pairs = zip(every["seconds"], active["seconds"], strict=True)
                lines.append(
                    f"| {size} | {groups} of 4 | {every['tokens']} | {active['tokens']} "
                    f"| {medians[0]:.3f} | {medians[1]:.3f} "
                    f"| {statistics.median(a / b for a, b in pairs):.2f}× |"
                )
                print(lines[-1], flush=True)
            run.close()
    lines.append(f"\nLoad average {os.getloadavg()[0]:.1f} at the end.")
    target = Path(__file__).parent / "results" / "idle.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
