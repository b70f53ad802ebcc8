"""Whole runs in this process, on the embedded model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = [{"prompt": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(6)]


def digits(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs from completion to completion: the share of characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The options of a run of two steps of four prompts; keywords change or add some."""

    def make(**changes: Any) -> dict[str, Any]:
        values = {
            "algo": "ppo",
            "reward": digits,
            "dataset": ROWS,
            "batch_size": 4,
            "max_steps": 2,
            "max_completion_length": 8,
            "num_ppo_epochs": 1,  # one look at each batch, so that the ratio is 1 at every step
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "plots": False,
            "progress": "none",
            "output_dir": str(tmp_path / "run"),
        }
        return {name: value for name, value in {**values, **changes}.items() if value is not ...}

    return make


@pytest.fixture
def check() -> Callable[..., None]:
    """Asserts what holds of the log lines of any sane PPO run with one look at each batch."""

    def sane(metrics: list[dict[str, Any]], *, steps: int = 2, ratio: float = 1e-4, length: int = 8) -> None:
        trained = [line for line in metrics if "loss" in line]
        assert [line["step"] for line in trained] == list(range(1, steps + 1))
        for line in metrics:
            assert all(math.isfinite(value) for value in line.values()), line
        for line in trained:
            assert line["policy/ratio"] == pytest.approx(1, abs=ratio)
            assert line["grad_norm"] > 0
            assert 0 <= line["completion/eos_rate"] <= 1
            assert 1 <= line["completion/length"] <= length
        if "kl" in trained[0]:
            assert trained[0]["kl"] == pytest.approx(0, abs=ratio)

    return sane
