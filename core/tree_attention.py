"""An attention implementation for transformers under which a row of sequences is what ``rlx.core.tree`` says.

Attention function and mask function are registered together: the mask function answers with a ``TreeMask``,
which reaches every layer as its mask, through gradient checkpointing too. Which earlier token a layer sees
(all, a sliding window, a block) is the model's own rule, asked about positions within a sequence instead of
places in the row. Without a tree in force both do what ``sdpa`` does.
Leaves out: finding out whether a model can do with it (``rlx.core.sharing``).

Legend: M tokens of the row, H heads, K ≤ H heads of keys and values, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlx.core import varlen
from rlx.core.tree import Chunk, Tree
from rlx.core.varlen import Ragged

NAME = "rlx_tree"
"""Under which transformers knows it (``model.set_attn_implementation``)."""

HARMLESS = {"position_ids", "cache_position", "sliding_window", "use_cache", "output_attentions"}
"""What layers pass on that does not change what attention computes, or is part of the mask."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, position of a query, position of a key) → whether the one sees the other; broadcast."""

_force: ContextVar[tuple[Tree, list[TreeMask]] | None] = ContextVar("tree", default=None)


class NotATreeError(Exception):
    """A layer does what cannot be done, or was not asked for, with a tree."""


@contextmanager
def in_force(tree: Tree) -> Iterator[list[TreeMask]]:
    """Within it a forward pass takes its one row for a tree.

    Yields:
        The masks that layers were given, one a kind of layer, filled as the pass goes on.
    """
    masks: list[TreeMask] = []
    token = _force.set((tree, masks))
    try:
        yield masks
    finally:
        _force.reset(token)


class TreeMask:
    """What a layer gets as its mask: the tree, and which earlier positions the layer sees.

    Attributes:
        tree: the row.
        rule: the model's own.
        local: positions that a token sees, itself included, as the model declares them; 0 for all.
        asked: how often a layer has attended with it.
    """

    def __init__(self, tree: Tree, rule: Rule, local: int) -> None:
        self.tree, self.rule, self.local, self.asked = tree, rule, local, 0
        self._biases: dict[tuple[torch.dtype, torch.device], list[Tensor | None]] = {}

    def biases(self, like: Tensor) -> list[Tensor | None]:
        """What is added to the scores of each chunk, (queries, keys), 0 or −inf; None: simply causal."""
        key = like.dtype, like.device
        if key not in self._biases:
            self._biases[key] = [
                None if seen is None else like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
                for seen in map(self._seen, self.tree.chunks)
            ]
        return self._biases[key]

    @cached_property
    def ragged(self) -> Ragged | None:
        """What a kernel for variable lengths is told; None if it cannot be told all."""
        if any(len(chunk.pieces) > 1 for chunk in self.tree.chunks) or not self._is_window():
            return None
        return Ragged.of(self.tree, self.local)

    def _is_window(self) -> bool:
        """Whether the last two tokens see a window of the declared size; were it a block, one would not."""
        last = int(self.tree.positions.max())
        key = torch.arange(last + 1, device=self.tree.places.device)
        query = torch.tensor([[last], [max(0, last - 1)]], device=key.device)
        zero = key.new_zeros(())
        window = (key <= query) & (query - key < (self.local or last + 1))
        return bool((self.rule(zero, zero, query, key[None, :]) == window).all())

    def _seen(self, chunk: Chunk) -> Tensor | None:
        """(queries, keys) bool, which key each token sees; None if it is all that are not later."""
        queries, owners = _places(chunk, self.tree.places.device)
        keys = queries
        visible = (owners[:, None] == owners) | (owners == 0)
        if chunk.prefix is not None:
            before, _ = _places(self.tree.chunks[chunk.prefix], queries.device)
            keys = torch.cat([before, queries])
            visible = torch.cat([visible.new_ones(len(queries), len(before)), visible], 1)
        zero = queries.new_zeros(())
        seen = visible & self.rule(zero, zero, queries[:, None], keys[None, :])
        if len(keys) == len(queries) and bool((seen == torch.ones_like(seen).tril()).all()):
            return None
        return seen


def _places(chunk: Chunk, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position of each token of a chunk, and the number of its piece."""
    positions = [torch.arange(first, first + tokens, device=device) for first, tokens in chunk.pieces]
    tokens = torch.tensor([tokens for _, tokens in chunk.pieces], device=device)
    return torch.cat(positions), torch.repeat_interleave(tokens)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it.

    Args:
        module: the layer.
        query: (1, H, M, D); any shape that ``sdpa`` takes where the mask is not a tree's.
        key: (1, K, M, D).
        value: likewise.
        attention_mask: what the mask function gave.
        scaling: factor on the scores; None for 1/√D.
        dropout: probability on the attention weights.
        is_causal: False is not for trees.
        options: what else the layer passes on.

    Returns:
        (1, M, H, D), and None in the place of weights.

    Raises:
        NotATreeError: a tree is in force and this layer's attention is of another kind.
    """
    if not isinstance(attention_mask, TreeMask):
        if _force.get() is not None:
            raise NotATreeError(f"{type(module).__name__} makes its own mask")
        inner: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
            **options,
        )
        return inner
    attention_mask.asked += 1
    other = sorted(name for name, x in options.items() if name not in HARMLESS and x is not None)
    if other or is_causal is False or query.shape[2] != key.shape[2] or len(query) != 1:
        raise NotATreeError(f"{type(module).__name__} does more than attention: {', '.join(other)}")
    if dropout == 0.0 and varlen.works(query, key, value):
        ragged = attention_mask.ragged
        if ragged is not None:
            return varlen.attend(query, key, value, ragged, scaling), None
    return _by_chunk(query, key, value, attention_mask, scaling, dropout), None


def _by_chunk(
    query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, scaling: float | None, dropout: float
) -> Tensor:
    """(1, M, H, D), a call of attention for each chunk."""
    chunks = mask.tree.chunks
    sizes = [len(chunk) for chunk in chunks]
    # split and cat, whose gradients are cat and split: slices would give a zero-filled row each.
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    found = []
    for number, (chunk, bias) in enumerate(zip(chunks, mask.biases(query), strict=True)):
        k, v = keys[number], values[number]
        if chunk.prefix is not None:
            k, v = torch.cat([keys[chunk.prefix], k], 2), torch.cat([values[chunk.prefix], v], 2)
        out = sdpa(
            queries[number],
            k,
            v,
            attn_mask=bias,
            dropout_p=dropout,
            is_causal=bias is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        found.append(out.transpose(1, 2))
    return torch.cat(found, 1)


def mask(**options: Any) -> Any:
    """The mask of a kind of layer: a ``TreeMask`` where a tree is in force, else what ``sdpa`` gets.

    Args:
        options: as transformers gives them, by name.
    """
    force = _force.get()
    if force is None:
        return sdpa_mask(**options)
    tree, masks = force
    if options["q_length"] != len(tree) or options["batch_size"] != 1:
        raise NotATreeError("a mask for other tokens than the row's")
    masks.append(TreeMask(tree, options["mask_function"], options.get("local_size") or 0))
    return masks[-1]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
