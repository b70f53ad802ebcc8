"""Gradients of large embeddings and output heads, added up in place, in memory that stays from step to step.

Why: autograd makes a fresh tensor of the weight's size for each micro-batch, of zeros but for the rows of the
tokens that occurred, and adds it to the one before. Above some size the C library takes such memory from the
system and gives it back each time, and touching it for the first time costs more than the sum itself.
Here an embedding's backward pass adds rows to the gradient that is there, and so does the head's
(``rlx.core.lm_head``). Gradients are the same to float rounding.
Leaves out: other devices than the CPU, whose allocators keep memory; weights in half precision, whose sums
want float32; embeddings that do more than look up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rlx.core.lm_head import is_plain_linear
from rlx.core.sink import Sink

LEAST_BYTES = 2**25  # from which on glibc never keeps what is freed


class GradientBuffers:
    """Memory for the gradients of some trained weights.

    Args:
        models: each may have an embedding and a head that qualify; None are passed over.
        trained: the parameters that get gradients.
    """

    def __init__(self, models: Iterable[Any], trained: Collection[nn.Parameter]) -> None:
        ours = {id(parameter) for parameter in trained}
        modules = [module for model in models if model is not None for module in model.modules()]
        self.embeddings = [m for m in modules if _is_lookup(m) and id(m.weight) in ours and _large(m.weight)]
        heads = [model.get_output_embeddings() for model in models if hasattr(model, "get_output_embeddings")]
        layers = [*self.embeddings, *(m for m in heads if m is not None and is_plain_linear(m))]
        weights = {id(m.weight): m.weight for m in layers if id(m.weight) in ours and _large(m.weight)}
        self.weights: list[nn.Parameter] = list(weights.values())
        self._kept: list[Tensor | None] = [None] * len(self.weights)
        self._attached: dict[int, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes, once they have been used."""
        return sum(weight.nbytes for weight in self.weights)

    def of(self, weight: Tensor) -> Tensor | None:
        """The buffer that is a weight's gradient now, if there is one."""
        return self._attached.get(id(weight))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the weights' gradients are the buffers, zero at first, and embeddings add to them.

        Weights with hooks on their gradients are passed over. Afterwards a gradient that nothing was added to
        is None, as autograd leaves it.
        """
        begun = []
        for place, weight in enumerate(self.weights):
            if weight._backward_hooks or weight._post_accumulate_grad_hooks:
                continue  # somebody wants to see each gradient
            buffer = self._kept[place]
            if buffer is None or buffer.shape != weight.shape:
                buffer = self._kept[place] = torch.zeros_like(weight, requires_grad=False)
            else:
                buffer.zero_()
            weight.grad = self._attached[id(weight)] = buffer
            begun.append((weight, buffer, buffer._version))
        tables = [m for m in self.embeddings if id(m.weight) in self._attached and "forward" not in vars(m)]
        try:
            for module in tables:
                vars(module)["forward"] = _Lookup(module, self._attached[id(module.weight)])
            yield
        finally:
            for module in tables:
                vars(module).pop("forward", None)
            self._attached.clear()
            for weight, buffer, version in begun:
                if weight.grad is buffer and buffer._version == version:
                    weight.grad = None


class _Lookup:
    """The forward pass of an embedding whose backward pass adds to its weight's gradient."""

    def __init__(self, module: nn.Embedding, into: Tensor) -> None:
        self.padding, self.sink = module.padding_idx, Sink(module.weight, into)

    def __call__(self, input: Tensor) -> Tensor:
        """Ids (…) → rows (…, D)."""
        found: Tensor = _RowsInPlace.apply(self.sink.leaf, input, self.padding, self.sink)  # type: ignore[no-untyped-call]
        return found


class _RowsInPlace(torch.autograd.Function):
    """Rows of a weight; their gradients are added to the weight's, or handed to autograd as a whole."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, sink: Sink) -> Tensor:
        ctx.sink, ctx.padding = sink, padding
        ctx.save_for_backward(ids)
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        there = ctx.sink.open()
        into = torch.zeros_like(ctx.sink.leaf) if there is None else there
        ids, rows = ids.flatten(), grad.flatten(0, -2)
        if ctx.padding is not None:
            learns = ids != ctx.padding
            ids, rows = ids[learns], rows[learns]
        into.index_add_(0, ids, rows)
        return into if there is None else None, None, None, None


def _is_lookup(module: nn.Module) -> bool:
    """A plain embedding that nothing has been put around."""
    return (
        type(module) is nn.Embedding
        and module.max_norm is None
        and not (module.sparse or module.scale_grad_by_freq)
        and "forward" not in vars(module)
    )


def _large(weight: Tensor) -> bool:
    """Whether a weight on a CPU, or on one to be, is worth it."""
    on_cpu = weight.device.type in ("cpu", "meta")
    return on_cpu and weight.dtype == torch.float32 and weight.nbytes >= LEAST_BYTES
