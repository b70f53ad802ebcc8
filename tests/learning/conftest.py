"""What the learning tests share: the held-out reward of a policy on the playground."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlx.core.generation import generate
from rlx.core.settings import Settings
from rlx.core.streams import stream_seed
from rlx.core.tokenizer import load_tokenizer
from rlx.plugins.contract import Sampling
from rlx.plugins.references import make

PROMPTS = 512


@pytest.fixture(scope="session")
def held_out_reward() -> Callable[[Any], float]:
    """Mean exact_match of one sample on each of 512 held-out prompts; the same draws every time."""
    from rlx.core.data import check_data

    settings = Settings(max_completion_length=24, max_eval_rows=PROMPTS, dataset="wordmath")
    tokenizer = load_tokenizer(settings)
    _, held_out = check_data(settings, tokenizer)
    assert held_out is not None and len(held_out) == PROMPTS
    prompts, checker = held_out.take(range(PROMPTS)), make("reward", "exact_match")

    def measure(policy: Any) -> float:
        sampling = Sampling(24, stop_token_ids=policy.stop_token_ids)
        seeds = [stream_seed(0, "held-out", row) for row in range(PROMPTS)]
        done = generate(policy.model, prompts.ids, 1, sampling, seeds, tokenizer=tokenizer)
        texts = tokenizer.batch_decode(done.ids, skip_special_tokens=True)
        scores = checker(
            prompts=prompts.texts,
            completions=texts,
            completion_ids=done.ids,
            answer=prompts.columns["answer"],
        )
        return sum(scores) / PROMPTS

    return measure
