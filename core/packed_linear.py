"""Weights of linear layers laid out once for products of few rows, for as long as completions are sampled.

What this is: a decode step multiplies a handful of rows by every weight, and on a CPU most of its time goes
to laying the weights out for the product, again at each step. oneDNN keeps them laid out: ``packed`` does so
for the length of a block, and takes the layers back to what they were. Results differ by float rounding.
What it leaves out: gradients, devices other than the CPU, layers with hooks or of other classes.

How to switch it off: ``--native.packed-weights false``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from rlx.core.lm_head import is_plain_linear

log = logging.getLogger(__name__)

LEAST_WEIGHTS = {torch.float32: 200_000, torch.bfloat16: 10_000}
"""Weights of a layer from which on it pays, by type: below, a call costs more than the layout."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the trial
LEAST_STEPS = 16  # laying out costs about as much as ten steps save
ROWS = 32  # that the layout is made for; fewer and more work as well
SHARE = 0.25  # of the machine's memory that the copies may take; of the free one, a resumed run might differ


@contextmanager
def packed(model: nn.Module, *, least: int | None = None) -> Iterator[int]:
    """Lay out the weights of a model's linear layers for the length of the block.

    Weights that change within it are not seen. Autocast, if any, has to be entered before.

    Args:
        model: any; layers that do not qualify stay as they are.
        least: weights of a layer from which on it is laid out; None for ``LEAST_WEIGHTS``.

    Yields:
        How many layers were laid out.
    """
    layers = list(_layers(model, least))
    if not _fit(sum(layer.weight.numel() * dtype.itemsize for layer, dtype in layers)):
        layers = []
    try:
        for layer, dtype in layers:
            vars(layer)["forward"] = _forward(layer, dtype)
        yield len(layers)
    finally:
        for layer, _ in layers:
            vars(layer).pop("forward", None)


def copies_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that laid-out weights would take on a CPU; 0 where none would be.

    Args:
        model: loaded, or on the meta device.
        dtype: type that it samples in.
    """
    if dtype not in LEAST_WEIGHTS or not _works(dtype):
        return 0
    weights = [module.weight.numel() for module in model.modules() if is_plain_linear(module)]
    size = sum(count for count in weights if count >= LEAST_WEIGHTS[dtype]) * dtype.itemsize
    return size if _fit(size) else 0


def _fit(size: int) -> bool:
    return size <= SHARE * int(psutil.virtual_memory().total)


def _layers(model: nn.Module, least: int | None) -> Iterator[tuple[nn.Linear, torch.dtype]]:
    """Layers that qualify, each with the type that it computes in."""
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    for module in model.modules():
        if not is_plain_linear(module) or module.weight.device.type != "cpu":
            continue
        dtype = cast or module.weight.dtype
        if dtype not in LEAST_WEIGHTS or module.weight.numel() < (least or LEAST_WEIGHTS[dtype]):
            continue
        if _works(dtype):
            yield module, dtype


def _forward(layer: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight = _ops()._reorder_linear_weight(layer.weight.detach().to(dtype), ROWS)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = _ops()._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")
        return out

    return forward


def _ops() -> Any:
    return torch.ops.mkldnn


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Whether torch has the two operators, and they compute a linear layer in this type on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    draw = torch.Generator().manual_seed(0)
    layer = nn.utils.skip_init(nn.Linear, 32, 48, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        x = torch.randn(3, 32, generator=draw).to(dtype)
        try:
            found = _forward(layer, dtype)(x)
        except (AttributeError, RuntimeError, TypeError) as error:  # internal operators: they may change
            log.info("weights are not laid out for sampling: %s", str(error).splitlines()[0][:200])
            return False
        close = TOLERANCES[dtype]
        return bool(torch.allclose(found.float(), layer(x).float(), rtol=close, atol=close))
