"""What a step has to take, counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"
# tiny: two layers of 4·64² + 3·64·172 numbers, a head of 1000·64.
TRUNK, HEAD = 2 * (4 * 4096 + 3 * 64 * 172), 64_000
SPARED = 2 * 4096 + 3 * 64 * 172  # of the last layer, but for keys and values


@pytest.fixture(scope="module")
def limits():
    sys.path.insert(0, str(HERE))
    try:
        import limits

        yield limits
    finally:
        sys.path.remove(str(HERE))
        for name in ("limits", "workload"):
            sys.modules.pop(name, None)


def test_numbers_of_the_model(limits):
    from transformers import Qwen2ForCausalLM

    assert limits.numbers("tiny") == (TRUNK, HEAD)
    assert limits.spared("tiny") == SPARED
    model = Qwen2ForCausalLM(limits.workload.config("tiny"))
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in matrices) == TRUNK and model.lm_head.weight.numel() == HEAD


def test_tokens_of_the_median_step(limits):
    # Eight pairs a step; the first step is not counted. An end token follows each completion.
    steps = {0: (9, 9, 9), 1: (3, 5, 2), 2: (7, 1, 1), 3: (4, 2, 2)}
    rows = [
        {"prompt": "p" * prompt, "chosen": "c" * chosen, "rejected": "r" * rejected}
        for prompt, chosen, rejected in steps.values()
        for _ in range(8)
    ]
    assert limits.offline_tokens("dpo", rows, 3) == (8 * 4, 8 * (2 + 1 + 2 + 1))
    assert limits.offline_tokens("sft", rows, 3) == (8 * 4, 8 * (2 + 1))


def test_seconds_by_hand(limits):
    found = {"flop": 1e6, "bytes": 1e9}

    def least(algo, found=found):
        return limits.seconds(algo, "tiny", 10, 5, found, "float32") * 1e6

    once = TRUNK * 15 - SPARED * 10  # ten of the fifteen tokens are of the prompt, whose states nobody reads
    # Policy forward and backward, reference forward: 8 N a token, 8 V·H a completion token.
    assert least("dpo") == pytest.approx(8 * once + 8 * HEAD * 5)
    # The likelihood of the prompt too.
    assert least("orpo") == pytest.approx(6 * TRUNK * 15 + 6 * HEAD * 15)
    # Both models measure the five tokens again behind other prompts.
    assert least("kto") == pytest.approx(8 * once + 8 * HEAD * 5 + 4 * (TRUNK + HEAD) * 5)
    # The update, the prefill, and the decode steps as products of one row each.
    update, prefill = 6 * once + 6 * HEAD * 5, 2 * (TRUNK - SPARED) * 10
    assert least("grpo") == pytest.approx(update + prefill + 2 * (TRUNK + HEAD) * 5)
    # Where memory is slow, 96 readings of the weights take longer.
    slow = {"flop": 1e6, "bytes": 1e3}
    reading = 96 * (TRUNK + HEAD) * 4 / 1e3 * 1e6
    assert least("grpo", slow) == pytest.approx(update + prefill + reading)


def test_seconds_of_a_classifier_by_hand(limits):
    """Of eight pairs with 100 tokens of prompts and 60 of answers one state a sequence is read."""
    found = limits.seconds("reward", "tiny", 100, 60, {"flop": 1e6, "bytes": 1e9}, "float32") * 1e6
    assert found == pytest.approx(6 * (TRUNK * 160 - SPARED * (160 - 16)))
