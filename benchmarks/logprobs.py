"""Log-probs of scored positions: the output head forward and backward, four ways, side by side.

Each way runs in fresh processes, one after another in turns; the table gives the median time and the peak of
memory above the inputs. Run: ``python benchmarks/logprobs.py`` (writes benchmarks/results/logprobs.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from rlx.core.lm_head import head_logps

POSITIONS, SCORED, VOCABULARY, HIDDEN = 2048, 683, 32_000, 512


def naive_full(hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Logits and log_softmax of every position, then the scored ones."""
    logps = torch.log_softmax((hidden @ weight.t()).float(), -1)
    return logps.gather(1, targets[:, None]).squeeze(1)[scored]


def scored_full(hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Logits and log_softmax of the scored positions, all at once."""
    logps = torch.log_softmax((hidden[scored] @ weight.t()).float(), -1)
    return logps.gather(1, targets[scored, None]).squeeze(1)


def ours_keep(hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Chunks of scored positions, logits kept for the backward pass."""
    return head_logps(hidden[scored], weight, None, targets[scored], keep=True)[0]


def ours_recompute(hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Chunks of scored positions, logits computed again in the backward pass."""
    return head_logps(hidden[scored], weight, None, targets[scored], keep=False)[0]


WAYS: dict[str, Callable[..., Tensor]] = {
    "naive: log_softmax of every position": naive_full,
    "log_softmax of scored positions": scored_full,
    "head_logps, logits kept": ours_keep,
    "head_logps, logits computed again": ours_recompute,
}


class PeakMemory:
    """Resident bytes above those at entry, sampled every millisecond."""

    def __enter__(self) -> PeakMemory:
        self.process, self.stop = psutil.Process(), threading.Event()
        self.start = self.top = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Sample until told to stop."""
        while not self.stop.wait(0.001):
            self.top = max(self.top, self.process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self.peak = self.top - self.start


def measure(way: str, threads: int, seed: int = 0) -> dict[str, float]:
    """Seconds (median of three, after one warm-up) and peak bytes of one way, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    hidden = torch.randn(POSITIONS, HIDDEN, requires_grad=True)
    weight = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_()
    targets, scored = torch.randint(VOCABULARY, (POSITIONS,)), torch.arange(POSITIONS) % 3 == 0

    def step() -> None:
        torch.autograd.grad(WAYS[way](hidden, weight, targets, scored).sum(), (hidden, weight))

    torch.autograd.grad((hidden[:8] @ weight.t()).sum(), (hidden, weight))  # sets up thread pools
    with PeakMemory() as memory:
        step()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": float(memory.peak)}


def main() -> None:
    """Measure every way, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=list(WAYS), help="measure this one in this process and print JSON")
    parser.add_argument("--runs", type=int, default=5, help="fresh processes a way")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.threads)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.runs):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--threads", str(arguments.threads)]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    table = render(found, arguments.threads)
    print(table)
    target = Path(__file__).parent / "results" / "logprobs.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(table)


def render(found: dict[str, list[dict[str, float]]], threads: int) -> str:
    """The table as Markdown, with ratios to the first way."""
    median = {
        way: (
            statistics.median(run["seconds"] for run in runs),
            statistics.median(run["bytes"] for run in runs),
        )
        for way, runs in found.items()
    }
    base_seconds, base_bytes = next(iter(median.values()))
    gradient = VOCABULARY * HIDDEN * 4 / 1e6
    lines = [
        "# Log-probs at scored positions, forward and backward",
        "",
        f"{POSITIONS} positions, {SCORED} scored, vocabulary {VOCABULARY}, hidden {HIDDEN}, float32;",
        "gradients of hidden states and weight.",
        f"{platform.machine()}, {threads} threads, torch {torch.__version__}.",
        f"Median of {len(next(iter(found.values())))} fresh processes a way, taken in turns;",
        f"load average {os.getloadavg()[0]:.1f} at the end. Memory is the peak of resident bytes",
        f"above the inputs; the weight's gradient ({gradient:.0f} MB) is in it.",
        "",
        "| way | seconds | faster | peak MB | less |",
        "|---|---|---|---|---|",
    ]
    for way, (seconds, size) in median.items():
        ratios = base_seconds / seconds, base_bytes / size
        lines.append(f"| {way} | {seconds:.2f} | {ratios[0]:.1f}× | {size / 1e6:.0f} | {ratios[1]:.1f}× |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
