"""Decoding in buffers that stay where they are: the same step for every token, so that it can be replayed.

What this is: ``Stage`` holds keys, values, ids, positions and mask of at most C rows and L tokens, and makes
one decode step in place, without asking the device anything. Rows stand in a bucket, a power of two; once
the living ones fit into a smaller one they move to its front. Each bucket is a view of the same storage, so
that a step has one address and one shape for each bucket. ``decode_static`` drives a ``Run`` of
``rlx.core.decoding`` with it: prompts, drawing and stopping are those of the ordinary loop.
What this leaves out: capturing a step as a CUDA graph (``rlx.core.cuda_graphs``); layers other than full
attention; samples that wait for a row.

Legend: C rows of the storage, R of the bucket, L tokens of a row, V vocabulary, H heads of keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlx.core.decode_loop import prefill
from rlx.core.decoding import Door, Rows, Run
from rlx.core.tree_attention import NAME as TREE
from rlx.plugins.contract import Sampling

LENGTHS = 64  # L is a multiple of it, so that rounds whose prompts are of about one length share a stage
ATTENTIONS = ("sdpa", TREE)  # which take a mask of truth values, (R, 1, 1, L), as it is
MOVING_ROPES = (
    "dynamic",
    "longrope",
)  # frequencies hang on the positions, which the device is asked for
HALF = (torch.bfloat16, torch.float16)
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""Largest difference of two steps' logits, as a share of the largest logit, that counts as rounding."""


def bucket(rows: int) -> int:
    """The smallest power of two that is at least so many rows."""
    return 1 << (rows - 1).bit_length()


def length_of(tokens: int) -> int:
    """L for rows of so many tokens."""
    return -(-tokens // LENGTHS) * LENGTHS


class StageLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one full-attention layer, (C, H, L, D); a token is written at the stage's column.

    transformers' ``StaticLayer`` would do for one number of rows; here ``keys`` and ``values`` are views of
    the bucket's rows.
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers, self.column = (keys, values), column
        self.narrow(len(keys))

    def narrow(self, rows: int) -> None:
        """Show the first rows only."""
        self.keys, self.values = (buffer[:rows] for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (R, H, 1, D) keys and values at the column; returns those of all columns."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values


class Stage:
    """What a step reads and writes, at fixed addresses.

    Args:
        door: the model.
        like: a cache that the model filled; ours is of its types and shapes.
        rows: C, a power of two.
        length: L.

    Attributes:
        rows: R, rows of the bucket that is in use.
        replay: what makes a step; the step itself, unless somebody has captured it.
    """

    def __init__(self, door: Door, like: DynamicCache, rows: int, length: int) -> None:
        self.door, self.most, self.length, self.rows = door, rows, length, rows
        device = door.device
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)
        self.cache = door.new_cache()
        self.cache.layers = [self._layer(layer) for layer in like.layers]
        self.replay: Callable[[Stage], Tensor] = Stage.step

    def _layer(self, like: Any) -> StageLayer:
        # Zeros: what was never written is multiplied by a weight of 0, and must be finite.
        keys, values = (
            one.new_zeros(self.most, one.shape[1], self.length, one.shape[3])
            for one in (like.keys, like.values)
        )
        return StageLayer(keys, values, self.column)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(b.numel() * b.element_size() for layer in self.cache.layers for b in layer.buffers)

    def load(self, cache: DynamicCache, index: Tensor, rows: Rows) -> None:
        """Begin with prompts that went through the model.

        Args:
            cache: a row a distinct prompt.
            index: the row of each of ours.
            rows: ours, at most C.
        """
        count, width = len(rows.live), rows.width
        self._use(bucket(count))
        for ours, filled in zip(self.cache.layers, cache.layers, strict=True):
            for buffer, prompt in zip(ours.buffers, (filled.keys, filled.values), strict=True):
                buffer[:count, :, :width] = prompt.index_select(0, index)
                buffer[:count, :, width:] = 0  # an ended row of before may have gone on to what is not finite
        self.column.fill_(width)
        self.positions.zero_()  # of rows that nobody has, too: they move on, and must not go too far
        self.positions[:count, 0] = width - rows.pads
        self.mask.zero_()
        self.mask[:, 0, 0, :width] = True
        if rows.mask is not None:
            self.mask[:count, 0, 0, :width] = rows.mask[:, :width]

    def keep(self, index: Tensor) -> None:
        """Move these rows, in ascending order, to the front, and use the bucket that holds them."""
        count = len(index)
        for layer in self.cache.layers:
            for buffer in layer.buffers:  # one at a time: the copy of one is all there is beside it
                buffer[:count] = buffer.index_select(0, index)
        for tensor in (self.positions, self.mask):
            tensor[:count] = tensor.index_select(0, index)
        self._use(bucket(count))

    def _use(self, rows: int) -> None:
        self.rows = rows
        for layer in self.cache.layers:
            layer.narrow(rows)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(r, V) logits after one more token in each of the first r ≤ R rows; (r,) tokens."""
        self.ids[: len(tokens), 0] = tokens
        return self.replay(self)[: len(tokens)]

    def step(self) -> Tensor:
        """(R, V) logits after the ids; the column moves on. No shape and no decision hangs on a number."""
        at = self.rows
        self.mask[:at].index_fill_(3, self.column, True)
        with uncached(self.door.device):
            logits = self.door(self.ids[:at], self.positions[:at], self.mask[:at], self.cache)
        self.positions[:at] += 1
        self.column += 1
        return logits

    def remember(self) -> Callable[[], None]:
        """What takes steps back, however often it is called; their keys are written over by the next."""
        moving = (self.column, self.positions, self.mask)
        before = [tensor.clone() for tensor in moving]

        def back() -> None:
            for tensor, value in zip(moving, before, strict=True):
                tensor.copy_(value)

        return back


def uncached(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast that casts weights anew: a replayed step must not read casts that are gone by then."""
    if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)


def decode_static(run: Run, samples: list[int], stage_for: Callable[[DynamicCache], Stage]) -> None:
    """Sample these from their first token to their last, as ``rlx.core.decode_loop.decode_shared`` does.

    Args:
        run: what was asked for.
        samples: at most C.
        stage_for: gives the stage, told the cache of the prompts.
    """
    prompts, index = run.rows(samples)
    cache, logits = prefill(run.door, prompts)
    rows, logits = run.expand(prompts, index, samples), logits[index]
    stage = stage_for(cache)
    stage.load(cache, index, rows)
    del cache  # the prompts' keys are in the stage
    while True:
        tokens, any_ended = run.draw(rows, logits)
        if any_ended:
            kept = rows.live.nonzero().squeeze(1)
            if not len(kept):
                return
            if bucket(len(kept)) < stage.rows:
                stage.keep(kept)
                rows, tokens = rows.keep(kept), tokens[kept]
        logits = stage(tokens)


@torch.no_grad()
def why_not(door: Door) -> str | None:
    """Whether a model can be decoded in this way: by what it declares, and by a few tokens.

    Args:
        door: the model, in evaluation mode.

    Returns:
        None if two steps of unlike prompts have the logits of the ordinary loop; else why not.
    """
    reason = _declared(door)
    if reason is not None:
        return reason
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(door.vocabulary, (size,), generator=draw).tolist() for size in (4, 7)]
    run = Run(door, prompts, 2, Sampling(4, greedy=True), [0, 1], None)
    try:
        prompts_once, index = run.rows(list(range(4)))
        cache, logits = prefill(door, prompts_once)
        logits = logits[index]
        stage = Stage(door, cache, 4, length_of(prompts_once.width + 4))
        cache.reorder_cache(index)
        rows = run.expand(prompts_once, index, list(range(4)))
        stage.load(cache, torch.arange(4, device=door.device), rows)
        for step in range(2):
            tokens = logits.argmax(-1)
            at = rows.width + step
            mask = None if rows.mask is None else rows.mask[:, : at + 1]
            logits = door(tokens[:, None], (at - rows.pads)[:, None], mask, cache)
            if (off := difference(stage(tokens), logits)) is not None:
                return f"its logits would be off by {off:.2g} of the largest"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with a mask and a cache that it does not know
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
    return None


def _declared(door: Door) -> str | None:
    config = door.decoder.config.get_text_config(decoder=True)
    if door.virtual_tokens:
        return "its adapter puts virtual tokens before the first one"
    if not door.joins:
        return "not all of its layers are full attention"
    attention = door.decoder.config._attn_implementation
    if attention not in ATTENTIONS:
        return f"its attention is {attention}, and sdpa is needed"
    if not (door.takes_positions and door.takes_mask):
        return "its forward takes no positions or no mask"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind in MOVING_ROPES:
        return f"its rotary frequencies change with the positions ({kind})"
    return None


def difference(one: Tensor, other: Tensor) -> float | None:
    """How far logits are apart, as a share of the largest; None where that is rounding."""
    most = HALF_TOLERANCE if one.dtype in HALF or other.dtype in HALF else TOLERANCE
    one, other = one.float(), other.float()
    off = float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
    return None if off <= most else off
