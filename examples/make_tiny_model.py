"""Make the model inside the package: a 349k-parameter Llama that solves one-step word problems, badly.

Stage 1 teaches the skill on right solutions. Stage 2 imitates sloppy ones (wrong operation, slips, lost
format), so that every method has something visible to mend. Nothing but torch and transformers; one thread,
so the result is the same every time on the same machine. About eight minutes on one core:

    python examples/make_tiny_model.py --out plugins/datasets/tiny
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rlx.plugins.datasets.wordmath import WordMath, flawed, problem, solution

SPECIALS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]  # ids 0 to 4
LONGEST = 1024  # positions; training only ever shows the first few dozen
# Letters of one word together, digits one by one (so that arithmetic is on digits), each with the space
# before it.
WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' ~ message['role'] ~ ': use system, user or assistant') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] ~ '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] ~ '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""

Writer = Callable[[dict[str, Any], random.Random], str]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 453 tokens: all 256 bytes, so that any text round-trips, and common words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    corpus = []
    for _ in range(20_000):
        row = problem(rng, "train")
        corpus += [row["prompt"], solution(row), flawed(row, rng)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIALS[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model. The vocabulary is rounded up to a multiple of 8; the last ids never occur."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 8) * 8,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = None
    return model


def encode(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Each prompt as one user message, ready to be answered."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def train(
    model: Any,
    tokenizer: Any,
    write: Writer,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: str,
) -> None:
    """Supervised training on fresh problems of the train split; only the completion is learned.

    Args:
        model: trained in place.
        tokenizer: the model's.
        write: the completion of a row.
        steps: optimizer steps.
        batch_size: problems a step.
        learning_rate: peak; 100 steps of warm-up, then a cosine to zero.
        seed: decides the problems.
    """
    rng, started = random.Random(seed), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        rows = [problem(rng, "train") for _ in range(batch_size)]
        prompts = encode(tokenizer, [row["prompt"] for row in rows])
        answers = tokenizer([write(row, rng) for row in rows], add_special_tokens=False)["input_ids"]
        ids, scored = _right_padded(prompts, [[*a, tokenizer.eos_token_id] for a in answers])
        warm = min(1.0, (step + 1) / 100)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * decay
        hidden = model.model(input_ids=ids).last_hidden_state[
            :, :-1
        ]  # causal: padding on the right is never seen
        picked = scored[:, 1:]
        loss = cross_entropy(model.lm_head(hidden[picked]), ids[:, 1:][picked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            print(
                f"{seed}: step {step + 1} loss {loss.item():.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            )


def _right_padded(prompts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(N, longest) int64 ids and (N, longest) bool, True on the answer's tokens."""
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    scored = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        scored[i, len(prompt) : len(prompt) + len(answer)] = True
    return ids, scored


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]], *, greedy: bool) -> float:
    """Share of rows answered right and ended; one completion each, a fixed sampling seed."""
    torch.manual_seed(0)
    inputs = tokenizer.pad(
        {"input_ids": encode(tokenizer, [row["prompt"] for row in rows])}, return_tensors="pt"
    )
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=24,
        do_sample=not greedy,
        **({} if greedy else {"top_k": 0, "temperature": 1.0}),
    )[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.decode([[t for t in ids if t != tokenizer.pad_token_id] for ids in out.tolist()])
    right = [text.endswith(f"Answer: {row['answer']}<|end|>") for text, row in zip(texts, rows, strict=True)]
    return sum(right) / len(right)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
# tiny: the model inside rlx

A Llama of {parameters:,} parameters (hidden 96, 3 layers, 4 heads, 2 key-value heads, tied embeddings) with a
byte-level tokenizer of {tokens} tokens. It answers one-step word problems such as

    Sam has 34 toys and Omar has 15. How many more toys does Sam have than Omar?
    34 - 15 = 19. Answer: 19

and it answers them badly on purpose. It was trained from scratch, in this repository, by
`examples/make_tiny_model.py`, on text that `rlx.plugins.datasets.wordmath` generates: first on right
solutions ({skill_steps} steps of 64), then on sloppy ones ({sloppy_steps} steps of 128) with a wrong
operation, a slip or a lost format. So a method that trains it recovers a skill that the model has and
misuses; it does not learn arithmetic. Good for tests, demonstrations and learning curves in seconds; useless
for anything else.

| on {rows} problems with operand pairs never trained on | right |
|---|---|
| after stage 1, sampled at temperature 1 | {skill_sampled:.3f} |
| after stage 1, greedy | {skill_greedy:.3f} |
| **as shipped**, sampled at temperature 1 | **{sampled:.3f}** |
| **as shipped**, greedy | **{greedy:.3f}** |

Weights are stored in bfloat16 and meant to be computed in float32. Chat format:
`<|system|>…<|end|><|user|>…<|end|><|assistant|>…<|end|>`; `<|end|>` ends a completion, `<|pad|>` is id 0.
Licence: Apache-2.0, weights and generated data alike. No other data went into it.
"""


def main() -> None:
    """Make, train, save, reload and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4000, help="steps of stage 1, the skill")
    parser.add_argument("--sloppy-steps", type=int, default=300, help="steps of stage 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skill", type=Path, help="stage 1 is saved here, or taken from here if it exists")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)

    tokenizer: Any = make_tokenizer()
    model: Any
    rows = WordMath().rows("test")
    if options.skill and options.skill.exists():
        model = AutoModelForCausalLM.from_pretrained(options.skill, dtype=torch.float32)
    else:
        model = make_model(tokenizer)
        plan: dict[str, Any] = {"steps": options.steps, "batch_size": 64, "learning_rate": 2e-3}
        train(model, tokenizer, lambda row, rng: solution(row), **plan, seed=f"skill/{options.seed}")
        if options.skill:
            model.save_pretrained(options.skill)
    skill = {
        f"skill_{k}": accuracy(model, tokenizer, rows, greedy=k == "greedy") for k in ("sampled", "greedy")
    }
    print(skill, flush=True)
    plan = {"steps": options.sloppy_steps, "batch_size": 128, "learning_rate": 1e-3}
    train(model, tokenizer, flawed, **plan, seed=f"sloppy/{options.seed}")

    options.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    shipped = {k: accuracy(model, tokenizer, rows, greedy=k == "greedy") for k in ("sampled", "greedy")}
    print(shipped, flush=True)
    card = CARD.format(
        parameters=model.num_parameters(),
        tokens=len(tokenizer),
        rows=len(rows),
        skill_steps=options.steps,
        sloppy_steps=options.sloppy_steps,
        **skill,
        **shipped,
    )
    (options.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
