"""A training step's forward and backward with and without sharing of prompts, side by side.

Padded and shared steps take turns in one process on the same model and batch, and CPU time is counted, so
that a noisy machine slows both; the table gives medians, the median ratio of neighbours, tokens that went
through the trunk, and, from fresh processes, the peak of memory above the model and its gradients.
Run: ``python benchmarks/sharing.py`` (writes benchmarks/results/sharing.md).
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlx.core.batch import Sequences
from rlx.core.logprobs import score, trunk_for
from rlx.core.probe import trunk_of
from rlx.core.sharing import share, stop_sharing
from rlx.core.states import micro_batches

SIZES = {"small": (512, 8, 8, 1536, 32_000), "tiny": (64, 2, 4, 192, 1_000)}
CASES = {  # groups, sequences of each, longest prompt, longest completion
    "GRPO, 4 prompts × 8": (4, 8, 128, 96),
    "DPO, 8 pairs": (8, 2, 128, 96),
    "PPO, 32 prompts × 1": (32, 1, 128, 96),
    "short: 8 prompts × 4": (8, 4, 24, 12),
}


WAYS: dict[str, Callable[..., Any]] = {"padded": stop_sharing, "shared": share}


def build(size: str) -> Any:
    """A random Qwen2, untied."""
    hidden, layers, heads, inner, vocabulary = SIZES[size]
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, intermediate_size=inner, tie_word_embeddings=False,
        )
    ).train()  # fmt: skip


def batch(case: str, vocabulary: int) -> Sequences:
    """Prompts of 16 tokens (8 where they are short) and more, completions of geometric length."""
    groups, each, prompt, completion = CASES[case]
    random = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(vocabulary, (n,), generator=random).tolist()  # noqa: E731
    prompts, completions, numbers = [], [], []
    for group in range(groups):
        begin = draw(int(torch.randint(prompt // 8, prompt + 1, (1,), generator=random)))
        for _ in range(each):
            length = torch.empty(1).geometric_(2 / completion, generator=random)
            prompts.append(begin)
            completions.append(draw(min(completion, int(length))))
            numbers.append(group)
    return Sequences.from_lists(prompts, completions, numbers)


def step(model: Any, sequences: Sequences, budget: int) -> int:
    """Forward and backward in micro-batches; tokens that the trunk was fed."""
    fed: list[int] = []
    trunk = trunk_of(model)
    hook = trunk.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model.zero_grad(set_to_none=False)
    for rows in micro_batches([trunk_for(model, sequences)], sequences, budget):
        score(model, sequences.take(rows)).logps.sum().backward()
    hook.remove()
    return sum(fed)


def measure(size: str, case: str, runs: int, budget: int) -> dict[str, Any]:
    """Seconds of this process's CPU time, peak bytes and tokens of both ways."""
    model = build(size)
    trunk, sequences = trunk_of(model), batch(case, SIZES[size][-1])
    found: dict[str, Any] = {
        way: {"seconds": [], "bytes": peak(size, case, way, budget) if size == "small" else 0} for way in WAYS
    }
    for run in range(runs + 1):
        for way, turn in WAYS.items():
            turn(trunk)
            start = time.process_time()
            found[way]["tokens"] = step(model, sequences, budget)
            if run:  # the first one warms up
                found[way]["seconds"].append(time.process_time() - start)
    return found


def peak(size: str, case: str, way: str, budget: int) -> int:
    """Bytes above the model and its gradients that a step of one way takes, in a fresh process."""
    command = [sys.executable, __file__, "--peak", size, case, way, "--threads", "1", "--budget", str(budget)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_peak(size: str, case: str, way: str, budget: int) -> int:
    """The same in this process."""
    model = build(size)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    WAYS[way](trunk_of(model))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(model, batch(case, SIZES[size][-1]), budget)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    """Measure every case, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="steps of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--peak", nargs=3, help="print the peak bytes of this size, case and way")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(own_peak(*arguments.peak, arguments.budget))
        return
    lines = [
        "# Forward and backward of one mini-batch, padded and shared",
        "",
        "Random Qwen2 in float32: small is 56M parameters, tiny 0.2M.",
        f"{date.today()}, {platform.machine()},",
        f"{arguments.threads} threads, torch {torch.__version__}; {arguments.runs} steps of each way,",
        f"micro-batches of {arguments.budget} tokens. Padded is sorted by length.",
        "",
        "| model | batch | tokens padded | shared | CPU s padded | shared | faster | MB padded | shared |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in arguments.size or SIZES:
        for case in CASES:
            found = measure(size, case, arguments.runs * (1 if size == "small" else 4), arguments.budget)
            padded, shared = found["padded"], found["shared"]
            ratio = statistics.median(
                a / b for a, b in zip(padded["seconds"], shared["seconds"], strict=True)
            )
            lines.append(
                f"| {size} | {case} | {padded['tokens']} | {shared['tokens']} "
                f"| {statistics.median(padded['seconds']):.3f} | {statistics.median(shared['seconds']):.3f} "
                f"| {ratio:.2f}× | {padded['bytes'] / 1e6:.0f} "
                f"| {shared['bytes'] / 1e6:.0f} |"
            )
            print(lines[-1], flush=True)
    lines.append(f"\nLoad average {os.getloadavg()[0]:.1f} at the end.")
    print("\n".join(lines))
    target = Path(__file__).parent / "results" / "sharing.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
