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


GRADED = '''
"""A reward that tells completions apart, and one that remembers."""

import os
import time


def graded(completions, answer, **_):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return [len(text) / 40 + (str(number) in text) for text, number in zip(completions, answer)]


class Remembering:
    """The mean of all scores so far is the baseline."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def __call__(self, completions, answer, **_):
        scores = graded(completions, answer)
        self.total, self.count = self.total + sum(scores), self.count + len(scores)
        return [score - self.total / self.count for score in scores]

    def state_dict(self):
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state):
        self.total, self.count = state["total"], state["count"]
'''
SMALL: dict[str, Any] = {
    "algo": "ppo",
    "seed": 3,
    "max_rows": 12,
    "max_eval_rows": 4,
    "max_steps": 6,
    "batch_size": 8,
    "num_generations": 1,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "max_completion_length": 10,
    "warmup_steps": 3,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "log_completions": 0,
    "plots": False,
    "progress": "none",
    "mixed_precision": "no",
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Options of a PPO run of seconds on the packaged model; keywords change them."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graded.py").write_text(GRADED)

    def options(**changes: Any) -> dict[str, Any]:
        given = {"reward": "./graded.py:graded", "output_dir": str(tmp_path / "run"), **SMALL, **changes}
        return {name: value for name, value in given.items() if value is not ...}

    return options


@pytest.fixture
def started(small: Callable[..., dict[str, Any]]) -> Any:
    """Prepares such a run, ready to be driven by hand; it is closed after the test."""
    from rlx.core.run import prepare

    runs = []

    def start(**changes: Any) -> Any:
        number = len(runs)
        run = prepare(**small(**{"output_dir": f"by-hand-{number}", **changes}))
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.close()


@pytest.fixture
def fresh_accelerate() -> None:
    """Accelerate keeps one precision a process; a test that asks for another begins without it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
