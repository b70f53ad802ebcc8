"""The output head and the log-softmax after it, at scored positions only, in chunks of rows.

A log-prob takes one row of logits. Rows are computed a chunk at a time, reduced in float32 to one log-prob
(and one entropy), and then dropped, or kept for the backward pass where they are known to fit.
Leaves out: finding the head of a model (``rlx.core.probe``) and the rows (``rlx.core.logprobs``).

Legend: K rows (scored positions), V vocabulary, D hidden size. Log-probs and entropies are natural, float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]  # comes with accelerate, without stubs
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 16 * 2**20
"""Float32 logits computed at a time. Fixed rather than taken from free memory: the chunks decide the order in
which the weight's gradient is summed, and a resumed run must sum in the same order."""

KEEP_SHARE = 0.25
"""Share of the free memory that logits kept for the backward pass may take. Whether they are kept changes
time and memory, not numbers."""


@dataclass(frozen=True)
class Transform:
    """What happens to logits between the head and the softmax: scale, then soft cap, then temperature.

    Attributes:
        temperature: logits are divided by it, > 0.
        scale: logits are multiplied by it first (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
        softcap: c in c·tanh(logits / c), applied after the scale (Gemma's ``final_logit_softcapping``).
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (…, V) → the same after the transform, float32, with autograd."""
        logits = logits.float()
        if self.softcap is None:
            return logits * (self.scale / self.temperature)
        return torch.tanh(logits * (self.scale / self.softcap)) * (self.softcap / self.temperature)

    def in_place(self, logits: Tensor) -> Tensor:
        """The same, overwriting float32 logits."""
        if self.softcap is None:
            factor = self.scale / self.temperature
            return logits if factor == 1.0 else logits.mul_(factor)
        return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def backward(self, grad: Tensor, out: Tensor) -> Tensor:
        """Gradient of the head's logits from the one of the result (out), overwriting grad."""
        grad.mul_(self.scale / self.temperature)
        if self.softcap is None:
            return grad
        tanh = out * (self.temperature / self.softcap)
        return grad.addcmul_(grad, tanh.square_(), value=-1)


def head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    keep: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target, and the entropy of its distribution, from a linear head.

    First-order gradients of both outputs are exact in hidden, weight and bias; there are no second-order
    ones. The matrix products run in the dtype of weight (or of the autocast in force), all else in float32.

    Args:
        hidden: (K, D), any float dtype; K may be 0.
        weight: (V, D).
        bias: (V,), or None.
        targets: (K,) int64 token ids.
        temperature: logits are divided by it, > 0.
        softcap: c in c·tanh(logits / c), None for none.
        scale: logits are multiplied by it before the soft cap.
        entropy: also give the entropy.
        chunk_bytes: bytes of float32 logits computed at a time; at least one row is.
        keep: keep the logits for the backward pass (True), compute them again there (False: less memory, one
            more matrix product), or keep them when they take at most ``KEEP_SHARE`` of free memory (None).

    Returns:
        logps (K,) float32 and entropy (K,) float32 in nats, or None.
    """
    transform = Transform(temperature, scale, softcap)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias)
    )
    keep = _fits(len(hidden), len(weight), hidden.device) if keep is None else keep
    rows = chunk_rows(len(weight), chunk_bytes)
    with torch.autocast(kind, enabled=False):
        logps, entropies = _HeadLogps.apply(
            hidden, weight, bias, targets, transform, entropy, rows, keep and learns
        )
    return logps, entropies


def module_logps(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    keep: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``head_logps`` for a head that is not a plain linear layer: adapters on the head, a quantised head.

    The head is called on chunks of rows, and a chunk that is not kept is called again in the backward pass,
    with the same dropout.

    Args:
        head: hidden (k, D) → logits (k, V).
        hidden: (K, D).
        targets: (K,) int64 token ids.
        vocabulary: V.
        temperature: as in ``head_logps``, like all that follow.
        softcap: likewise.
        scale: likewise.
        entropy: likewise.
        chunk_bytes: likewise.
        keep: likewise.

    Returns:
        logps (K,) float32 and entropy (K,) float32 in nats, or None.
    """
    transform = Transform(temperature, scale, softcap)

    def chunk(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return logits_logps(transform(head(x)), y, entropy=entropy)

    keep = _fits(len(hidden), 3 * vocabulary, hidden.device) if keep is None else keep  # autograd keeps more
    again = not keep and torch.is_grad_enabled()
    rows = chunk_rows(vocabulary, chunk_bytes)
    results = [
        checkpoint(chunk, x, y, use_reentrant=False) if again else chunk(x, y)
        for x, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logps, entropies = (torch.cat(values) for values in zip(*results, strict=True))
    return logps, entropies if entropy else None


def chunk_rows(vocabulary: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of float32 logits that take chunk_bytes, at least one."""
    return max(1, chunk_bytes // (4 * vocabulary))


def logits_logps(logits: Tensor, targets: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-prob of targets (K,) and entropy (zeros unless asked for) from logits (K, V), with autograd."""
    logps = logits.float().log_softmax(-1)
    picked = logps.gather(-1, targets[:, None]).squeeze(-1)
    return picked, -(logps.exp() * logps).sum(-1) if entropy else torch.zeros_like(picked)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: free ones, and those that torch's cache holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def _fits(count: int, vocabulary: int, device: torch.device) -> bool:
    """Whether count rows of float32 logits may be kept."""
    return 4 * count * vocabulary <= KEEP_SHARE * free_bytes(device)


class _HeadLogps(torch.autograd.Function):
    """Chunked forward and backward of ``head_logps``; all floats of one dtype, autocast off."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        entropy: bool,
        rows: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Reduce each chunk of logits to log-normalisers, log-probs and entropies."""
        count = len(hidden)
        kept = hidden.new_empty(count, len(weight), dtype=torch.float32) if keep else None
        lse = hidden.new_empty(count, dtype=torch.float32)
        logps, entropies = torch.empty_like(lse), torch.empty_like(lse) if entropy else None
        for at in _chunks(count, rows):
            z = _logits(hidden[at], weight, bias, transform, None if kept is None else kept[at])
            lse[at] = torch.logsumexp(z, -1)
            logps[at] = z.gather(1, targets[at, None]).squeeze(1) - lse[at]
            if entropies is not None:
                logp = z - lse[at, None]
                entropies[at] = logp.exp().mul_(logp).sum(-1).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropies, kept)
        ctx.transform, ctx.rows = transform, rows
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        """Chunk by chunk: ∂logp/∂z = onehot − p and ∂H/∂z = −p (log p + H), then on to the inputs."""
        hidden, weight, bias, targets, lse, entropies, kept = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        for at in _chunks(len(hidden), ctx.rows):
            z = _logits(hidden[at], weight, bias, ctx.transform) if kept is None else kept[at]
            grad = _logits_grad(z, lse[at], targets[at], grad_logps[at], entropies, grad_entropy, at)
            grad = ctx.transform.backward(grad, z)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[at])
            if grad_weight is not None and weight.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), hidden[at])
            elif (
                grad_weight is not None
            ):  # summed over chunks in float32, as one product over all rows would be
                grad_weight += grad.t() @ hidden[at]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, out: Tensor | None = None
) -> Tensor:
    """Logits (k, V) float32 after the transform, into out where it is given."""
    if weight.dtype == torch.float32:
        z = torch.mm(hidden, weight.t(), out=out)
    else:
        product = hidden @ weight.t()
        z = product.float() if out is None else out.copy_(product)
    if bias is not None:
        z += bias
    return transform.in_place(z)


def _logits_grad(
    z: Tensor,
    lse: Tensor,
    targets: Tensor,
    grad_logps: Tensor,
    entropies: Tensor | None,
    grad_entropy: Tensor | None,
    at: slice,
) -> Tensor:
    """Gradient (k, V) of the transformed logits z (k, V), a new tensor."""
    logp = z - lse[:, None]
    if entropies is None or grad_entropy is None:
        grad = logp.exp_().mul_(-grad_logps[:, None])
    else:
        p = logp.exp()
        inner = logp.add_(entropies[at, None]).mul_(grad_entropy[at, None]).add_(grad_logps[:, None])
        grad = inner.mul_(p).neg_()
    grad[torch.arange(len(grad), device=grad.device), targets] += grad_logps
    return grad
