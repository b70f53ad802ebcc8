"""Gradient checkpointing of models: activations are recomputed for the backward pass, or kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from rlx.core.errors import ConfigError


def recomputes(*models: Any) -> bool:
    """Whether each of the models, or a part of it, recomputes its activations in training mode."""
    return all(
        any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        for model in models
    )


def can_recompute(*models: Any) -> bool:
    """Whether each of the models says that it can, and has a layer that does."""
    return all(
        bool(getattr(model, "supports_gradient_checkpointing", False))
        and any(hasattr(module, "gradient_checkpointing") for module in model.modules())
        for model in models
    )


def switch(models: Iterable[Any], *, on: bool) -> None:
    """Have models recompute their activations from now on, or keep them.

    Raises:
        ConfigError: one cannot recompute them.
    """
    models = list(models)
    for model in models if on else ():
        if not can_recompute(model):
            raise ConfigError(
                f"{type(model).__name__} does not support gradient checkpointing",
                code="E-MODEL-CHECKPOINTING",
                hint="--gradient-checkpointing false; --lora-r 16 or --dtype bfloat16 save memory too",
            )
    with warnings.catch_warnings():
        # A newer name exists in the newest transformers only; the old one works in all that we support.
        warnings.simplefilter("ignore", FutureWarning)
        for model in models:
            if on:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
                model.disable_input_require_grads()
