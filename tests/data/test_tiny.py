"""The model and tokenizer inside the package."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlx.plugins.datasets import tiny_path
from rlx.plugins.datasets.wordmath import WordMath, solution

TOKENIZER = AutoTokenizer.from_pretrained(tiny_path())
SPECIALS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    if any(special in text for special in SPECIALS):
        return
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(5 <= i < 453 for i in ids)


def test_special_tokens_and_limits():
    assert TOKENIZER.convert_ids_to_tokens(range(5)) == SPECIALS
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, len(TOKENIZER)) == (0, 1, 453)
    assert TOKENIZER.model_max_length == 1024
    # Nothing is added around a text: what is generated is appended to exactly what was rendered.
    assert TOKENIZER("34")["input_ids"] == TOKENIZER("34", add_special_tokens=False)["input_ids"]


def test_numbers_are_split_into_digits():
    tokens = TOKENIZER("34 - 15 = 19. Answer: 19")["input_ids"]
    shown = [TOKENIZER.decode([token]) for token in tokens]
    assert shown == ["3", "4", " -", " 1", "5", " =", " 1", "9", ".", " Answer", ":", " 1", "9"]


def test_the_chat_template():
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    render = TOKENIZER.apply_chat_template
    assert render(chat, tokenize=False) == "<|system|>S<|end|><|user|>U<|end|><|assistant|>A<|end|>"
    assert render(chat[1:2], tokenize=False, add_generation_prompt=True) == "<|user|>U<|end|><|assistant|>"
    assert render(chat[1:], tokenize=False, continue_final_message=True) == "<|user|>U<|end|><|assistant|>A"
    masked = render(chat, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, m in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if m]
    assert TOKENIZER.decode(learned) == "A<|end|>"
    with pytest.raises(Exception, match="unknown role robot"):
        render([{"role": "robot", "content": "x"}], tokenize=False)


def test_the_package_stays_small():
    assert sum(path.stat().st_size for path in tiny_path().iterdir()) < 1_500_000
    config = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).config
    assert config.vocab_size == 456
    assert config.max_position_embeddings == TOKENIZER.model_max_length


@torch.no_grad()
def answered(rows, *, sample):
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts = TOKENIZER.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = TOKENIZER(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    extra = {"top_k": 0, "temperature": 1.0} if sample else {}
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=24,
        do_sample=sample,
        **extra,
    )
    ids = [[i for i in row if i != 0] for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
    return TOKENIZER.decode(ids)


def share_right(rows, *, sample):
    texts = answered(rows, sample=sample)
    return sum(t == solution(row) + "<|end|>" for t, row in zip(texts, rows, strict=True)) / len(rows)


def test_the_model_has_a_skill_and_misuses_it():
    # Greedy, so the figure is exact but for the rounding of other kernels; 128 problems keep the test quick.
    assert abs(share_right(WordMath().rows("test")[:128], sample=False) - 71 / 128) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize(("sample", "named"), [(True, "sampled at temperature 1"), (False, "greedy")])
def test_the_model_answers_as_often_as_its_card_says(sample, named):
    card = (tiny_path() / "README.md").read_text(encoding="utf-8")
    expected = float(re.search(rf"as shipped\*\*, {named} \| \*\*([\d.]+)\*\*", card).group(1))
    # Other kernels round otherwise, so single draws may flip. Right answers behind a wrong equation
    # are counted by the card and not here; they are rare.
    assert abs(share_right(WordMath().rows("test"), sample=sample) - expected) < 0.03
