"""The decode loop of sampling: shared prompts, one token a step for all live rows, finished rows dropped.

What this is: ``decode_shared`` drives a model with our own cache. Each distinct prompt is computed once, with
others of like length; its cache is copied to its samples; a row that has ended leaves, and where samples
wait, one of them takes its place.

Legend: R live rows of a batch, P prompt tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DynamicCache

from rlx.core import kv_cache
from rlx.core.decoding import Door, Rows, Run, mask_of

COMPACT_AT = 0.15  # share of finished rows at which they are dropped
REFILL_AT = 0.25  # share of free rows at which waiting samples take them
PADDING = 0.1  # padding may be this share of the prompt tokens that are computed together,
LEAST_PADDING = 128  # or so many tokens: a forward more costs about as much
MOST_TOKENS = {"cpu": 2048, "cuda": 32768}  # prompt tokens that are computed together


def decode_shared(run: Run, samples: list[int], waiting: Sequence[int] = ()) -> None:
    """Sample these from their first token to their last: each distinct prompt once, finished rows dropped.

    Args:
        run: what they are part of.
        samples: decoded together, from the start.
        waiting: take the places of those that end; ``run.may_join`` must hold.
    """
    cache, rows, logits = begin(run, samples)
    queue, size = list(waiting), len(samples)
    while True:
        tokens, any_ended = run.draw(rows, logits)
        joining: list[int] = []
        # Where rows have joined, those that ended and padding would outgrow the positions of the model.
        full = rows.at >= run.longest
        if any_ended or full:
            kept = rows.live.nonzero().squeeze(1)
            free = size - len(kept)
            if queue and free >= REFILL_AT * size:
                joining, queue = queue[:free], queue[free:]
            elif not len(kept):
                return
            if joining or full or len(kept) <= (1 - COMPACT_AT) * len(rows.live):
                cache.reorder_cache(kept)
                rows, tokens = rows.keep(kept), tokens[kept]
                if run.door.joins and len(kept):
                    rows = tightened(cache, rows)
        if len(rows.live):
            mask = None if rows.mask is None else rows.mask[:, : rows.at]
            logits = run.door(tokens[:, None], (rows.at - 1 - rows.pads)[:, None], mask, cache)
        if joining:
            cache, rows, logits = join(run, (cache, rows, logits), begin(run, joining))


def begin(run: Run, samples: list[int]) -> tuple[DynamicCache, Rows, Tensor]:
    """Rows of these samples with their prompts in the cache, and (R, V) logits of the first new token."""
    prompts, index = run.rows(samples)
    cache, logits = prefill(run.door, prompts)
    if len(prompts.live) < len(samples):
        cache.reorder_cache(index)
    return cache, run.expand(prompts, index, samples), logits[index]


def prefill(door: Door, rows: Rows) -> tuple[DynamicCache, Tensor]:
    """Run the prompts through the model; gives their cache, and (R, V) logits of the first new token.

    Prompts of like length go together, so that little of what is computed is padding, and none where they are
    equally long. A cache whose layers cannot be put together takes them all at once.

    Args:
        door: the model.
        rows: one a prompt, the shortest first.
    """
    lengths = (rows.width - rows.pads).tolist()
    most = MOST_TOKENS.get(door.device.type, MOST_TOKENS["cpu"])
    caches, logits = [], []
    for bucket in buckets(lengths, most) if door.joins else [slice(0, len(lengths))]:
        first = rows.width - lengths[bucket][-1]
        pads = rows.pads[bucket] - first
        column = torch.arange(rows.width - first, device=door.device)
        mask = column >= pads[:, None] if lengths[bucket][0] != lengths[bucket][-1] else None
        positions = (column - pads[:, None]).clamp_(min=0)
        caches.append(door.new_cache())
        ids = rows.tokens[bucket, first : rows.width]
        logits.append(door(ids, positions, mask, caches[-1], **door.prefill_options))
    if len(caches) == 1:
        return caches[0], logits[0]
    return kv_cache.joined(caches, door.new_cache()), torch.cat(logits)


def buckets(lengths: Sequence[int], most: int) -> list[slice]:
    """Prompts that are computed together: of like length, or few tokens in all.

    Args:
        lengths: tokens of each prompt, ascending.
        most: tokens together, padding included; a longer prompt is alone.

    Returns:
        Consecutive stretches of the prompts.
    """
    starts, real = [0], 0
    for row, length in enumerate(lengths):
        real += length
        padded = (row + 1 - starts[-1]) * length
        if row > starts[-1] and (padded - real > max(LEAST_PADDING, PADDING * real) or padded > most):
            starts.append(row)
            real = length
    return [slice(*ends) for ends in pairwise([*starts, len(lengths)])]


def join(
    run: Run, old: tuple[DynamicCache, Rows, Tensor], new: tuple[DynamicCache, Rows, Tensor]
) -> tuple[DynamicCache, Rows, Tensor]:
    """Two batches as one, the last columns of both in line.

    Args:
        run: what they are part of.
        old: may have no rows left; the last token of each is in its cache.
        new: begins.
    """
    if not len(old[1].live):
        return new
    both = [(cache, tightened(cache, rows), logits) for cache, rows, logits in (old, new)]
    at = max(rows.at for _, rows, _ in both)

    def stacked(name: str) -> Tensor:
        return torch.cat([getattr(rows, name) for _, rows, _ in both])

    pads = torch.cat([rows.pads + (at - rows.at) for _, rows, _ in both])
    rows = Rows(
        samples=stacked("samples"),
        live=stacked("live"),
        uniform=None if new[1].uniform is None else stacked("uniform"),
        tokens=new[1].tokens.new_empty(len(pads), 0),
        pads=pads,
        steps=stacked("steps"),
        mask=mask_of(pads, at + run.length),
        width=at,
        at=at,
    )
    cache = kv_cache.joined([cache for cache, _, _ in both], run.door.new_cache())
    return cache, rows, torch.cat([logits for _, _, logits in both])


def tightened(cache: DynamicCache, rows: Rows) -> Rows:
    """Drop the columns that are padding in every row, from a cache whose layers can be put together."""
    least = int(rows.pads.min())
    if not least:
        return rows
    kv_cache.drop_columns(cache, least)
    return replace(
        rows,
        tokens=rows.tokens[:, least:],
        pads=rows.pads - least,
        mask=None if rows.mask is None else rows.mask[:, least:],
        width=rows.width - least,
        at=rows.at - least,
    )
