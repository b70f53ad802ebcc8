"""Attention over sequences of different lengths by torch's own kernel, for half precision on CUDA.

The kernel is used only after it gave the numbers of plain attention, forward and backward, on a few tokens
of the shape at hand: queries fewer than keys must be aligned with them at the end, and a window counted as
here. Where it is missing or differs, plain attention does the work, and a warning says so.

Legend: M tokens of a row, H heads, K ≤ H heads of keys and values, D numbers a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

if TYPE_CHECKING:
    from rlx.core.tree import Tree

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
TOLERANCE = 0.02  # of the largest number: a few roundings of bfloat16


@dataclass(frozen=True)
class Ragged:
    """Which queries see which keys, in the kernel's terms: the two of a sequence end together.

    Attributes:
        keys: places in the row of all keys, sequence after sequence.
        query_ends: (sequences + 1,) int32, 0 and the end of each sequence among the queries.
        key_ends: the same among the keys.
        most_queries: of one sequence.
        most_keys: of one sequence.
        window: keys that a query sees, its own included; 0 for all before it.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int
    window: int

    @classmethod
    def of(cls, tree: Tree, window: int) -> Ragged:
        """Each chunk of a tree as a sequence whose keys are those of its prefix and its own."""
        device, sizes = tree.places.device, [len(chunk) for chunk in tree.chunks]
        starts = list(accumulate(sizes, initial=0))
        seen = [[number] if c.prefix is None else [c.prefix, number] for number, c in enumerate(tree.chunks)]
        totals = [sum(sizes[n] for n in chunks) for chunks in seen]
        keys = torch.cat([torch.arange(starts[n], starts[n + 1]) for chunks in seen for n in chunks])
        return cls(
            keys.to(device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor([0, *accumulate(totals)], dtype=torch.int32, device=device),
            max(sizes),
            max(totals),
            window,
        )


def attend(query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, scaling: float | None) -> Tensor:
    """Attention of one row.

    Args:
        query: (1, H, M, D).
        key: (1, K, M, D).
        value: likewise.
        ragged: who sees whom.
        scaling: factor on the scores; None for 1/√D.

    Returns:
        (1, M, H, D).
    """
    out: Tensor = _kernel()(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, ragged.keys),
        value[0].transpose(0, 1).index_select(0, ragged.keys),
        ragged.query_ends,
        ragged.key_ends,
        ragged.most_queries,
        ragged.most_keys,
        scale=scaling,
        window_size=(ragged.window - 1 if ragged.window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


def works(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attend`` can be trusted with such tensors; looked into once a shape."""
    if query.device.type != "cuda" or query.dtype not in HALF or {key.dtype, value.dtype} != {query.dtype}:
        return False
    return _checked(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], value.shape[3])


def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _checked(device: torch.device, dtype: torch.dtype, heads: int, pairs: int, width: int, out: int) -> bool:
    """Compare with plain attention; a warning tells why not."""
    try:
        # The first use may be inside a checkpointed layer, whose hooks would take these tensors for its own.
        own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with own, torch.enable_grad(), torch.autocast(device.type, enabled=False):
            worst = max(deviation(device, dtype, heads, pairs, width, out, window) for window in (0, 3))
    except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        logger.warning("torch's varlen_attn is not used: %s", str(error).strip().split("\n")[0])
        return False
    if worst > TOLERANCE:
        logger.warning("torch's varlen_attn is not used: it differs from plain attention by %.2g", worst)
    return worst <= TOLERANCE


def deviation(
    device: torch.device, dtype: torch.dtype, heads: int, pairs: int, width: int, out: int, window: int
) -> float:
    """How far outputs and gradients of ``attend`` are from plain attention, as a share of the largest.

    Args:
        device: where.
        dtype: of all tensors.
        heads: H.
        pairs: K.
        width: D of queries and keys.
        out: D of values.
        window: as in ``Ragged``.
    """
    from rlx.core.tree import Chunk, Tree

    prefix, branches = 5, (4, 2)
    chunks = (Chunk(((0, prefix),)), *(Chunk(((prefix, n),), 0) for n in branches))
    total, places = prefix + sum(branches), torch.arange(prefix + sum(branches), device=device)
    ragged = Ragged.of(Tree(places, places, places, chunks), window)
    random = torch.Generator().manual_seed(0)
    shapes = (heads, width), (pairs, width), (pairs, out)
    inputs = [
        torch.randn(1, h, total, d, generator=random).to(device, dtype).requires_grad_() for h, d in shapes
    ]
    owner = torch.repeat_interleave(torch.tensor([prefix, *branches], device=device))
    position = torch.cat([torch.arange(prefix), *(prefix + torch.arange(n) for n in branches)]).to(device)
    before = position[:, None] - position
    seen = ((owner[:, None] == owner) | (owner == 0)) & (before >= 0) & (before < (window or total))
    query, key, value = inputs
    found = attend(query, key, value, ragged, None)
    plain = sdpa(query.float(), key.float(), value.float(), attn_mask=seen, enable_gqa=heads != pairs)
    want = plain.transpose(1, 2)
    weights = torch.randn(want.shape, generator=random).to(device)
    pairs_of = [(found, want)]
    pairs_of += zip(
        *(torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (found, want)),
        strict=True,
    )
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs_of)
