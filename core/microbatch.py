"""Cutting a batch into micro-batches by the tokens that a model is fed. Torch only, no model.

Legend: N sequences, R rows; ``per_row`` adjacent sequences make a row and are never parted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlx.core.tree import common_lengths

if TYPE_CHECKING:
    from torch import Tensor

    from rlx.core.batch import Sequences


def cut(lengths: Tensor, budget: int, per_row: int = 1) -> list[Tensor]:
    """Rows of each micro-batch, so that its sequences × its longest sequence stay within a budget.

    Rows are sorted by length, longest first: padding is small, and a budget that does not fit in memory fails
    at the first micro-batch. Rows of equal length keep their order.

    Args:
        lengths: (N,) int64, tokens of each sequence.
        budget: padded tokens a micro-batch may have, at least 1; a single row may exceed it.
        per_row: adjacent sequences that stay together, 2 for preference pairs.

    Returns:
        Row numbers (K,) int64 of each micro-batch, on the device of lengths; every row once. None for no row.

    Raises:
        ValueError: if the budget is not positive or the sequences do not fill whole rows.
    """
    if budget < 1:
        raise ValueError(f"a micro-batch needs a budget of at least 1 token, not {budget}")
    longest = _row_lengths(lengths, per_row)
    order = longest.argsort(descending=True, stable=True)
    widths = longest[order].tolist()
    parts, start = [], 0
    while start < len(order):
        rows = max(1, budget // (per_row * max(1, widths[start])))
        parts.append(order[start : start + rows])
        start += rows
    return parts


def cut_trees(sequences: Sequences, budget: int, per_row: int = 1) -> list[Tensor]:
    """Rows of each micro-batch, so that its tokens stay within a budget, shared ones counted once.

    Rows of a group stand together, the largest group first. A group that fits into a micro-batch is not
    parted; a larger one is cut into as many as it takes, and each computes the prefix again.

    Args:
        sequences: N, fed without padding, with what a group has in common once.
        budget: tokens a micro-batch may have, at least 1; a single row may exceed it.
        per_row: as in ``cut``.

    Returns:
        As ``cut``.

    Raises:
        ValueError: as ``cut``.
    """
    longest = _row_lengths(sequences.lengths, per_row)  # or an error
    if budget < 1:
        raise ValueError(f"a micro-batch needs a budget of at least 1 token, not {budget}")
    table = torch.stack([sequences.groups, sequences.lengths, common_lengths(sequences)])
    groups, lengths, common = table.tolist()
    families: dict[int, list[int]] = {}
    for row in range(len(longest)):
        families.setdefault(groups[row * per_row], []).append(row)

    def tokens(rows: list[int], seen: set[int]) -> int:
        """Tokens that rows add to a micro-batch that has the prefixes of some groups; these become more."""
        total = 0
        for i in (row * per_row + place for row in rows for place in range(per_row)):
            total += lengths[i] - (common[i] if groups[i] in seen else 0)
            seen.add(groups[i])
        return total

    parts: list[list[int]] = []
    used, seen = budget + 1, set[int]()
    for rows in sorted(families.values(), key=lambda rows: -tokens(rows, set())):
        whole = tokens(rows, set()) <= budget
        for some in [rows] if whole else [[row] for row in rows]:
            more = tokens(some, set(seen))
            if used + more > budget:
                parts.append([])
                used, seen, more = 0, set(), tokens(some, set())
            parts[-1] += some
            tokens(some, seen)
            used += more
    return [torch.tensor(part, device=sequences.ids.device) for part in parts]


def _row_lengths(lengths: Tensor, per_row: int) -> Tensor:
    """(R,) int64, tokens of the longest sequence of each row."""
    if len(lengths) % per_row:
        raise ValueError(f"{len(lengths)} sequences do not fill rows of {per_row}")
    return lengths.view(-1, per_row).amax(dim=1) if len(lengths) else torch.zeros_like(lengths)
