"""What sampling keeps: how a model is called, the rows of a batch, and what one call of ``generate`` drew.

What this is: ``Run`` draws each row's next token and writes it down. Two loops drive it: ``core.decode_loop``
the model with our own cache, ``core.plain_generation`` ``model.generate``.

Legend: R live rows of a batch, N samples, P prompt tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlx.core import kv_cache
from rlx.core.errors import DivergedError
from rlx.core.sampling import Sampler, StopRule, uniforms
from rlx.plugins.contract import Completions, Sampling
from rlx.plugins.telling import Complete, OnComplete


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
        self.kind, self.joins = "unknown", False
        adapter = getattr(self.model, "active_peft_config", None)  # importing peft to ask is slow
        # Prompt and prefix tuning: peft puts them before a prompt, once, in its own generate alone.
        self.virtual_tokens = adapter is not None and adapter.is_prompt_learning
        cacheable = self.cache_name and decoder._supports_default_dynamic_cache()
        if cacheable and not self.virtual_tokens and not decoder.config.is_encoder_decoder:
            cache = self.new_cache()
            self.kind, self.joins = kv_cache.kind_of(cache), kv_cache.joins(cache)
        self.device = decoder.get_input_embeddings().weight.device

    def new_cache(self) -> DynamicCache:
        """An empty cache."""
        return kv_cache.new_cache(self.decoder.config)

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
        tokens: (R, P + T) left-padded prompt, then the completion; (R, 0) once others have joined.
        pads: (R,) padding columns in front.
        steps: (R,) completion tokens drawn so far.
        mask: (R, at + T) bool, False on padding; None if there is none.
        width: P, padding included.
        at: columns that are filled, those of drawn tokens included.
        some_dead: a finished row may be among them.
    """

    samples: Tensor
    live: Tensor
    uniform: Tensor | None
    tokens: Tensor
    pads: Tensor
    steps: Tensor
    mask: Tensor | None
    width: int
    at: int
    some_dead: bool = False

    def keep(self, index: Tensor) -> Rows:
        """Only these rows, in this order; finished ones are not among them."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        picked: dict[str, Any] = {name: value.index_select(0, index) for name, value in tensors.items()}
        return replace(self, some_dead=False, **picked)


class Run:
    """One call of ``generate``: its samples, and what they have become so far.

    Args:
        door: the model.
        prompts: token ids.
        n: samples a prompt.
        sampling: how to draw.
        seeds: one a prompt.
        tokenizer: for stop strings.
        on_complete: called with samples that will not change any more.
    """

    def __init__(
        self,
        door: Door,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        tokenizer: Any,
        on_complete: OnComplete | None = None,
    ) -> None:
        self.door, self.prompts, self.n = door, prompts, n
        self.on_complete = on_complete
        self.length = sampling.max_new_tokens
        self.longest = max(map(len, prompts)) + self.length  # a model may have positions for no more
        total, device = len(prompts) * n, door.device
        self.sampler = Sampler(sampling)
        self.stop_rule = StopRule(sampling, tokenizer, door.vocabulary, device)
        self.uniform = None if sampling.greedy else uniforms(seeds, n, self.length).to(device)
        self.tokens = torch.zeros(total, self.length, dtype=torch.long, device=device)
        self.logps = torch.zeros(total, self.length, device=device)
        self.lengths = torch.full((total,), self.length, device=device)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=device)

    def batches(self, batch_size: int | None) -> Iterator[list[int]]:
        """Samples that are decoded together: those with prompts of like length, as many as fit."""
        order = sorted(range(len(self.prompts)), key=lambda i: (len(self.prompts[i]), self.prompts[i]))
        size = batch_size or kv_cache.rows_that_fit(self.door.decoder, self.longest, self.door.device)
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
        """Rows of one distinct prompt each, with room for the completion; and the row of each sample.

        They come in the order of the samples: ``batches`` gives those of the shortest prompts first.
        """
        distinct: dict[tuple[int, ...], int] = {}
        which = [distinct.setdefault(tuple(self.prompts[s // self.n]), len(distinct)) for s in samples]
        width, device = max(map(len, distinct)), self.door.device
        # A prompt's own first token pads it: a repetition penalty must meet no other token.
        ids = [[p[0]] * (width - len(p)) + list(p) + [0] * self.length for p in distinct]
        pads = torch.tensor([width - len(p) for p in distinct], device=device)
        index = torch.tensor(which, device=device)
        live = torch.ones(len(distinct), dtype=torch.bool, device=device)
        mask = mask_of(pads, width + self.length) if any(len(p) != width for p in distinct) else None
        tokens, steps = torch.tensor(ids, device=device), torch.zeros_like(pads)
        return Rows(index, live, None, tokens, pads, steps, mask, width, width), index

    def expand(self, rows: Rows, index: Tensor, samples: list[int]) -> Rows:
        """One row a sample from one row a prompt."""
        chosen = torch.tensor(samples, device=index.device)
        uniform = None if self.uniform is None else self.uniform[chosen]
        return replace(rows.keep(index), samples=chosen, uniform=uniform)

    @property
    def may_join(self) -> bool:
        """Whether samples that wait may join others: nothing looks back at what a row has drawn."""
        return self.door.joins and not (self.sampler.needs_history or self.stop_rule.strings is not None)

    def draw(self, rows: Rows, logits: Tensor) -> tuple[Tensor, bool]:
        """Draw each row's next token, write it down, and take rows that end with it from the living.

        Args:
            rows: the batch; ``tokens``, ``live``, ``steps`` and ``at`` are changed in place.
            logits: (R, V).

        Returns:
            (R,) tokens, those of dead rows without meaning, and whether a row ended.

        Raises:
            DivergedError: logits of a live row are not finite.
        """
        at, steps = rows.at, rows.steps
        history = rows.tokens[:, :at] if self.sampler.needs_history else None
        uniform = None if rows.uniform is None else rows.uniform.gather(1, steps[:, None])[:, 0]
        tokens, logps = self.sampler(logits, history, uniform)
        cells = rows.samples, steps
        if rows.some_dead:  # what a cut row has drawn last must stay
            tokens = torch.where(rows.live, tokens, self.tokens[cells])
            logps = torch.where(rows.live, logps, self.logps[cells])
        self.tokens[cells], self.logps[cells] = tokens, logps
        drawn = tokens[:, None]
        if rows.tokens.shape[1]:
            rows.tokens[:, at] = tokens
            drawn = rows.tokens[:, rows.width : at + 1]
        stopped = self.stop_rule(tokens, drawn) & rows.live
        ended = stopped | (rows.live & (steps == self.length - 1))
        broken = logps.isfinite().logical_not_() & rows.live
        # The one wait for the device in a step.
        any_ended, any_broken = torch.stack((ended.any(), broken.any())).tolist()
        if any_broken:
            samples, counts = rows.samples[broken], steps[broken]  # rows that joined are at other tokens
            raise self.diverged(samples, int(counts[samples.argmin()]))
        if any_ended:
            finished = rows.samples[ended]
            self.lengths[finished] = steps[ended] + 1
            self.stopped[rows.samples[stopped]] = True
            rows.live &= ~ended
            rows.some_dead = True
            self.report(finished)
        rows.steps, rows.at = (steps + 1).clamp_(max=self.length - 1), at + 1  # dead rows stay in bounds
        return tokens, any_ended

    def report(self, samples: Tensor) -> None:
        """Tell that samples are complete: their tokens, lengths and stops are final."""
        if self.on_complete is not None:
            tables = (samples, self.tokens[samples], self.lengths[samples], self.stopped[samples])
            rows = zip(*(table.tolist() for table in tables), strict=True)
            self.on_complete(
                [Complete(s // self.n, s % self.n, ids[:end], stopped) for s, ids, end, stopped in rows]
            )

    def diverged(self, samples: Tensor, step: int) -> DivergedError:
        """The error for logits that are not finite; ``step`` is the token of the first sample, from 0."""
        sample = int(samples.min())
        return DivergedError(
            f"generation produced non-finite logits at token {step} (sample {sample})",
            where=f"prompt {sample // self.n}, completion {sample % self.n} of {self.n}",
            got=f"NaN or infinity in {len(samples)} of the samples at once",
            expected="finite logits",
            hint="the weights have diverged or overflow in this dtype: lower learning_rate, or use float32",
        )

    def completions(self) -> Completions:
        """All samples as lists."""
        lengths = self.lengths.tolist()
        ids = [row[:length] for row, length in zip(self.tokens.tolist(), lengths, strict=True)]
        logps = [row[:length] for row, length in zip(self.logps.tolist(), lengths, strict=True)]
        return Completions(ids, logps, self.stopped.tolist())


def mask_of(pads: Tensor, columns: int) -> Tensor:
    """(R, columns) bool, False on the padding in front."""
    return torch.arange(columns, device=pads.device) >= pads[:, None]
