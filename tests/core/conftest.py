"""Tiny random models on disk, made from their configuration; nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = [f"w{i}" for i in range(16)]
VOCABULARY = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}


def build_tokenizer(**special: str | None) -> Any:
    """A word-level tokenizer of 19 tokens with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    declared = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **declared)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def build_model(seed: int = 0, **changes: Any) -> Any:
    """A random Llama of two layers, hidden 16, vocabulary 32, in float32 and eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.5,  # large, so that logits differ clearly
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny model with its tokenizer into a folder; keywords change its configuration."""

    def make(name: str = "base", seed: int = 0, **changes: Any) -> Path:
        folder = tmp_path / name
        build_model(seed, **changes).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Makes ``build_model`` reachable from test modules, which cannot import each other."""
    return build_model


@pytest.fixture
def tiny_tokenizer() -> Callable[..., Any]:
    """The same for ``build_tokenizer``."""
    return build_tokenizer
