"""What both sides of benchmarks/compare.py train: one random model, one tokenizer, one set of rows.

Knows neither rlx nor its peer, and runs in the environment of either.

A letter is a token, so that a text has the same tokens wherever it is cut. One dimension of
the model's hidden states is the same at every position, and the end token's row of the head reads that one
alone: sampling then ends each completion with the same small probability, and lengths are geometric.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

VOCABULARY = {"tiny": 1000, "small": 32000}
SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=4),
    "small": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                  num_key_value_heads=8),
}  # fmt: skip
LONGEST, MEAN = 96, 40  # tokens of a completion
PACKED = 512  # tokens of a packed row
PROMPT = (16, 128)  # tokens of a prompt
END, PAD = 256, 257
ROWS = {
    "dpo": 8,
    "kto": 8,
    "orpo": 8,
    "reward": 8,
    "sft": 8,
    "sft_packed": 8,
    "grpo": 4,
    "rloo": 4,
    "ppo": 32,
}
GENERATIONS = {"grpo": 8, "rloo": 8, "ppo": 1}
RATE, CHECK_RATE = 1e-9, 1e-4  # the first: lengths of samples must not drift


def tokenizer(size):
    """Bytes, the special tokens that any Qwen2 tokenizer has, and fillers up to the model's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<{i}>" for i in range(END + 2, VOCABULARY[size])]
    words = [*alphabet, "<|im_end|>", "<|endoftext|>", *fillers]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def config(size, vocabulary=None, **more):
    """Random Qwen2 models: tiny has 0.22M parameters, small 56M."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocabulary or VOCABULARY[size],
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        **SHAPES[size],
        **more,
    )


def steady(model):
    """Makes the first hidden dimension the same everywhere, and the end token's logit depend on it alone."""
    import torch

    trunk, width = model.model, model.config.hidden_size
    with torch.no_grad():
        trunk.embed_tokens.weight[:, 0] = 0.02
        for layer in trunk.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        head = model.lm_head.weight
        head[:, 0] = 0
        ids = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
        hidden = trunk(input_ids=ids).last_hidden_state.reshape(-1, width)
        head[END] = 0
        others = (hidden @ head.T).logsumexp(-1).mean()
        head[END, 0] = (others - torch.tensor(MEAN - 1.0).log()) / hidden[:, 0].mean()


def write(folder, size, steps):
    """Policy, classifier, a small classifier as reward, and rows, under folder; nothing if they are there."""
    import torch
    from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

    folder = Path(folder)
    if (folder / "rows.json").exists():
        return
    words = tokenizer(size)
    models = {
        "policy": (Qwen2ForCausalLM, config(size)),
        "classifier": (Qwen2ForSequenceClassification, config(size, num_labels=1)),
        "judge": (Qwen2ForSequenceClassification, config("tiny", VOCABULARY[size], num_labels=1)),
    }
    for name, (kind, settings) in models.items():
        torch.manual_seed(0)
        model = kind(settings)
        if name == "policy":
            steady(model)
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    (folder / "rows.json").write_text(json.dumps(rows(steps)))


def rows(steps):
    """Rows of every kind, enough for so many steps of 32."""
    draw = random.Random(0)

    def text(count):
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=count))

    def completion():
        length = 1
        while length < LONGEST - 1 and draw.random() > 1 / MEAN:
            length += 1
        return text(length)

    return [
        {"prompt": text(draw.randint(*PROMPT)), "chosen": completion(), "rejected": completion()}
        for _ in range(32 * steps)
    ]


def batch_rows(algo):
    """Rows of one optimizer step."""
    return ROWS.get(algo, 8)


def rows_for(algo, every):
    """The rows as an algorithm wants them."""
    if algo == "kto":
        return [
            {"prompt": r["prompt"], "completion": r["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
            for i, r in enumerate(every)
        ]
    if algo.startswith("sft"):
        return [{"prompt": r["prompt"], "completion": r["chosen"]} for r in every]
    if algo in GENERATIONS:
        return [{"prompt": r["prompt"]} for r in every]
    return every


def replayed(prompt_ids, place):
    """A completion that depends on nothing but the prompt and its place in the group."""
    draw = random.Random(f"{list(prompt_ids)} {place}")
    length = min(LONGEST, 1 + int(draw.expovariate(1 / MEAN)))
    ids = [draw.randrange(65, 256) for _ in range(length)]
    return ids if length == LONGEST else [*ids[:-1], END]


class Parity:
    """A reward of either sign, of token ids; counts the tokens that it is shown, step after step."""

    __name__ = "parity"

    def __init__(self):
        self.tokens = []

    def __call__(self, completion_ids, **columns):
        self.tokens.append(sum(map(len, completion_ids)))
        return [sum(ids) % 11 / 5 - 1 for ids in completion_ids]


class Watch:
    """Seconds of each step but the first, and the peak of memory above what stood before the first.

    The clock runs from the end of one step to the end of the next, so that whatever a step does counts.
    """

    def __init__(self):
        import psutil

        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self.before = psutil.Process().memory_info().rss
        self.ends = []

    def step(self):
        import time

        self.ends.append(time.perf_counter())

    def result(self):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return {
            "seconds": [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)],
            "peak_bytes": peak - self.before,
            "peak_total_bytes": peak,
        }
