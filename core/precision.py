"""Precision of weights: lower while sampling, higher in normalisation layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NORM = re.compile(r"(RMS|Layer)_?Norm", re.IGNORECASE)


@contextmanager
def generation_precision(model: nn.Module, dtype: torch.dtype | str | None) -> Iterator[None]:
    """Cast a model's floating-point weights for a while; afterwards they are the same tensors again.

    Nothing is rounded back and forth: the originals are kept and put back, whatever happens inside. Tied
    weights stay tied, because each parameter is cast once. Buffers keep their type: rotary frequencies lose
    too much in half precision. Costs one copy of the weights in dtype.

    Args:
        model: any module.
        dtype: type to compute in, or its name; None, ``none``, or the weights' own changes nothing.
    """
    if isinstance(dtype, str):
        dtype = None if dtype == "none" else DTYPES[dtype]
    kept: dict[nn.Parameter, Tensor] = {}
    try:
        if dtype is not None:
            for parameter in model.parameters():  # each shared one once
                if parameter.is_floating_point() and parameter.dtype != dtype:
                    kept[parameter] = parameter.data
                    parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, original in kept.items():
            parameter.data = original


def upcast_norms(model: nn.Module) -> int:
    """Keep LayerNorm and RMSNorm layers in float32 inside a half-precision model.

    The layer's input is raised to its weight's type and its output lowered to the input's, so that the layers
    around it see no difference in type.

    Args:
        model: changed in place; names of its weights stay as they are.

    Returns:
        How many layers were raised.
    """
    norms = [module for module in model.modules() if _is_norm(module)]
    for module in norms:
        module.float()
        # A subclass made on the spot, not a hook: it survives deepcopy and adds nothing to the state dict.
        module.__class__ = type(type(module).__name__, (_Raised, type(module)), {})
    return len(norms)


class _Raised(nn.Module):
    """Computes in the type of its own weight and answers in the type of its input."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raised: Tensor = super().forward(hidden.to(self.weight.dtype), *args, **kwargs)  # type: ignore[arg-type]
        return raised.to(hidden.dtype)


def _is_norm(module: nn.Module) -> bool:
    named = isinstance(module, nn.LayerNorm | nn.RMSNorm) or _NORM.search(type(module).__name__) is not None
    half = any(
        parameter.dtype in (torch.bfloat16, torch.float16) for parameter in module.parameters(recurse=False)
    )
    return named and half and not isinstance(module, _Raised)
