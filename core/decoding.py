"""The decode loop of sampling: shared prompts, one token a step for all live rows, finished rows dropped.

What this is: ``Run`` keeps what one call of ``generate`` has drawn so far; ``decode_shared`` drives the model
with our own cache. ``rlx.core.plain_generation`` drives the same ``Run`` by ``model.generate``.

Legend: R live rows of a batch, N samples, P prompt tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlx.core import kv_cache
from rlx.core.errors import DivergedError
from rlx.core.sampling import Sampler, StopRule, uniforms
from rlx.plugins.contract import Completions, Sampling

COMPACT_AT = 0.15  # share of finished rows at which they are dropped
Progress = Callable[[int, int], None]


class Door:
    """How a model wants to be called.

    Args:
        model: what is called, wrappers and all.
        decoder: the transformers model inside.
    """

    def __init__(self, model: nn.Module, decoder: PreTrainedModel) -> None:
        # DistributedDataParallel broadcasts buffers at each forward; processes take unequal numbers of steps.
        self.model: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.decoder = decoder
        self.vocabulary: int = decoder.get_input_embeddings().weight.shape[0]
        names = inspect.signature(decoder.forward).parameters
        self.cache_name = next((name for name in ("past_key_values", "cache_params") if name in names), "")
        self.takes_positions = "position_ids" in names
        self.takes_mask = "attention_mask" in names
        self.prefill_options = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        cacheable = self.cache_name and decoder._supports_default_dynamic_cache()
        if cacheable and not decoder.config.is_encoder_decoder:
            self.kind = kv_cache.kind_of(kv_cache.new_cache(decoder.config))
        else:
            self.kind = "unknown"
        self.device = decoder.get_input_embeddings().weight.device

    def __call__(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: DynamicCache, **options: Any
    ) -> Tensor:
        """(R, V) logits after the last of (R, t) ids; the cache grows by t."""
        if self.takes_positions:
            options["position_ids"] = positions
        if mask is not None:
            options["attention_mask"] = mask
        options[self.cache_name] = cache
        logits: Tensor = self.model(input_ids=ids, use_cache=True, **options).logits
        return logits[:, -1]


@dataclass
class Rows:
    """The rows of a batch, in the order of the model's cache.

    Attributes:
        samples: (R,) index of the sample.
        live: (R,) bool, not finished.
        uniform: (R, T) random numbers, None when greedy.
        tokens: (R, P + T) left-padded prompt, then the completion.
        pads: (R,) padding tokens in front.
        mask: (R, P + T) bool, False on padding; None if there is none.
        width: P, padding included.
    """

    samples: Tensor
    live: Tensor
    uniform: Tensor | None
    tokens: Tensor
    pads: Tensor
    mask: Tensor | None
    width: int

    def keep(self, index: Tensor) -> Rows:
        """Only these rows, in this order."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        picked: dict[str, Any] = {name: value.index_select(0, index) for name, value in tensors.items()}
        return replace(self, **picked)


class Run:
    """One call of ``generate``: its samples, and what they have become so far.

    Args:
        door: the model.
        prompts: token ids.
        n: samples a prompt.
        sampling: how to draw.
        seeds: one a prompt.
        tokenizer: for stop strings.
        on_progress: called with (finished, all) samples.
    """

    def __init__(
        self,
        door: Door,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        tokenizer: Any,
        on_progress: Progress | None,
    ) -> None:
        self.door, self.prompts, self.n, self.on_progress = door, prompts, n, on_progress
        self.length = sampling.max_new_tokens
        total, device = len(prompts) * n, door.device
        self.sampler = Sampler(sampling)
        self.stop_rule = StopRule(sampling, tokenizer, door.vocabulary, device)
        self.uniform = None if sampling.greedy else uniforms(seeds, n, self.length).to(device)
        self.tokens = torch.zeros(total, self.length, dtype=torch.long, device=device)
        self.logps = torch.zeros(total, self.length, device=device)
        self.lengths = torch.full((total,), self.length, device=device)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=device)
        self.done = 0

    def batches(self, batch_size: int | None) -> Iterator[list[int]]:
        """Samples that are decoded together: those with prompts of like length, as many as fit."""
        order = sorted(range(len(self.prompts)), key=lambda i: (len(self.prompts[i]), self.prompts[i]))
        longest = len(self.prompts[order[-1]]) + self.length
        size = batch_size or kv_cache.rows_that_fit(self.door.decoder, longest, self.door.device)
        batch: list[int] = []
        for sample in (i * self.n + k for i in order for k in range(self.n)):
            new_length = batch and len(self.prompts[batch[-1] // self.n]) != len(
                self.prompts[sample // self.n]
            )
            if len(batch) == size or (new_length and self.door.kind != "padded"):
                yield batch
                batch = []
            batch.append(sample)
        yield batch

    def rows(self, samples: list[int]) -> tuple[Rows, Tensor]:
        """Rows of one distinct prompt each, with room for the completion; and the row of each sample."""
        distinct: dict[tuple[int, ...], int] = {}
        which = [distinct.setdefault(tuple(self.prompts[s // self.n]), len(distinct)) for s in samples]
        width, device = max(map(len, distinct)), self.door.device
        # A prompt's own first token pads it: a repetition penalty must meet no other token.
        ids = [[p[0]] * (width - len(p)) + list(p) + [0] * self.length for p in distinct]
        pads = torch.tensor([width - len(p) for p in distinct], device=device)
        column = torch.arange(width + self.length, device=device)
        mask = column >= pads[:, None] if any(len(p) != width for p in distinct) else None
        index = torch.tensor(which, device=device)
        live = torch.ones(len(distinct), dtype=torch.bool, device=device)
        return Rows(index, live, None, torch.tensor(ids, device=device), pads, mask, width), index

    def expand(self, rows: Rows, index: Tensor, samples: list[int]) -> Rows:
        """One row a sample from one row a prompt."""
        chosen = torch.tensor(samples, device=index.device)
        uniform = None if self.uniform is None else self.uniform[chosen]
        return replace(rows.keep(index), samples=chosen, uniform=uniform)

    def draw(self, rows: Rows, logits: Tensor, step: int) -> tuple[Tensor, bool]:
        """Draw each row's next token, write it down, and take rows that end with it from the living.

        Args:
            rows: the batch; ``tokens`` and ``live`` are changed in place.
            logits: (R, V).
            step: completion tokens drawn before.

        Returns:
            (R,) tokens, those of dead rows without meaning, and whether a row ended.

        Raises:
            DivergedError: logits of a live row are not finite.
        """
        at = rows.width + step
        history = rows.tokens[:, :at] if self.sampler.needs_history else None
        tokens, logps = self.sampler(logits, history, None if rows.uniform is None else rows.uniform[:, step])
        rows.tokens[:, at] = tokens
        self.tokens[rows.samples, step] = tokens
        self.logps[rows.samples, step] = logps
        ended = self.stop_rule(tokens, rows.tokens[:, rows.width : at + 1]) & rows.live
        broken = logps.isfinite().logical_not_() & rows.live
        # The one wait for the device in a step.
        any_ended, any_broken = torch.stack((ended.any(), broken.any())).tolist()
        if any_broken:
            raise self.diverged(rows.samples[broken], step)
        if any_ended:
            finished = rows.samples[ended]
            self.lengths[finished] = step + 1
            self.stopped[finished] = True
            rows.live &= ~ended
            self.report(len(finished))
        return tokens, any_ended

    def report(self, finished: int) -> None:
        """Tell how many samples are complete."""
        self.done += finished
        if self.on_progress is not None and finished:
            self.on_progress(self.done, len(self.prompts) * self.n)

    def diverged(self, samples: Tensor, step: int) -> DivergedError:
        """The error for logits that are not finite; tokens and samples count from 0."""
        sample = int(samples.min())
        return DivergedError(
            f"generation produced non-finite logits at token {step} (sample {sample})",
            where=f"prompt {sample // self.n}, completion {sample % self.n} of {self.n}",
            got=f"NaN or infinity in {len(samples)} of the samples at this token",
            expected="finite logits",
            hint="the weights have diverged or overflow in this dtype: lower learning_rate, or use float32",
        )

    def completions(self) -> Completions:
        """All samples as lists."""
        lengths = self.lengths.tolist()
        ids = [row[:length] for row, length in zip(self.tokens.tolist(), lengths, strict=True)]
        logps = [row[:length] for row, length in zip(self.logps.tolist(), lengths, strict=True)]
        return Completions(ids, logps, self.stopped.tolist())


def decode_shared(run: Run, samples: list[int]) -> None:
    """Sample these from their first token to their last: each distinct prompt once, finished rows dropped."""
    cache = kv_cache.new_cache(run.door.decoder.config)
    rows, index = run.rows(samples)
    logits = prefill(run.door, rows, cache)
    if len(rows.live) < len(samples):
        cache.reorder_cache(index)
    rows, logits = run.expand(rows, index, samples), logits[index]
    for step in range(run.length):
        tokens, any_ended = run.draw(rows, logits, step)
        if any_ended:
            kept = rows.live.nonzero().squeeze(1)
            if len(kept) == 0:
                return
            if len(kept) <= (1 - COMPACT_AT) * len(rows.live):
                cache.reorder_cache(kept)
                rows, tokens = rows.keep(kept), tokens[kept]
        if step + 1 < run.length:
            at = rows.width + step
            mask = None if rows.mask is None else rows.mask[:, : at + 1]
            logits = run.door(tokens[:, None], (at - rows.pads)[:, None], mask, cache)
    run.report(int(rows.live.sum()))


def prefill(door: Door, rows: Rows, cache: DynamicCache) -> Tensor:
    """Run the prompts through the model into the cache; returns (R, V) logits of the first new token."""
    column = torch.arange(rows.width, device=rows.pads.device)
    positions = (column - rows.pads[:, None]).clamp_(min=0)
    mask = None if rows.mask is None else rows.mask[:, : rows.width]
    return door(rows.tokens[:, : rows.width], positions, mask, cache, **door.prefill_options)
