"""One score a sequence from a sequence classifier with one label: a reward model, in training or in use.

The score head sees the state of each sequence's last token alone. Which token is the last one follows from
lengths, never from a pad token's id.

Legend: N sequences, D hidden size.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from rlx.core.errors import ConfigError
from rlx.core.states import micro_batches, states

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.batch import Sequences


def classify(
    model: nn.Module,
    sequences: Sequences,
    *,
    token_budget: int = 4096,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """The score of each sequence.

    With gradients enabled this is one differentiable pass over all sequences: cut them before. Without, they
    are cut here by token budget. Train or eval mode, and so dropout, is the caller's choice.

    Args:
        model: a transformers decoder for sequence classification with one label, or a PEFT model around one.
        sequences: on any device, none empty; N = 0 is legal.
        token_budget: tokens of a forward pass, when no gradient is wanted.
        accelerator: its autocast is entered; None for none.

    Returns:
        (N,) float32, on the model's device.

    Raises:
        ConfigError: for a model without such a head, or one that PEFT feeds virtual tokens.
        ValueError: if a sequence is empty.
    """
    trunk, head = parts_of(extract_model_from_parallel(model))
    return last_token_scores(trunk, head, sequences, token_budget=token_budget, accelerator=accelerator)


def last_token_scores(
    trunk: nn.Module,
    head: nn.Module,
    sequences: Sequences,
    *,
    token_budget: int = 4096,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """As ``classify``, of a trunk and a head apart.

    Args:
        trunk: a transformers decoder without output head.
        head: hidden states (N, D) → scores (N,) or (N, 1).
        sequences: as of ``classify``.
        token_budget: as of ``classify``.
        accelerator: as of ``classify``.

    Returns:
        (N,) float32, on the trunk's device.

    Raises:
        ValueError: if a sequence is empty.
    """
    sequences = sequences.to(next(trunk.parameters()).device)
    if bool((sequences.lengths == 0).any()):
        raise ValueError("an empty sequence has no last token to be scored at")
    with accelerator.autocast() if accelerator is not None else nullcontext():
        if torch.is_grad_enabled() and len(sequences):
            return _classify(trunk, head, sequences)
        scores = torch.zeros(len(sequences), device=sequences.ids.device)
        for part in micro_batches([trunk], sequences, token_budget):
            scores[part] = _classify(trunk, head, sequences.take(part))
    return scores


def parts_of(model: Any) -> tuple[nn.Module, nn.Module]:
    """Trunk and score head of a classifier, adapters included.

    Raises:
        ConfigError: it has no head called ``score``, several labels, or virtual tokens.
    """
    # Only PEFT models, and transformers models with an adapter loaded into them, have peft_config.
    adapters = model.peft_config if hasattr(model, "peft_config") else {}
    if any(adapter.is_prompt_learning for adapter in adapters.values()):
        raise ConfigError(
            "a classifier with virtual tokens cannot be taken apart",
            code="E-MODEL-CLASSIFIER",
            got=f"{type(model).__name__} with prompt learning",
            expected="all weights trained, or a LoRA adapter",
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = dict(base.named_children()).get("score")
    if head is None or base.config.num_labels != 1:
        raise ConfigError(
            f"{type(base).__name__} gives no single score",
            code="E-MODEL-CLASSIFIER",
            got=f"{base.config.num_labels} labels" if head is not None else "no head called 'score'",
            expected="a decoder for sequence classification with num_labels 1",
        )
    return base.base_model, head


def _classify(trunk: nn.Module, head: nn.Module, sequences: Sequences) -> Tensor:
    """Scores (N,) of sequences, at least one, in one pass."""
    last = sequences.starts + sequences.lengths - 1
    scores: Tensor = head(states(trunk, sequences, last))
    return scores.float().view(len(sequences))
