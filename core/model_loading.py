"""The model that the settings name: a causal language model, or a sequence classifier with one label."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlx.core.adapters import load_adapter
from rlx.core.pretrained import ADAPTER_CONFIG_FILE, Source, load_config, load_weights, read_json
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
    if settings.adapter:  # one without a score head is refused
        origin = f"from {settings.adapter}"
    else:
        origin = f"from {source.name}" if trained else "new, drawn from the seed"
    report.append(f"score head: {origin}")
    with rng_scope(settings.seed, "score head"):
        return load_weights(
            source,
            AutoModelForSequenceClassification,
            config,
            dtype=dtype,
            new="" if trained else "score.weight",
            **_attention(settings),
        )


def load_adapted_classifier(folder: Path, dtype: torch.dtype) -> Any:
    """A sequence classifier that was saved as a LoRA adapter with its score head, frozen, on its base.

    Args:
        folder: the adapter; the base is the one that it names.
        dtype: type of the base's floating-point weights.

    Raises:
        ConfigError: the base cannot be read, or the adapter is not one of a classifier or does not fit.
        DivergedError: a weight is not finite.
    """
    from transformers import AutoModelForSequenceClassification

    base = read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    source = Source.of(str(base), role="base of the reward model")
    config = load_config(source)
    config.num_labels = 1
    model = load_weights(source, AutoModelForSequenceClassification, config, dtype=dtype, new="score.weight")
    return load_adapter(model, folder, trainable=False, classifier=True)


def _source(settings: Settings) -> Source:
    return Source.of(
        settings.model,
        role="model",
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
    )


def _attention(settings: Settings) -> dict[str, Any]:
    return {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}


@contextmanager
def savable(model: Any) -> Iterator[None]:
    """Within it a model can be saved whose generation config says ``do_sample: false`` beside a temperature.

    transformers refuses to write such a config, and a trained policy must not be lost over it. What is
    written says ``do_sample: true``, without which those fields mean nothing.

    Args:
        model: of transformers, without wrappers; its config is put back.
    """
    own = model.generation_config if model.can_generate() else None
    try:
        if own is not None:
            own.validate(strict=True)
    except ValueError:
        model.generation_config = copy.deepcopy(own)
        model.generation_config.do_sample = True
    try:
        yield
    finally:
        if own is not None:
            model.generation_config = own
