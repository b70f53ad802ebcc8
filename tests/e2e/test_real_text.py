"""Short runs on real dialogues and problems: what is left out and why, what is learned, and that it learns.

The figures of each report are counted again here, by plain means.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rlx

DATA = Path(__file__).parents[2].parent / "shared" / "data"
HH, GSM8K = DATA / "hh_rlhf_harmless_test.jsonl.gz", DATA / "gsm8k_train.jsonl.gz"
MARKER, LONGEST = "\n\nAssistant:", 256

pytestmark = [
    pytest.mark.skipif(not HH.exists(), reason=f"the data are not at {DATA}"),
    # Not ours: peft asks for a property that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def read(file: Path, rows: int) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(rows), strict=False)]


@pytest.fixture(scope="module")
def dialogues() -> list[dict[str, str]]:
    """The first 160 pairs."""
    return read(HH, 160)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, dialogues) -> Path:
    """A folder with a random Qwen2 of two layers and a byte-level tokenizer learnt from the dialogues."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["chosen"] for row in dialogues], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=800, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def count(qwen) -> Callable[[str], int]:
    """The tokens of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def train(folder: Path, qwen: Path, **options: Any) -> Any:
    return rlx.run(**{
        "model": str(qwen), "batch_size": 8, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "max_length": LONGEST, "max_eval_rows": 16, "plots": False,
        "progress": "none", "output_dir": str(folder / "run"), **options,
    })  # fmt: skip


def sane(result: Any, steps: int = 4) -> None:
    """Every number is finite, a gradient flows in each step, and the held-out loss falls."""
    for line in result.metrics:
        assert all(math.isfinite(value) for value in line.values()), line
    trained = [line for line in result.metrics if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, steps + 1))
    assert all(line["grad_norm"] > 0 for line in trained)
    assert result.final["eval/loss"] < result.metrics[0]["eval/loss"]


SPOILED = [
    {"chosen": None, "rejected": "\n\nHuman: a\n\nAssistant: b"},
    {"chosen": 3, "rejected": "\n\nHuman: a\n\nAssistant: b"},
    {"chosen": "yes", "rejected": "no"},  # they begin with nothing in common
    {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},  # an empty answer
]


@pytest.mark.parametrize(("rank", "rate"), [(0, 1e-3), (4, 3e-3)], ids=["all weights", "LoRA"])
def test_dpo_on_dialogues_extracts_the_prompt_and_tells_what_it_leaves_out(
    rank, rate, dialogues, qwen, count, tmp_path
):
    file = write(tmp_path, [*dialogues, *SPOILED])
    result = train(
        tmp_path, qwen, algo="dpo", dataset=file, eval_dataset=dialogues, lora_r=rank, learning_rate=rate,
        on_bad_row="drop", max_bad_rows=0.02, truncation_mode="drop", batch_size=16,
    )  # fmt: skip
    sane(result)
    assert result.metrics[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # still its own reference
    # Each side is its dialogue and the end-of-sequence token.
    over = sum(max(count(row["chosen"]), count(row["rejected"])) + 1 > LONGEST for row in dialogues)
    assert 0 < over < len(dialogues)
    for line in (
        "prompt ← what the dialogues chosen and rejected begin with",
        "left out 2 of 164 rows: cannot be used: chosen is NoneType, not a list of messages (1); "
        "chosen is int, not a list of messages (1) at rows.jsonl:161, rows.jsonl:162",
        "left out 1 of 164 rows: cannot be used: prompt is empty (1) at rows.jsonl:163",
        "warning: chosen is empty in 1 of 161 rows, where only the end is learned: rows.jsonl:164",
        f"left out {over} of 161 rows: over max_length {LONGEST}",
    ):
        assert line in result.plan
    assert any(
        line.startswith(f"{161 - over} rows as plain text, chosen and rejected") for line in result.plan
    )


def test_the_prompt_of_a_dialogue_ends_where_both_sides_have_the_assistant_speak(dialogues):
    from rlx.plugins.transforms.preference import ExtractPrompt

    for row in ExtractPrompt(ExtractPrompt.Config())(dialogues):
        place = dialogues.index(next(d for d in dialogues if d["chosen"] == row["prompt"] + row["chosen"]))
        assert dialogues[place]["rejected"] == row["prompt"] + row["rejected"]
        assert row["prompt"].endswith(MARKER)
        # The last one that both have: what follows it differs before the next.
        later = row["chosen"].find(MARKER)
        assert later < 0 or not row["rejected"].startswith(row["chosen"][: later + len(MARKER)])


def test_rows_that_cannot_be_used_are_an_error_unless_they_may_be_dropped(dialogues, qwen, tmp_path):
    file = write(tmp_path, [*dialogues, *SPOILED])
    with pytest.raises(rlx.DataError) as caught:
        train(tmp_path, qwen, algo="dpo", dataset=file)
    assert caught.value.where == "rows.jsonl:161, rows.jsonl:162" and caught.value.exit_code == 3
    with pytest.raises(rlx.DataError, match="2 of 164 rows") as caught:  # more than 1 %
        train(tmp_path, qwen, algo="dpo", dataset=file, on_bad_row="drop")
    assert "max_bad_rows 0.01" in caught.value.expected and not (tmp_path / "run").exists()


def test_kto_on_dialogues_learns_from_each_side_by_itself(dialogues, qwen, count, tmp_path):
    result = train(
        tmp_path, qwen, algo="kto", dataset=write(tmp_path, dialogues), eval_dataset=dialogues,
        truncation_mode="drop", learning_rate=1e-3, batch_size=16,
    )  # fmt: skip
    sane(result)
    sides = {side: [count(row[side]) + 1 for row in dialogues] for side in ("chosen", "rejected")}
    good, bad = (sum(length <= LONGEST for length in sides[side]) for side in ("chosen", "rejected"))
    assert good != bad  # each side is counted by itself
    assert f"left out {320 - good - bad} of 320 rows: over max_length {LONGEST}" in result.plan
    assert f"{good} desirable and {bad} undesirable completions" in result.plan
    assert "transform unpair: 160 rows became 320" in result.plan


def rows_needed(lengths: list[int], size: int) -> int:
    """Best-fit decreasing, done slowly: the fullest row that has room takes the next longest document."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [space for space in free if space >= length]
        if fits:
            free[free.index(min(fits))] -= length
        else:
            free.append(size - length)
    return len(free)


def packed_rows(result: Any) -> tuple[int, int]:
    """Demonstrations and the rows they were packed into, as the report says."""
    [found] = [
        re.match(r"packed (\d+) demonstrations into (\d+) rows", line)
        for line in result.plan
        if line[:7] == "packed "
    ]
    return int(found[1]), int(found[2])


def test_sft_on_problems_packs_them_and_learns_the_answers_alone(qwen, count, tmp_path):
    problems, size = read(GSM8K, 60), 448
    result = train(
        tmp_path, qwen, algo="sft", dataset=write(tmp_path, problems), eval_dataset=problems,
        columns={"prompt": "question", "completion": "answer"}, packing=True, truncation_mode="drop",
        max_length=size,
    )  # fmt: skip
    sane(result)
    lengths, learned = [], 0
    for row in problems:
        prompt = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        whole = count(f"{prompt}{row['answer']}<|im_end|>")  # nothing after the token that ends it
        if whole <= size:
            lengths.append(whole)
            learned += whole - count(prompt)
    over, packed = len(problems) - len(lengths), rows_needed(lengths, size)
    assert 0 < over < len(problems) and packed < len(lengths)
    assert packed_rows(result) == (len(lengths), packed)
    assert f"left out {over} of {len(problems)} rows: over max_length {size}" in result.plan
    assert f"{learned} of {sum(lengths)} tokens are learned" in result.plan
    assert any(line.startswith(f"{len(lengths)} rows through the chat template") for line in result.plan)


def test_sft_on_dialogues_as_text_fills_rows_to_the_brim(dialogues, qwen, count, tmp_path):
    result = train(
        tmp_path, qwen, algo="sft", dataset=write(tmp_path, dialogues), eval_dataset=dialogues,
        columns={"text": "chosen"}, packing=True, packing_strategy="wrapped",
    )  # fmt: skip
    sane(result)
    total = sum(count(row["chosen"]) + 1 for row in dialogues)
    assert f"{total - len(dialogues)} of {total} tokens are learned" in result.plan  # all but each first one
    assert packed_rows(result) == (len(dialogues), math.ceil(total / LONGEST))
