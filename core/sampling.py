"""Drawing tokens: one uniform number a (sample, position), inverse of the cumulative distribution.

What this is: the options of ``Sampling`` turned into transformers' own logits processors, in the order in
which ``model.generate`` applies them; and a draw that depends on nothing but its logits and its uniform
number, so that a sample is the same whatever else is in the batch.

Legend: R rows, V vocabulary, T new tokens, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlx.core.errors import ConfigError
from rlx.plugins.contract import Sampling


def check(sampling: Sampling, vocabulary: int) -> None:
    """Refuse sampling options that have no meaning.

    Args:
        sampling: the options.
        vocabulary: V, how many tokens the model knows.

    Raises:
        ConfigError: naming the option, the value and what is allowed.
    """
    allowed: tuple[tuple[str, bool, str], ...] = (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 < sampling.temperature < math.inf, "above 0; greedy takes the most likely token"),
        (
            "top_k",
            0 <= sampling.top_k <= vocabulary,
            f"0 for all, or at most the vocabulary, {vocabulary}",
        ),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= sampling.min_p <= 1, "between 0 and 1"),
        ("repetition_penalty", 0 < sampling.repetition_penalty < math.inf, "above 0; 1 for none"),
        ("stop_strings", all(sampling.stop_strings), "texts of at least one character"),
    )
    for name, good, expected in allowed:
        if not good:
            value = getattr(sampling, name)
            raise ConfigError(
                f"sampling option {name!r} has a value that is not allowed",
                code="E-CONFIG-VALUE",
                got=repr(value)[:80],
                expected=expected,
            )


def processors(sampling: Sampling) -> LogitsProcessorList:
    """The processors for these options, temperature included, in the order of ``model.generate``."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.greedy:  # generate leaves out what only changes how to draw
        return chain
    if sampling.temperature != 1:
        chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain


def uniforms(seeds: Sequence[int], n: int, length: int) -> Tensor:
    """The random numbers of n samples a prompt.

    Args:
        seeds: one a prompt.
        n: samples a prompt.
        length: T, numbers a sample.

    Returns:
        (N, T) float32 in [0, 1), on the CPU; n adjacent rows belong to one prompt.
    """
    drawn = [torch.rand((n, length), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(drawn) if drawn else torch.empty(0, length)


def inverse_cdf(cdf: Tensor, uniform: Tensor) -> Tensor:
    """The token whose stretch of the cumulative distribution holds the uniform number.

    Args:
        cdf: (R, V) float32, cumulative weights of any positive total.
        uniform: (R,) float32 in [0, 1).

    Returns:
        (R,) int64; never a token of weight 0. Any token where the weights are not finite.
    """
    total = cdf[:, -1:]
    # u·total may round up to total, which no token lies above.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp_(max=cdf.shape[-1] - 1)


class Sampler:
    """Draws one token a row and tells its log-prob.

    Args:
        sampling: the options.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.greedy
        self.temperature = sampling.temperature
        chain = processors(sampling)
        self.needs_history = sampling.repetition_penalty != 1
        # A chain of the temperature alone is what the log-prob needs anyway.
        self.chain = None if all(isinstance(p, TemperatureLogitsWarper) for p in chain) else chain

    def __call__(
        self, logits: Tensor, history: Tensor | None, uniform: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Draw.

        Args:
            logits: (R, V) of the next token, any float type.
            history: (R, t) the tokens so far, for the repetition penalty; padding must repeat a token of
                its own row.
            uniform: (R,) float32, None when greedy.

        Returns:
            (R,) int64 tokens, and (R,) float32 their log-probs under softmax(logits / temperature), before
            any truncation; not finite where the logits were not.
        """
        raw = logits.float()
        scaled = raw / self.temperature if self.temperature != 1 else raw
        top = scaled.amax(-1, keepdim=True)
        weights = (scaled - top).exp_()
        if self.greedy or uniform is None:
            total = weights.sum(-1, keepdim=True)
            tokens = (raw if self.chain is None else self.chain(history, raw)).argmax(-1)
        else:
            cdf = weights.cumsum(-1)
            total = cdf[:, -1:]
            if self.chain is not None:
                cdf = self.chain(history, raw).softmax(-1).cumsum(-1)
            tokens = inverse_cdf(cdf, uniform)
        logps = (scaled.gather(1, tokens[:, None]) - top - total.log()).squeeze(1)
        return tokens, logps


class StopRule:
    """Which rows end with the token just drawn.

    Args:
        sampling: the options.
        tokenizer: needed for stop strings.
        vocabulary: V.
        device: where the tokens are.

    Raises:
        ConfigError: stop strings without a tokenizer, or with one in which they cannot be matched.
    """

    def __init__(self, sampling: Sampling, tokenizer: Any, vocabulary: int, device: torch.device) -> None:
        self.stops = torch.zeros(
            max((vocabulary, *(i + 1 for i in sampling.stop_token_ids))), dtype=torch.bool
        )
        self.stops[torch.tensor(sampling.stop_token_ids, dtype=torch.long)] = True
        self.stops = self.stops.to(device)
        self.strings: StopStringCriteria | None = None
        if sampling.stop_strings:
            self.strings = _stop_strings(tokenizer, list(sampling.stop_strings))

    def __call__(self, tokens: Tensor, completion: Tensor) -> Tensor:
        """(R,) bool: the row ends.

        Args:
            tokens: (R,) int64 just drawn.
            completion: (R, t) int64 the completion so far, these tokens included.
        """
        ended = self.stops[tokens]
        # Only the completion is looked at: a stop string must not begin in the prompt.
        return ended | self.strings(completion, None) if self.strings is not None else ended


def _stop_strings(tokenizer: Any, strings: list[str]) -> StopStringCriteria:
    if tokenizer is None:
        raise ConfigError("stop_strings need a tokenizer", code="E-CONFIG-CONFLICT", got=repr(strings)[:200])
    try:
        return StopStringCriteria(tokenizer, strings)
    except ValueError as error:
        raise ConfigError(
            "stop_strings cannot be matched in this tokenizer's vocabulary",
            code="E-CONFIG-VALUE",
            got=repr(strings)[:200],
            expected=str(error)[:200],
            hint="give a text that its tokens can spell, or use stop tokens",
        ) from error
