"""What a step of benchmarks/compare.py has to take on this machine whatever computes it, and its goodput.

A product of large matrices gives the machine's FLOP/s, one of a matrix and a vector its bandwidth. With N
numbers in the trunk, V·H in the head, P prompt tokens (one that several sequences share counted once) and C
completion tokens of a step: training takes 6·N a token and 6·V·H a scored one, a model that only measures 2·N
and 2·V·H; sampling takes 2·N a token of prompt or completion and 2·V·H a completion token, or the time to
read all weights once for each token of the longest completion, whichever is more. Of a token whose state
nobody reads, as of a prompt's, only keys and values of the last layer are needed, and its N is so much less.
Attention, softmax, optimizer and everything else count as nothing, so no step reaches it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import workload

BYTES = {"float32": 4, "bfloat16": 2}
# How often a step goes through the trunk, and through the head, training (6 FLOP) or measuring (2 FLOP).
TRAINED, MEASURED = 6, 2
PASSES = {
    "dpo": (TRAINED + MEASURED, TRAINED + MEASURED),
    "kto": (TRAINED + MEASURED, TRAINED + MEASURED),
    "orpo": (TRAINED, TRAINED),
    "sft": (TRAINED, TRAINED),
    "sft_packed": (TRAINED, TRAINED),
    "reward": (TRAINED, 0),
    "grpo": (TRAINED, TRAINED),
    "rloo": (TRAINED + MEASURED, TRAINED + MEASURED),
    "ppo": (2 * (TRAINED + MEASURED), TRAINED + MEASURED),  # policy, reference; values now and when sampled
}


def rates(threads, precision):
    """FLOP/s and bytes a second of this machine, the best of some tries in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, str(threads), precision], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def numbers(size):
    """Numbers in the trunk and in the head."""
    shape = workload.SHAPES[size]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    layer = 4 * hidden**2 + 3 * hidden * inner  # as many heads of keys as of queries
    return shape["num_hidden_layers"] * layer, workload.VOCABULARY[size] * hidden


def spared(size):
    """Numbers of the last layer that a token whose state is not read does without: not keys and values."""
    shape = workload.SHAPES[size]
    return 2 * shape["hidden_size"] ** 2 + 3 * shape["hidden_size"] * shape["intermediate_size"]


def offline_tokens(algo, rows, steps):
    """Prompt and completion tokens of the median step but the first: a letter is a token, an end follows."""
    size = workload.batch_rows(algo)
    found = []
    packed = algo == "sft_packed"
    for step in range(1, 1 + steps):
        batch = workload.rows_for(algo, rows if packed else rows[step * size : (step + 1) * size])
        completions = [
            row[name] for row in batch for name in ("chosen", "rejected", "completion") if name in row
        ]
        prompts = sum(len(row["prompt"]) for row in batch)
        found.append((prompts, sum(len(text) + 1 for text in completions)))
    if packed:  # full rows, cut from all documents one after another
        share = found[0][1] / sum(found[0])
        return round((1 - share) * size * workload.PACKED), round(share * size * workload.PACKED)
    return sorted(found)[len(found) // 2]


def seconds(algo, size, prompts, completions, found, precision):
    """The least that a step can take: prompt tokens, completion tokens, what ``rates`` found."""
    trunk, head = numbers(size)
    through_trunk, through_head = PASSES[algo]
    scored = completions + (prompts if algo == "orpo" else 0)  # its likelihood is that of the prompt too
    read = 2 * workload.batch_rows(algo) if algo == "reward" else scored  # there the last one of each
    unread = prompts + completions - read
    flop = through_trunk * (trunk * (prompts + completions) - spared(size) * unread)
    flop += through_head * head * scored
    if algo == "kto":  # each prompt with the completion of another row, measured by both models
        flop += 2 * MEASURED * (trunk + head) * completions
    time = flop / found["flop"]
    if algo in workload.GENERATIONS:
        computed = MEASURED * (trunk + head) * completions / found["flop"]
        reading = workload.LONGEST * (trunk + head) * BYTES[precision] / found["bytes"]
        prefill = MEASURED * (trunk - spared(size)) * prompts
        time += prefill / found["flop"] + max(computed, reading)
    return time


def _best(call, tries=7):
    call()
    spent = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)


def _measure(threads, precision):
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, precision)
    square = torch.randn(2048, 2048).to(dtype)
    flop = 2 * 2048**3 / _best(lambda: square @ square)
    tall = torch.randn(80_000, 512).to(dtype)  # 164 MB in float32: more than the caches hold
    vector = torch.randn(512).to(dtype)
    size = tall.numel() * tall.element_size()
    return {"flop": flop, "bytes": size / _best(lambda: tall @ vector)}


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), sys.argv[2])))
