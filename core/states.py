"""Hidden states of chosen tokens, from one pass of a trunk over sequences. One door for all who want them.

A trunk that shares prefixes (``rlx.core.sharing``) gets the sequences as one row without padding; any other
gets them right-padded.

Legend: N sequences, T tokens of all sequences, L fed tokens of the longest, K wanted states, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlx.core.microbatch import cut, cut_trees
from rlx.core.sharing import row_states, shares

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from rlx.core.batch import Sequences


def states(trunk: nn.Module, sequences: Sequences, places: Tensor, *, masked: bool = True) -> Tensor:
    """The state after each of some tokens.

    Args:
        trunk: a transformers decoder without output head.
        sequences: at least one token, on the trunk's device.
        places: (K,) int64, places of the tokens in ``sequences.ids``; what comes after them is not fed.
        masked: whether padding must be told to the trunk.

    Returns:
        (K, D), in the order of places.
    """
    if shares(trunk):
        return row_states(trunk, sequences, places)
    inputs, rows, columns = padded(sequences, places, masked=masked)
    hidden_NLD: Tensor = trunk(**inputs)[0]
    return hidden_NLD[rows, columns]


def padded(sequences: Sequences, places: Tensor, *, masked: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Arguments of a forward pass over right-padded sequences, and where the wanted states will be.

    Args:
        sequences: at least one token.
        places: as in ``states``.
        masked: whether the arguments say what is padding.

    Returns:
        Keyword arguments with ids (N, L); rows (K,) and columns (K,).
    """
    real_NL = torch.arange(int(sequences.lengths.max()), device=places.device) < sequences.lengths[:, None]
    ids_NL = torch.zeros_like(real_NL, dtype=torch.long)
    ids_NL[real_NL] = sequences.ids
    rows = sequences.owners[places]
    columns = places - sequences.starts[rows]
    width = int(columns.max()) + 1 if len(columns) else 1  # a lone column must be fed for a gradient of zeros
    inputs: dict[str, Any] = {"input_ids": ids_NL[:, :width], "use_cache": False}
    if masked:
        inputs["attention_mask"] = real_NL[:, :width].long()
    return inputs, rows, columns


def micro_batches(
    trunks: Iterable[nn.Module | None], sequences: Sequences, budget: int, per_row: int = 1
) -> list[Tensor]:
    """Rows of each micro-batch, within a budget of the tokens that trunks are fed.

    Args:
        trunks: all that the sequences go through; None stands for a model that is called as a whole.
        sequences: N ≥ 0, on any device.
        budget: tokens of a forward pass, at least 1.
        per_row: adjacent sequences that stay together, 2 for preference pairs.

    Returns:
        Row numbers (K,) int64 of each micro-batch, every row once.
    """
    if all(trunk is not None and shares(trunk) for trunk in trunks):
        return cut_trees(sequences, budget, per_row)
    return cut(sequences.lengths, budget, per_row)
