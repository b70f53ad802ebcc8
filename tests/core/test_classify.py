"""Scores of sequences against the model's own forward on single unpadded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from torch import Tensor, nn

from rlx.core.batch import Sequences
from rlx.core.classify import classify
from rlx.core.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_labels": 1,
    "pad_token_id": 60, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: tf.LlamaConfig(**SIZES, **more),
    "qwen2": lambda **more: tf.Qwen2Config(**SIZES, **more),
    "mistral window": lambda **more: tf.MistralConfig(**SIZES, sliding_window=4, **more),
    "gpt2": lambda **more: tf.GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, num_labels=1, pad_token_id=60,
        initializer_range=0.3, **more,
    ),
}  # fmt: skip


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return tf.AutoModelForSequenceClassification.from_config(CONFIGS[name](**more)).eval()


def batch(lengths: tuple[int, ...] = (3, 9, 1, 6), last: int | None = None) -> Sequences:
    ids = torch.randint(1, 59, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    rows = [row.tolist() for row in ids.split(list(lengths))]
    if last is not None:
        rows = [[*row[:-1], last] for row in rows]
    return Sequences.from_lists([row[:1] for row in rows], [row[1:] for row in rows])


def alone(model: nn.Module, sequences: Sequences) -> Tensor:
    rows = sequences.ids.split(sequences.lengths.tolist())
    return torch.stack([model(input_ids=ids[None]).logits[0, 0] for ids in rows])


def gradients(model: nn.Module, scores: Tensor) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    total = (scores * torch.linspace(-1, 2, len(scores))).sum()
    return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


def assert_same(model: nn.Module, sequences: Sequences) -> None:
    want, got = alone(model, sequences), classify(model, sequences)
    assert got.dtype == torch.float32
    assert float(want.detach().std()) > 0.01
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients(model, got), gradients(model, want), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()) + 1e-7)
    with torch.no_grad():
        for budget in (1, 12, 4096):
            torch.testing.assert_close(
                classify(model, sequences, token_budget=budget), want, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_single_unpadded_passes(name: str) -> None:
    assert_same(build(name), batch())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_with_its_own_score_head(name: str) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=4)
    model = peft.get_peft_model(build(name), config)
    with torch.no_grad():  # B matrices are zero at first, and would hide a base that runs without its adapter
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                parameter.normal_(std=0.3)
    assert_same(model.eval(), batch())
    with model.disable_adapter(), torch.no_grad():
        off = classify(model, batch())
    assert float((off - classify(model, batch()).detach()).abs().max()) > 0.01


def test_the_pad_token_does_not_decide_which_token_is_the_last() -> None:
    """Every sequence ends with the pad token, as where padding is done with the end-of-sequence token."""
    model, sequences = build("llama"), batch(last=60)
    rows = sequences.ids.split(sequences.lengths.tolist())
    want = torch.stack([model.score(model.model(input_ids=ids[None])[0][0, -1])[0] for ids in rows])
    torch.testing.assert_close(classify(model, sequences), want, rtol=1e-5, atol=1e-5)


def test_no_sequence_and_an_empty_one() -> None:
    model = build("llama")
    assert classify(model, Sequences.from_lists([], [])).shape == (0,)
    none = torch.zeros(0, dtype=torch.long)
    nothing = Sequences(none, torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), none.bool())
    with pytest.raises(ValueError, match="empty"):
        classify(model, nothing)


@pytest.mark.usefixtures("fresh_accelerate")
def test_autocast_of_an_accelerator() -> None:
    model, sequences = build("llama"), batch()
    got = classify(model, sequences, accelerator=Accelerator(mixed_precision="bf16", cpu=True))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, alone(model, sequences), rtol=0.05, atol=0.05)


def test_models_without_a_single_score_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 labels"):
        classify(build("llama").__class__(tf.LlamaConfig(**{**SIZES, "num_labels": 2})), batch())
    with pytest.raises(ConfigError, match="no head called 'score'"):
        classify(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), batch())
    tuned = peft.get_peft_model(
        build("llama"), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    )
    with pytest.raises(ConfigError, match="virtual tokens"):
        classify(tuned, batch())
