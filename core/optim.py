"""The optimizer and the learning-rate schedule, and their state by parameter name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.nn import Parameter
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from rlx.core.settings import Settings


def build_optimizer(parameters: Mapping[str, Parameter], settings: Settings) -> Optimizer:
    """AdamW or SGD; value parameters may have a learning rate of their own, biases and norms do not decay.

    Args:
        parameters: name → trainable parameter; names of the value function begin with ``value.``.
        settings: ``optim``, ``learning_rate``, ``value_learning_rate``, ``weight_decay``, ``adam_*``.
    """
    groups: dict[tuple[float, float], list[tuple[str, Parameter]]] = {}
    for name, parameter in parameters.items():
        rate = settings.learning_rate
        if name.startswith("value.") and settings.value_learning_rate is not None:
            rate = settings.value_learning_rate
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), []).append((name, parameter))
    described = [{"params": named, "lr": lr, "weight_decay": wd} for (lr, wd), named in groups.items()]
    if settings.optim == "sgd":
        return torch.optim.SGD(described)
    fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters.values())
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(described, betas=betas, eps=settings.adam_epsilon, fused=fused)


def build_scheduler(optimizer: Optimizer, settings: Settings, total_updates: int) -> LambdaLR:
    """The schedule of ``lr_scheduler_type`` over ``total_updates`` mini-batches."""
    from transformers import get_scheduler

    warmup = settings.warmup_steps or round(settings.warmup_ratio * total_updates)
    kind = settings.lr_scheduler_type
    if kind == "constant" and warmup:
        kind = "constant_with_warmup"
    schedule: LambdaLR = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=total_updates
    )
    return schedule


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Moments by parameter name; learning rates follow from the schedule's position."""
    numbered = optimizer.state_dict()
    names = [name for group in numbered["param_groups"] for name in group["param_names"]]
    moments = {names[number]: dict(state) for number, state in numbered["state"].items()}
    return {"moments": moments}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Take back what ``optimizer_state`` gave, bit for bit."""
    numbered = optimizer.state_dict()
    names = [name for group in numbered["param_groups"] for name in group["param_names"]]
    numbers = {name: number for number, name in enumerate(names)}
    numbered["state"] = {numbers[name]: dict(moments) for name, moments in state["moments"].items()}
    optimizer.load_state_dict(numbered)


def place_scheduler(scheduler: LambdaLR, updates: int) -> None:
    """Put the schedule where it stands after so many mini-batches, and the learning rates with it.

    They are computed, not restored: a resume with another learning rate or horizon follows the new plan.
    """
    scheduler.last_epoch = updates
    rates = [
        base * shape(updates) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
