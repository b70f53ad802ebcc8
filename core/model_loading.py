"""The model that the settings name: a causal language model, or a sequence classifier with one label."""

from __future__ import annotations

from typing import Any

import torch

from rlx.core.pretrained import Source, load_config, load_weights
from rlx.core.settings import Settings
from rlx.core.streams import rng_scope


def load_causal(settings: Settings, dtype: torch.dtype) -> Any:
    """A causal language model with every weight it needs.

    Raises:
        ConfigError: it cannot be read, or is incomplete.
        DivergedError: a weight is not finite.
    """
    from transformers import AutoModelForCausalLM

    source = _source(settings)
    return load_weights(
        source, AutoModelForCausalLM, load_config(source), dtype=dtype, **_attention(settings)
    )


def load_classifier(settings: Settings, dtype: torch.dtype, report: list[str]) -> Any:
    """A sequence classifier: as it was saved, or a language model's trunk with a score head from the seed.

    Args:
        settings: the options of the panel Model, and the seed.
        dtype: type of the floating-point weights.
        report: gets a line that says where the score head comes from.

    Raises:
        ConfigError: it cannot be read, or is incomplete.
        DivergedError: a weight is not finite.
    """
    from transformers import AutoModelForSequenceClassification

    source = _source(settings)
    config = load_config(source)
    trained = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if not trained:
        config.num_labels = 1
    report.append(f"score head: from {source.name}" if trained else "score head: new, drawn from the seed")
    with rng_scope(settings.seed, "score head"):
        return load_weights(
            source,
            AutoModelForSequenceClassification,
            config,
            dtype=dtype,
            new="" if trained else "score.weight",
            **_attention(settings),
        )


def _source(settings: Settings) -> Source:
    return Source.of(
        settings.model,
        role="model",
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
    )


def _attention(settings: Settings) -> dict[str, Any]:
    return {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
