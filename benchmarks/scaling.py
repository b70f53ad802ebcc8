"""How time and memory of one training pass, and of sampling, grow with the sizes of a batch.

    python benchmarks/scaling.py [--threads 2]

One size varies at a time: prompt length, completion length, completions a prompt, vocabulary, prompts a
batch. Every point is a process of its own, the median of three passes. Dashed is what the formula says:

* seconds of a training pass: a + b · FLOP, three times those of a forward pass, which has 2·N for each token
  of the trunk (a prompt once for all its completions, of the last layer only its keys and values), 2·V·H for
  each scored one, and 4·H for each query and key of a layer;
* seconds of sampling: c · steps + d · FLOP, those of a forward pass;
* bytes: what rlx/core/memory.py estimates before a run: gradients, activations and logits; weights laid out,
  cache and logits.

a to d are two numbers for training and two for sampling, fitted once over all points of all curves.
Writes benchmarks/results/scaling.json and scaling.md, and docs/images/scaling.png.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

BASE = {"prompt": 64, "completion": 64, "k": 4, "vocabulary": 8000, "prompts": 4}
CURVES = {
    "prompt": (16, 64, 128, 256, 512),
    "completion": (16, 64, 128, 256),
    "k": (1, 2, 4, 8, 16),
    "vocabulary": (1000, 4000, 16000, 64000),
    "prompts": (1, 2, 4, 8, 16),
}
HIDDEN, LAYERS, INNER = 256, 4, 704
MEASURES = (("train", "seconds"), ("train", "bytes"), ("sample", "seconds"), ("sample", "bytes"))


def build(vocabulary):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=INNER,
                    num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
                    max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
                    eos_token_id=None)
    )  # fmt: skip


def flop(point):
    """FLOP of a training pass, and of sampling."""
    n, k, p, c = (point[name] for name in ("prompts", "k", "prompt", "completion"))
    trunk = 2 * LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    head = 2 * point["vocabulary"] * HIDDEN
    seen = n * p * (p + 1) / 2 + n * k * (c * p + c * (c + 1) / 2)  # pairs of query and key
    forward = trunk * (n * p + n * k * c) + head * n * k * c + 4 * HIDDEN * LAYERS * seen
    unread = 2 * (2 * HIDDEN**2 + 3 * HIDDEN * INNER) * n * p  # of the last layer all but keys and values
    return {"train": 3 * (forward - unread), "sample": forward}


def expected_bytes(model, point):
    """What rlx estimates: of a training pass beside the weights, and of sampling."""
    import torch

    from rlx.core import memory
    from rlx.core.lm_head import free_bytes
    from rlx.core.packed_linear import copies_bytes

    rows, cpu = point["prompts"] * point["k"], torch.device("cpu")
    scored = rows * point["completion"]
    tokens = point["prompts"] * point["prompt"] + scored
    gradients = sum(4 * p.numel() for p in model.parameters())
    logits = memory.logits_bytes(model, scored, free_bytes(cpu))
    cache = memory.kv_cache_bytes(model.config, rows, point["prompt"] + point["completion"], torch.float32)
    return {
        "train": gradients + memory.activation_bytes(model, tokens) + logits,
        "sample": copies_bytes(model, torch.float32) + 2 * cache + 6 * 4 * rows * point["vocabulary"],
    }


def measure(point):
    """Seconds and peak bytes of a training pass, and of sampling, in this process."""
    import torch
    from workload import Watch

    from rlx.core.batch import Sequences
    from rlx.core.generation import generate
    from rlx.core.logprobs import score
    from rlx.core.probe import trunk_of
    from rlx.core.sharing import share
    from rlx.plugins.contract import Sampling

    model, n, k = build(point["vocabulary"]), point["prompts"], point["k"]
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(point["vocabulary"], (n, point["prompt"]), generator=draw).tolist()
    answers = torch.randint(point["vocabulary"], (n * k, point["completion"]), generator=draw).tolist()
    each = [i for i in range(n) for _ in range(k)]
    sequences = Sequences.from_lists([prompts[i] for i in each], answers, each)
    parameters = list(model.parameters())
    if reason := share(trunk_of(model)):
        raise SystemExit(f"prompts are not shared: {reason}")

    def train():
        torch.autograd.grad(score(model, sequences).logps.sum(), parameters)

    def sample():
        with torch.no_grad():
            generate(model, prompts, k, Sampling(point["completion"]), list(range(n)))

    found, bytes_expected, counts = {}, expected_bytes(model, point), flop(point)
    for name, work in (("train", train), ("sample", sample)):
        model.train(name == "train")
        work()
        ctypes.CDLL(None).malloc_trim(0)  # or what the last pass has freed would hide what this one takes
        watch, seconds = Watch(), []
        for _ in range(3):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        found[name] = {"seconds": statistics.median(seconds), "bytes": watch.result()["peak_bytes"],
                       "flop": counts[name], "expected": {"bytes": bytes_expected[name]}}  # fmt: skip
    return found


def fit(curves):
    """Put into every point what the two-number formulas say of its seconds; the numbers themselves."""
    import numpy

    every, numbers = [one for points in curves.values() for one in points], {}
    for name in ("train", "sample"):
        fixed = [1.0 if name == "train" else one["point"]["completion"] for one in every]
        terms = numpy.array([fixed, [one[name]["flop"] for one in every]]).T
        seconds = numpy.array([one[name]["seconds"] for one in every])
        # Relative errors: a slow point counts no more than a fast one.
        numbers[name] = numpy.linalg.lstsq(terms / seconds[:, None], numpy.ones(len(every)), rcond=None)[0]
        for one, said in zip(every, terms @ numbers[name], strict=True):
            one[name]["expected"]["seconds"] = float(said)
    return numbers


def plot(curves, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(len(MEASURES), len(curves), figsize=(3.4 * len(curves), 11), squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        sizes = [one["point"][name] for one in points]
        for row, (work, unit) in enumerate(MEASURES):
            axis, scale = axes[row][column], 1e6 if unit == "bytes" else 1
            axis.plot(sizes, [one[work][unit] / scale for one in points], "o-", label="measured")
            axis.plot(sizes, [one[work]["expected"][unit] / scale for one in points], "--", label="formula")
            axis.set(xscale="log", yscale="log", xlabel=name)
            axis.set_title(f"{work}, {'MB' if unit == 'bytes' else 's'}")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_locator(ticker.NullLocator())
            axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--curve", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(measure(json.loads(options.point))))
        return
    curves = {}
    for name in options.curve:
        for size in CURVES[name]:
            point = BASE | {name: size}
            command = [
                sys.executable,
                __file__,
                "--point",
                json.dumps(point),
                "--threads",
                str(options.threads),
            ]
            env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
            found = json.loads(done.stdout.splitlines()[-1])
            curves.setdefault(name, []).append({"point": point, **found})
            print(name, size, found, flush=True)
    numbers, results = fit(curves), HERE / "results"
    (results / "scaling.json").write_text(json.dumps(curves, indent=1) + "\n")
    (results / "scaling.md").write_text(report(curves, numbers, options.threads))
    plot(curves, HERE.parent / "docs" / "images" / "scaling.png")


def report(curves, numbers, threads):
    (a, b), (c, d) = numbers["train"], numbers["sample"]
    lines = [
        "# How time and memory grow",
        "",
        f"{threads} threads; method and formulas: the head of benchmarks/scaling.py. Fitted: a training pass "
        f"{1e3 * a:.0f} ms and {1e-9 / b:.0f} GFLOP/s, sampling {1e3 * c:.1f} ms a step and "
        f"{1e-9 / d:.0f} GFLOP/s. Each cell: from the smallest to the largest size, measured (formula).",
        "",
        "| size | from | to | train s | train MB | sample s | sample MB |",
        "|" + "---|" * 7,
    ]
    for name, points in curves.items():
        cells = [name, str(points[0]["point"][name]), str(points[-1]["point"][name])]
        for work, unit in MEASURES:
            scale, digits = (1e6, 0) if unit == "bytes" else (1, 2)
            first, last = (
                f"{one[work][unit] / scale:.{digits}f} ({one[work]['expected'][unit] / scale:.{digits}f})"
                for one in (points[0], points[-1])
            )
            cells.append(f"{first} → {last}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
