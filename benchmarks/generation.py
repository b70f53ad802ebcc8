"""Sampling by rlx against transformers' model.generate, side by side in one run.

    python benchmarks/generation.py [--threads 2] [--repeats 3] [--case playground …]

Both sides sample the same number of tokens: the random model's head makes each of them a stop token with the
same small probability, so that lengths are geometric; tokens per second count what the completions keep.
Writes benchmarks/results/generation.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

CASES = {  # name: (model, prompt lengths, completions a prompt, new tokens, mean length)
    "playground 64x4": ("playground", [16 + i % 13 for i in range(64)], 4, 24, 16),
    "tiny 4x8": ("tiny", [128, 128, 96, 64], 8, 96, 40),
    "tiny 32x1": ("tiny", [16 + 7 * i % 113 for i in range(32)], 1, 96, 40),
    "small 4x8": ("small", [128, 128, 96, 64], 8, 96, 40),
    "small 32x1": ("small", [16 + 7 * i % 113 for i in range(32)], 1, 96, 40),
}


def build(name):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    heads = dict(bos_token_id=None, eos_token_id=None, max_position_embeddings=1024)
    configs = {
        "playground": LlamaConfig(vocab_size=128, hidden_size=96, intermediate_size=256,
                                  num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                                  tie_word_embeddings=True, **heads),
        "tiny": LlamaConfig(vocab_size=16384, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                            num_attention_heads=8, num_key_value_heads=4,
                                  tie_word_embeddings=True, **heads),
        "small": Qwen2Config(vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
                             num_attention_heads=8, num_key_value_heads=8,
                             tie_word_embeddings=False, **heads),
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[name]).eval()


def sides(name):
    """Two functions that sample once and return how many tokens the completions have."""
    import torch

    from rlx.core.generation import generate
    from rlx.plugins.contract import Sampling

    model_name, lengths, n, new, mean = CASES[name]
    model = build(model_name)
    vocabulary = model.config.vocab_size
    # A random model's distribution is nearly flat, so a share 1/mean of the vocabulary ends a completion.
    stops = tuple(range(1, 1 + max(1, vocabulary // mean)))
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(vocabulary // 2, vocabulary, (k,), generator=generator).tolist() for k in lengths
    ]
    sampling = Sampling(new, stop_token_ids=stops)
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).repeat_interleave(n, 0)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).repeat_interleave(n, 0)

    def ours():
        done = generate(model, prompts, n, sampling, list(range(len(prompts))))
        return sum(map(len, done.ids))

    def theirs():
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0,
                             temperature=1.0, eos_token_id=list(stops), pad_token_id=0)  # fmt: skip
        return int((out[:, width:] != 0).sum())

    return ours, theirs


def measure(name, repeats):
    ours, theirs = sides(name)
    ours(), theirs()
    speeds = {ours: [], theirs: []}
    seconds = {ours: [], theirs: []}
    for _ in range(repeats):
        for side in (ours, theirs):  # A B A B: a slow moment of the machine meets both
            start = time.perf_counter()
            tokens = side()
            seconds[side].append(time.perf_counter() - start)
            speeds[side].append(tokens / seconds[side][-1])
    ratios = [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]
    numbers = [seconds[ours], speeds[ours], seconds[theirs], speeds[theirs], ratios]
    ours_s, ours_speed, theirs_s, theirs_speed, ratio = map(statistics.median, numbers)
    return f"| {name} | {ours_s:.3f} | {ours_speed:.0f} | {theirs_s:.3f} | {theirs_speed:.0f} | {ratio:.2f} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    lines = [
        "# Sampling: rlx against model.generate",
        "",
        f"{platform.machine()}, {options.threads} threads, float32, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, median of {options.repeats}. Case: prompts x completions each.",
        "",
        "| case | rlx s | rlx tokens/s | generate s | generate tokens/s | ratio of tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name in options.case:
        lines.append(measure(name, options.repeats))
        print(lines[-1], flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "generation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
