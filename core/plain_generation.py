"""Sampling by ``model.generate``: for models whose cache is unknown, and as the plain peer to compare with.

What this is: transformers decodes greedily over scores in which one token is left, the one our own sampler
drew. So draws, log-probs, stops and errors are those of ``rlx.core.decoding``; what differs is speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlx.core.decoding import Rows, Run


class _Draw(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Leaves the drawn token alone with a finite score."""

    def __init__(self, run: Run, rows: Rows) -> None:
        self.run, self.rows = run, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, _ = self.run.draw(self.rows, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Ends the rows that the draw took from the living."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ~self.rows.live


def decode_by_generate(run: Run, samples: list[int]) -> None:
    """Sample these from their first token to their last with ``model.generate``."""
    rows, index = run.rows(samples)
    rows = run.expand(rows, index, samples)
    decoder = run.door.decoder
    kept = decoder.generation_config
    # generate fills what it is not told from the model's own generation config: a blank one adds nothing.
    decoder.generation_config = GenerationConfig()
    try:
        run.door.model.generate(
            input_ids=rows.tokens[:, : rows.width],
            attention_mask=_mask(rows),
            generation_config=GenerationConfig(
                max_new_tokens=run.length,
                do_sample=False,
                top_k=0,
                num_beams=1,
                pad_token_id=0,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([_Draw(run, rows)]),
            stopping_criteria=StoppingCriteriaList([_Stop(rows)]),
        )
    finally:
        decoder.generation_config = kept


def _mask(rows: Rows) -> Tensor:
    """(R, P) int64, explicit even without padding: generate would guess one from the pad token."""
    if rows.mask is None:
        return torch.ones_like(rows.tokens[:, : rows.width])
    return rows.mask[:, : rows.width].long()
