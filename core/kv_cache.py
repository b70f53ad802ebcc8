"""The key-value cache of sampling: transformers' own, with attention layers that grow without copying.

What this is: ``new_cache`` gives a ``DynamicCache`` for a model's config; its plain full-attention layers are
replaced by ``GrowingLayer``, every other kind of layer (sliding window, recurrent, shared) stays as
transformers made it. ``kind_of`` says how rows of different prompt lengths may meet in one batch. All layers
answer ``reorder_cache``, the one operation that both copies a prompt's cache to its completions and drops
finished rows.

Legend: R rows, H key-value heads, T cached tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlx.core.lm_head import free_bytes

# Tokens of room added when a layer is full. More room means fewer copies, but rows that lie further apart,
# which slows attention down where a row's keys are few: 256 rows of 35 x 24 numbers take 0.55 ms without gaps
# and 1.2 ms with.
# Whole runs against concatenating at each token: 700-token prompts 1.26 times faster, 22-token prompts alike.
GROWTH = 16
# By name, not by class: which of them exist depends on the version of transformers.
PADDABLE = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer", "GrowingLayer"})
UNPADDABLE = frozenset(
    {
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    }
)


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one full-attention layer, in buffers with room for tokens to come.

    ``keys`` and ``values`` are views (R, H, T, D) of the filled part. A token is written in place where
    ``DynamicLayer`` would concatenate, that is, copy everything.
    """

    keys: Tensor
    values: Tensor
    key_buffer: Tensor
    value_buffer: Tensor
    filled: int

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (R, H, t, D) keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._hold(key_states, value_states, key_states.shape[-2])
            return self.keys, self.values
        start, end = self.filled, self.filled + key_states.shape[-2]
        if end > self.key_buffer.shape[-2]:
            self._grow(end + GROWTH)
        self.key_buffer[:, :, start:end] = key_states
        self.value_buffer[:, :, start:end] = value_states
        self._hold(self.key_buffer, self.value_buffer, end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx``, in that order; a row may come more than once or not at all."""
        if self.is_initialized:
            if self.filled == self.key_buffer.shape[-2]:
                self._grow(self.filled + GROWTH)  # before prompts become many rows, not at the next token
            index = beam_idx.to(self.keys.device)
            keys, values = self.key_buffer.index_select(0, index), self.value_buffer.index_select(0, index)
            self._hold(keys, values, self.filled)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, as in transformers."""
        if self.is_initialized:
            self._hold(self.key_buffer, self.value_buffer, self.filled + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.filled = 0

    def stack(self, layers: Sequence[GrowingLayer]) -> None:
        """Become the rows of filled layers below each other, their last columns in line."""
        filled = max(layer.filled for layer in layers)
        self.lazy_initialization(layers[0].keys, layers[0].values)

        def together(parts: list[Tensor]) -> Tensor:
            rows, (_, heads, _, size) = sum(len(part) for part in parts), parts[0].shape
            # Zeros, as a value that nobody attends to is still multiplied by 0.
            buffer = parts[0].new_zeros(rows, heads, filled + GROWTH, size)
            start = 0
            for part in parts:
                buffer[start : start + len(part), :, filled - part.shape[2] : filled] = part
                start += len(part)
            return buffer

        keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
        self._hold(together(keys), together(values), filled)

    def drop_columns(self, count: int) -> None:
        """Forget the first columns; their room stays taken until the layer grows or loses rows."""
        self._hold(self.key_buffer[:, :, count:], self.value_buffer[:, :, count:], self.filled - count)

    def _grow(self, capacity: int) -> None:
        self.key_buffer = _with_room(self.keys, capacity)
        self.value_buffer = _with_room(self.values, capacity)

    def _hold(self, key_buffer: Tensor, value_buffer: Tensor, filled: int) -> None:
        self.key_buffer, self.value_buffer, self.filled = key_buffer, value_buffer, filled
        self.keys, self.values = key_buffer[:, :, :filled], value_buffer[:, :, :filled]


def _with_room(filled: Tensor, capacity: int) -> Tensor:
    rows, heads, tokens, size = filled.shape
    buffer = filled.new_empty(rows, heads, capacity, size)
    buffer[:, :, :tokens] = filled
    return buffer


def new_cache(config: Any, growing: bool = True) -> DynamicCache:
    """An empty cache for a model.

    Args:
        config: the model's config.
        growing: replace plain full-attention layers by ``GrowingLayer``.
    """
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    if growing:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def joins(cache: DynamicCache) -> bool:
    """Whether ``joined`` and ``drop_columns`` work: every layer is a ``GrowingLayer``."""
    return bool(cache.layers) and all(type(layer) is GrowingLayer for layer in cache.layers)


def joined(caches: Sequence[DynamicCache], empty: DynamicCache) -> DynamicCache:
    """The rows of all caches below each other, their last columns in line.

    Args:
        caches: of one model, filled, any number of rows and columns.
        empty: a new cache of that model, which is filled and returned.
    """
    for number, layer in enumerate(empty.layers):
        layer.stack([cache.layers[number] for cache in caches])
    return empty


def drop_columns(cache: DynamicCache, count: int) -> None:
    """Forget the first columns of every layer."""
    for layer in cache.layers:
        layer.drop_columns(count)


def kind_of(cache: DynamicCache) -> Literal["padded", "equal", "unknown"]:
    """How rows may share a batch: with left padding, only with equal prompt lengths, or nobody knows."""
    names = {type(layer).__name__ for layer in cache.layers}
    if names and names <= PADDABLE:
        return "padded"
    return "equal" if names and names <= PADDABLE | UNPADDABLE else "unknown"


def rows_that_fit(decoder: PreTrainedModel, tokens: int, device: torch.device) -> int:
    """How many rows of so many tokens may be decoded together in half of the free memory, at least 1.

    Counts keys and values, once more while they are copied, and the logits in float32 with their temporaries.
    """
    config = decoder.config.get_text_config(decoder=True)
    # Names differ between architectures; state-space models have neither heads nor a cache that grows.
    heads = getattr(config, "num_attention_heads", None) or 0
    shared = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    cached = 2 * config.num_hidden_layers * shared * size * tokens * decoder.dtype.itemsize
    row = 2 * cached + 6 * 4 * config.vocab_size
    return int(max(1, free_bytes(device) // 2 // row))
