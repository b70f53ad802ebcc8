"""Sampling completions from any transformers decoder, without gradient.

What this is: each distinct prompt is run once and its key-value cache copied to its completions; rows that
are finished leave the batch, and where samples wait, these take their places; every token's log-prob is
recorded as it is drawn. Greedy output equals ``model.generate`` token for token. What this leaves out: beam
search, encoder-decoder models. A model whose cache is unknown, or whose adapter puts virtual tokens before
the prompt, is decoded by ``model.generate`` (``rlx.core.plain_generation``), said once.

A sample depends on the weights, its prompt, its prompt's seed and its index, not on what else is in the
batch: each (sample, position) has its own uniform number. Padding and batch size change logits in the last
bits, so this holds up to float error: two runs part where a uniform number lies that close to the border of
two tokens.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlx.core.decode_loop import decode_shared
from rlx.core.decoding import Door, Run
from rlx.core.errors import DataError
from rlx.core.packed_linear import LEAST_STEPS, packed
from rlx.core.plain_generation import decode_by_generate
from rlx.core.sampling import check
from rlx.plugins.contract import Completions, Sampling
from rlx.plugins.telling import OnComplete

log = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    tokenizer: Any = None,
    batch_size: int | None = None,
    accelerator: Any = None,
    on_complete: OnComplete | None = None,
    plain: bool = False,
    packed_weights: bool = True,
) -> Completions:
    """Sample n completions of each prompt.

    Args:
        model: a causal language model of transformers, also inside PEFT or accelerate's wrapper.
        prompts: token ids, none empty.
        n: completions a prompt.
        sampling: how to draw; nothing is taken from the model's own generation config.
        seeds: one a prompt.
        tokenizer: needed for stop strings only.
        batch_size: completions sampled at a time; None: as many as memory allows.
        accelerator: its autocast applies, if given.
        on_complete: called with completions that will not change any more, each once.
        plain: decode by ``model.generate``: the same contract, without shared prompts and dropped rows.
        packed_weights: lay the weights out for products of few rows where it pays (``packed_linear``).

    Returns:
        Completions, n adjacent ones a prompt.

    Raises:
        ConfigError: sampling options that have no meaning for this model.
        DataError: an empty prompt, an unknown token, or a prompt that leaves no room for a completion.
        DivergedError: logits that are not finite.
    """
    decoder = decoder_of(model)
    check_prompts(decoder, prompts, seeds, sampling)
    if not prompts or n == 0:
        return Completions([], [], [])
    door = Door(model, decoder)
    if door.kind == "unknown" and not plain:
        say_fallback(type(decoder).__name__ + (" with virtual tokens" if door.virtual_tokens else ""))
    run = Run(door, prompts, n, sampling, seeds, tokenizer, on_complete)
    pays = packed_weights and not plain and sampling.max_new_tokens >= LEAST_STEPS
    with (
        sampling_mode(model),
        accelerator.autocast() if accelerator is not None else contextlib.nullcontext(),
        packed(model) if pays else contextlib.nullcontext(),
    ):
        _decode(run, batch_size, plain)
    return run.completions()


def _decode(run: Run, batch_size: int | None, plain: bool) -> None:
    """Sample all of a run."""
    decode = decode_by_generate if plain or run.door.kind == "unknown" else decode_shared
    batches = run.batches(batch_size)
    if decode is decode_shared and run.may_join:
        first, *others = batches
        decode_shared(run, first, [sample for samples in others for sample in samples])
    else:
        for samples in batches:
            decode(run, samples)


@contextlib.contextmanager
def sampling_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of the block; afterwards each module's mode is what it was.

    In evaluation mode transformers neither drops out nor checkpoints gradients: no other flag has to move.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def decoder_of(model: Any) -> PreTrainedModel:
    """The transformers model inside PEFT's and the data-parallel wrappers."""
    while not isinstance(model, PreTrainedModel):
        # PeftModel has get_base_model, DistributedDataParallel has module; importing peft to ask is slow.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model.module
    return model


def check_prompts(
    decoder: PreTrainedModel, prompts: list[list[int]], seeds: Sequence[int], sampling: Sampling
) -> None:
    """Refuse sampling options and prompts this model cannot serve.

    Raises:
        ConfigError: an option out of bounds.
        DataError: an empty prompt, an unknown token id, or no room for ``max_new_tokens`` below the longest
            sequence the model knows.
    """
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    check(sampling, vocabulary)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    # State-space models have no limit and no such attribute.
    limit = getattr(decoder.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        where = f"prompt {index}"
        if not prompt:
            raise DataError("a prompt is empty", code="E-DATA-EMPTY-PROMPT", where=where)
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise DataError(
                "a prompt has a token the model does not know",
                code="E-DATA-TOKEN",
                where=where,
                got=f"token ids {min(prompt)} to {max(prompt)}",
                expected=f"0 to {vocabulary - 1}",
            )
        if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
            raise DataError(
                "a prompt leaves no room for its completion",
                code="E-DATA-CONTEXT",
                where=where,
                got=f"{len(prompt)} prompt tokens + {sampling.max_new_tokens} new tokens",
                expected=f"at most {limit} together (max_position_embeddings)",
                hint="lower max_completion_length or max_prompt_length",
            )


@functools.cache
def say_fallback(architecture: str) -> None:
    """Warn, once an architecture, that its cache is unknown."""
    log.warning(
        "%s has a cache that rlx does not know: completions come from model.generate, slower but the same",
        architecture,
    )
