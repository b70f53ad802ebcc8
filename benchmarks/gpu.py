"""What an accelerator is used for: sampling against its memory bandwidth, training against its FLOP/s.

    python benchmarks/gpu.py [--sizes 0.1B 0.5B 1.5B] [--bandwidth 4.8e12] [--peak-tflops 989]

Random Qwen2 models in bfloat16. Sampling: tokens a second of each generator, prefill and whatever it sets up
included, and the share of the bandwidth that reading the weights at each step, and each row's keys and
values, would take by itself. ``graphs`` keeps what it captured in a round before, whose time is told apart
(``first_seconds``). Training: forward and backward of a GRPO-shaped and a DPO-shaped batch; a pass is worth
6·N FLOP for each token that the trunk is fed (of the last layer only keys and values where no state is read)
and 6·V·H for each scored one, attention apart. Before all that, torch's varlen_attn is compared with plain
attention. Every cell is a process of its own with a time limit, and all of them together end within
``--seconds``; what was not reached is named.
Writes gpu.json and gpu.md into benchmarks/results. A try without GPU: ``--device cpu --sizes tiny``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

SIZES = {  # hidden, layers, heads, heads of keys, inner, vocabulary, one matrix for embedding and head
    "tiny": (64, 2, 4, 2, 172, 1000, True),
    "0.1B": (768, 12, 12, 4, 2048, 32_000, False),
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
}
GENERATORS = ("native", "graphs", "transformers", "paged")  # graphs: native with cuda_graphs
SHAPES = {"GRPO": (8, 8, 256, 256), "DPO": (16, 2, 256, 128)}  # groups, sequences of each, prompt, completion
CELL_SECONDS = 90  # for one process, its imports included


def build(size, device):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, layers, heads, pairs, inner, vocabulary, tied = SIZES[size]
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=pairs, intermediate_size=inner, max_position_embeddings=4096,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


def counts(size):
    """Numbers in the trunk, in the head, and of keys and values a token."""
    hidden, layers, heads, pairs, inner, vocabulary, _ = SIZES[size]
    width = hidden // heads
    layer = 2 * hidden * hidden + 2 * hidden * pairs * width + 3 * hidden * inner
    return {
        "trunk": layers * layer,
        "head": vocabulary * hidden,
        "cache": 2 * layers * pairs * width,
        # Of the last layer, what a token does without whose state is not read.
        "spared": 2 * hidden * hidden + 3 * hidden * inner,
    }


def bytes_read(size, rows, prompt, completion):
    """What decoding has to read at least: weights once a step, each row's keys and values so far."""
    numbers = counts(size)
    weights = completion * (numbers["trunk"] + numbers["head"])
    cache = rows * sum(prompt + step for step in range(completion)) * numbers["cache"]
    return 2 * (weights + cache)


def wait(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def peak(device):
    """Bytes: allocated on the GPU at most, or resident in memory."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sample(size, name, options):
    """Seconds and tokens of sampling with one generator, a line for each number of rows."""
    import torch

    from rlx.core.cuda_graphs import GraphGenerator
    from rlx.core.generation import generate
    from rlx.core.paged_generation import generate_paged
    from rlx.plugins.contract import Sampling

    model = build(size, options.device)
    draw = torch.Generator().manual_seed(0)
    limits = {"max_memory_percent": 0.8, "page_size": 256}
    graphs = GraphGenerator(captured=options.device == "cuda")  # elsewhere the same steps, one by one

    def run(rows, tokens):
        n = min(8, rows)
        prompts = torch.randint(SIZES[size][5], (rows // n, options.prompt), generator=draw).tolist()
        sampling, seeds = Sampling(tokens, batch_size=rows), list(range(len(prompts)))
        if name == "paged":
            return generate_paged(model, prompts, n, sampling, seeds, limits)
        if name == "graphs":
            return graphs.generate(model, prompts, n, sampling, seeds, batch_size=rows)
        plain = name == "transformers"
        return generate(model, prompts, n, sampling, seeds, batch_size=rows, plain=plain)

    for rows in options.batches:
        start = time.perf_counter()
        run(rows, options.completion if name == "graphs" else 4)
        wait(options.device)
        first, start = time.perf_counter() - start, time.perf_counter()
        done = run(rows, options.completion)
        wait(options.device)
        seconds, tokens = time.perf_counter() - start, sum(map(len, done.ids))
        needed = bytes_read(size, rows, options.prompt, options.completion)
        yield {
            "rows": rows,
            "seconds": seconds,
            "first_seconds": first,
            "replayed": name == "graphs" and graphs.graphs is not None,
            "tokens_per_second": tokens / seconds,
            "bandwidth_share": needed / seconds / options.bandwidth,
            "attention": model.config._attn_implementation,
        }


def sequences_of(shape, vocabulary, device):
    """Prompts and completions of one length each, in groups."""
    import torch

    from rlx.core.batch import Sequences

    groups, each, prompt, completion = shape
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (groups, prompt), generator=draw).tolist()
    completions = torch.randint(vocabulary, (groups * each, completion), generator=draw).tolist()
    owners = [group for group in range(groups) for _ in range(each)]
    return Sequences.from_lists([prompts[i] for i in owners], completions, owners).to(device)


def train(size, options):
    """Seconds, tokens and memory of a forward and backward pass, a line for each shape of a batch."""
    import torch
    from sharing import step

    from rlx.core.probe import trunk_of
    from rlx.core.sharing import share

    model = build(size, options.device).train()
    refused = share(trunk_of(model))  # then batches are padded
    numbers = counts(size)
    for name, (groups, each, prompt, completion) in SHAPES.items():
        # Shorter where sampling is, so that a try is short.
        shape = (groups, each, min(prompt, 2 * options.prompt), min(completion, options.completion))
        sequences, seconds = sequences_of(shape, SIZES[size][5], options.device), []
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for turn in range(options.runs + 1):
            wait(options.device)
            start = time.perf_counter()
            fed = step(model, sequences, options.budget)
            wait(options.device)
            if turn:  # the first one warms up
                seconds.append(time.perf_counter() - start)
        middle, scored = statistics.median(seconds), groups * each * shape[3]
        unread = 0 if refused else fed - scored
        flop = 6 * (numbers["trunk"] * fed - numbers["spared"] * unread + numbers["head"] * scored)
        yield {
            "shape": name,
            "layout": f"padded: {refused}" if refused else "shared",
            "seconds": middle,
            "tokens_fed": fed,
            "tokens_per_second": groups * each * (shape[2] + shape[3]) / middle,
            "mfu": flop / middle / (options.peak_tflops * 1e12),
            "peak_bytes": peak(options.device),
        }


def check(size, options):
    """How far torch's varlen_attn is from plain attention with a mask, for a size's heads."""
    import torch

    from rlx.core import varlen

    hidden, _, heads, pairs, *_ = SIZES[size]
    if options.device != "cuda":
        yield {"varlen": "not on a CPU"}
        return
    width, device = hidden // heads, torch.device("cuda", torch.cuda.current_device())
    arguments = (device, torch.bfloat16, heads, pairs, width, width)
    for window in (0, 3):
        yield {"window": window, "varlen": varlen.deviation(*arguments, window), "most": varlen.TOLERANCE}


def cell(size, work, options):
    """Run a cell in this process, printing a line of JSON as soon as there is one."""
    import torch

    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    works = {"check": check, "train": train}
    lines = works[work](size, options) if work in works else sample(size, work, options)
    for line in lines:
        print(json.dumps(line), flush=True)


def measure(size, work, given, limit):
    """The lines of a cell's process, and one that says why if there are no more."""
    command = [sys.executable, __file__, "--cell", size, work, *given]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        out, failed = done.stdout, done.returncode
        told = (done.stderr.strip().splitlines() or ["it died"])[-1] if failed else ""
    except subprocess.TimeoutExpired as error:
        out, told = (error.stdout or b"").decode(), f"longer than {limit:.0f} s"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    lines += [{"failed": told[:200]}] if told else []
    return [{"size": size, "work": work, **line} for line in lines]


def table(results, options, device):
    """What was found, as markdown."""
    out = [
        "# One accelerator",
        "",
        f"{date.today()}, {device}, torch {options.torch}; random Qwen2 in bfloat16. Sampling: prompts of "
        f"{options.prompt} tokens, 8 completions of {options.completion} tokens each. Shares are of "
        f"{options.bandwidth:.3g} B/s and {options.peak_tflops:g} TFLOP/s; what is counted: the head of "
        "benchmarks/gpu.py.",
        "",
        "| model | generator | rows | tokens/s | bandwidth |",
        "|---|---|---|---|---|",
    ]
    for one in results:
        if "rows" in one:
            out.append(
                f"| {one['size']} | {one['work']} | {one['rows']} | {one['tokens_per_second']:.0f} | "
                f"{one['bandwidth_share']:.1%} |"
            )
    out += [
        "",
        "| model | batch | layout | tokens/s | through the trunk | MFU | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        if "shape" in one:
            out.append(
                f"| {one['size']} | {one['shape']} | {one['layout']} | {one['tokens_per_second']:.0f} | "
                f"{one['tokens_fed']} | "
                f"{one['mfu']:.1%} | {one['peak_bytes'] / 1e9:.2f} |"
            )
    rest = [one for one in results if "varlen" in one or "failed" in one]
    out += ["", *(f"* {one['size']}, {one['work']}: {_told(one)}" for one in rest)]
    return "\n".join(out) + "\n"


def _told(one):
    if "failed" in one:
        return one["failed"]
    if "window" not in one:
        return f"varlen_attn: {one['varlen']}"
    return f"varlen_attn, window {one['window']}: {one['varlen']:.2g} from plain attention (≤ {one['most']})"


def parsed():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.1B", "0.5B", "1.5B"])
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second; an H200's")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16; an H200's")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256], help="rows that are sampled")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a micro-batch")
    parser.add_argument("--runs", type=int, default=3, help="passes of training, the median counts")
    parser.add_argument("--seconds", type=float, default=420, help="for all cells together")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to write to")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    import torch

    options = parsed()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.cell:
        cell(*options.cell, options)
        return
    given = ["--device", options.device, "--batches", *map(str, options.batches)]
    for name in ("bandwidth", "peak-tflops", "prompt", "completion", "budget", "runs", "threads"):
        given += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    start, results = time.perf_counter(), []
    for work in ("check", "train", *GENERATORS):
        for size in options.sizes:
            left = options.seconds - (time.perf_counter() - start)
            found = [{"size": size, "work": work, "failed": "no time was left"}]
            if left > 0:
                found = measure(size, work, given, min(CELL_SECONDS, left))
            results += found
            for line in found:
                print(json.dumps(line), flush=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({platform.machine()})"
    options.torch = torch.__version__
    options.results.mkdir(parents=True, exist_ok=True)
    facts = {"device": device, "torch": torch.__version__, "cores": os.cpu_count(), "results": results}
    (options.results / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
    text = table(results, options, device)
    (options.results / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
