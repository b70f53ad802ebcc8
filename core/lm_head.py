"""The output head and the log-softmax after it, at scored positions only, in chunks of rows.

A log-prob takes one row of logits. Rows are computed a chunk at a time, reduced in float32 to one log-prob
(and one entropy, and what else is asked for), and then dropped, or kept for the backward pass where they are
known to fit.
Leaves out: finding the head of a model (``rlx.core.probe``) and the rows (``rlx.core.logprobs``).

Legend: K rows (scored positions), V vocabulary, D hidden size. Log-probs and entropies are natural, float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlx.core.sink import Sink

CHUNK_BYTES = 32 * 2**20
"""Float32 logits computed at a time. Fixed rather than taken from free memory: the chunks decide the order in
which the weight's gradient is summed, and a resumed run must sum in the same order."""

KEEP_SHARE = 0.25
"""Share of the free memory that logits kept for the backward pass may take. Whether they are kept changes
time and memory, not numbers."""

LEAST_PROBABILITY = torch.finfo(torch.float32).tiny
"""Below it p counts as it in log p, which is multiplied by p: float32 has no smaller normal number."""

EXTRAS = ("correct", "square")
"""What else can be read off a row of logits, without gradient: whether the target is the most likely token
(bool), and log Σ_v p(v)²."""


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

    def backward(self, grad: Tensor, out: Tensor | None) -> Tensor:
        """Gradient of the head's logits from the one of the result, overwriting grad.

        Args:
            grad: (k, V) float32.
            out: the result (k, V), which is overwritten too; None where there is no soft cap.
        """
        if self.scale != self.temperature:
            grad.mul_(self.scale / self.temperature)
        if self.softcap is None or out is None:
            return grad
        tanh = out.mul_(self.temperature / self.softcap)
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
    extras: Sequence[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
    keep: bool | None = None,
    into: Tensor | None = None,
) -> tuple[Any, ...]:
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
        extras: also give these of ``EXTRAS``.
        chunk_bytes: bytes of float32 logits computed at a time; at least one row is.
        keep: keep the logits' exponentials for the backward pass (True), compute them anew there (False: less
            memory, one more matrix product), or keep them when they take at most ``KEEP_SHARE`` of free
            memory (None).
        into: (V, D) float32, the tensor that is ``weight.grad``: ``backward()`` adds to it in place. Whatever
            else asks for gradients (``torch.autograd.grad``) gets its own, and so does ``backward()`` where
            ``weight.grad`` is another tensor by then.

    Returns:
        logps (K,) float32; entropy (K,) float32 in nats, or None; then the extras (K,) in their order.
    """
    transform = Transform(temperature, scale, softcap)
    kind = hidden.device.type
    sink = None if into is None else Sink(weight, into)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias)
    )
    keep = _fits(len(hidden), len(weight), hidden.device) if keep is None else keep
    rows = min(chunk_rows(len(weight), chunk_bytes), max(1, len(hidden)))
    with torch.autocast(kind, enabled=False):
        logps, entropies, *found = _HeadLogps.apply(  # type: ignore[no-untyped-call]  # torch leaves it so
            hidden, weight, bias, targets, transform, entropy, tuple(extras), rows, keep and learns, sink
        )
    return logps, entropies, *found


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
    extras: Sequence[str] = (),
    chunk_bytes: int = CHUNK_BYTES,
    keep: bool | None = None,
) -> tuple[Any, ...]:
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
        extras: likewise.
        chunk_bytes: likewise.
        keep: likewise.

    Returns:
        As ``head_logps``.
    """
    transform = Transform(temperature, scale, softcap)

    def chunk(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return logits_logps(transform(head(x)), y, entropy=entropy, extras=extras)

    keep = _fits(len(hidden), 3 * vocabulary, hidden.device) if keep is None else keep  # autograd keeps more
    again = not keep and torch.is_grad_enabled()
    rows = chunk_rows(vocabulary, chunk_bytes)
    results = [
        checkpoint(chunk, x, y, use_reentrant=False) if again else chunk(x, y)
        for x, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logps, entropies, *found = (torch.cat(values) for values in zip(*results, strict=True))
    return logps, entropies if entropy else None, *found


def chunk_rows(vocabulary: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of float32 logits that take chunk_bytes, at least one."""
    return max(1, chunk_bytes // (4 * vocabulary))


def logits_logps(
    logits: Tensor, targets: Tensor, *, entropy: bool, extras: Sequence[str] = ()
) -> tuple[Tensor, ...]:
    """Log-prob of targets (K,), entropy (zeros unless asked for) and extras, from logits (K, V)."""
    logps = logits.float().log_softmax(-1)
    picked = logps.gather(-1, targets[:, None]).squeeze(-1)
    entropies = -(logps.exp() * logps).sum(-1) if entropy else torch.zeros_like(picked)
    with torch.no_grad():
        found = [
            logps.argmax(-1) == targets if name == "correct" else (2 * logps).logsumexp(-1) for name in extras
        ]
    return picked, entropies, *found


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
        extras: tuple[str, ...],
        rows: int,
        keep: bool,
        sink: Sink | None,
    ) -> tuple[Tensor | None, ...]:
        """Reduce each chunk of logits to log-normalisers, log-probs, entropies and extras."""
        count, vocabulary = len(hidden), len(weight)
        like: dict[str, Any] = {"dtype": torch.float32, "device": hidden.device}
        kept = torch.empty(count if keep else rows, vocabulary, **like)
        work = torch.empty(rows, vocabulary, **like) if entropy else kept
        largest, log_sum, logps = (torch.empty(count, **like) for _ in range(3))
        entropies = torch.empty(count, **like) if entropy else None
        found = {
            name: torch.empty(count, **like | {"dtype": torch.bool if name == "correct" else torch.float32})
            for name in extras
        }
        for at in _chunks(count, rows):
            p = kept[at] if keep else kept[: at.stop - at.start]
            z = _logits(hidden[at], weight, bias, transform, work[: len(p)] if entropy else p)
            if "correct" in found:
                largest[at], likeliest = z.max(-1)
                found["correct"][at] = likeliest == targets[at]
            else:
                largest[at] = z.amax(-1)
            z.sub_(largest[at, None])
            logps[at] = z.gather(1, targets[at, None]).squeeze(1)
            torch.exp(z, out=p)  # over the logits themselves, unless the entropy needs both
            total = p.sum(-1)
            log_sum[at] = total.log()
            if (
                "square" in found
            ):  # p is at most 1 here, and 1 somewhere: its squares neither overflow nor vanish
                found["square"][at] = 2 * (p.norm(dim=-1).log() - log_sum[at])
            if (
                entropies is not None
            ):  # log Σ + Σ p·(largest − z) / Σ: no term is negative, so nothing cancels
                entropies[at] = log_sum[at] - z.mul_(p).sum(-1).div_(total)
        ctx.save_for_backward(hidden, weight, bias, targets, largest, log_sum, logps, entropies)
        logps = logps - log_sum  # not in place: what was saved are the targets' logits less the largest
        ctx.kept = kept if keep else None
        ctx.transform, ctx.rows, ctx.sink = transform, rows, sink
        ctx.mark_non_differentiable(*found.values())
        ctx.set_materialize_grads(
            False
        )  # an entropy that only metrics want costs nothing in the backward pass
        return logps, entropies, *found.values()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: None
    ) -> tuple[Any, ...]:
        """Chunk by chunk: ∂logp/∂z = onehot − p and ∂H/∂z = −p (log p + H), then on to the inputs.

        What was kept is used up: a second pass over a retained graph computes it again.
        """
        hidden, weight, bias, targets, largest, log_sum, below, entropies = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        if grad_logps is None:
            grad_logps = torch.zeros_like(log_sum)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        there = ctx.sink.open() if want_weight and ctx.sink is not None else None
        grad_weight = there
        if want_weight and there is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        work = weight.new_empty(0 if kept is not None else ctx.rows, len(weight), dtype=torch.float32)
        for at in _chunks(len(hidden), ctx.rows):
            if kept is not None:
                p = kept[at]
            else:
                z = _logits(hidden[at], weight, bias, ctx.transform, work[: at.stop - at.start])
                p = z.sub_(largest[at, None]).exp_()
            rows = _Rows(targets[at], largest[at], log_sum[at], below[at])
            spread = None
            if entropies is not None and grad_entropy is not None:
                spread = entropies[at], grad_entropy[at]
            grad = rows.gradient(p, grad_logps[at], spread, ctx.transform)
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
            grad_weight = None if there is not None else grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 7


@dataclass(frozen=True)
class _Rows:
    """What the forward pass found out about a chunk of k rows; (k,) each."""

    targets: Tensor
    largest: Tensor
    log_sum: Tensor
    below: Tensor  # the target's logit less the largest

    def gradient(
        self, p: Tensor, grad_logps: Tensor, spread: tuple[Tensor, Tensor] | None, transform: Transform
    ) -> Tensor:
        """Gradient of the head's logits (k, V), over p.

        Args:
            p: (k, V) exponentials of the logits less their largest.
            grad_logps: (k,).
            spread: entropy and its gradient, (k,) each; None where nothing depends on it.
            transform: between the head and the softmax.
        """
        z = capped = None
        if spread is not None or transform.softcap is not None:
            z = p.clamp_min(LEAST_PROBABILITY).log_()
        if z is not None and transform.softcap is not None:
            capped = z + self.largest[:, None]
            # The target's has a gradient even where its p vanishes.
            capped.scatter_(1, self.targets[:, None], (self.below + self.largest)[:, None])
        share = torch.exp(-self.log_sum)[:, None]
        if z is None or spread is None:
            grad = p.mul_(-grad_logps[:, None] * share)
        else:
            entropy, grad_entropy = spread
            inner = z.sub_(self.log_sum[:, None]).add_(entropy[:, None]).mul_(grad_entropy[:, None])
            grad = p.mul_(share).mul_(inner.add_(grad_logps[:, None]).neg_())
        grad[torch.arange(len(grad), device=grad.device), self.targets] += grad_logps
        return transform.backward(grad, capped)


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, out: Tensor) -> Tensor:
    """Logits (k, V) float32 after the transform, in out."""
    if weight.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
    if bias is not None:
        out += bias
    return transform.in_place(out)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer that nothing has been put around: no adapter, quantisation, hook or replaced forward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is nn.Linear and not any(hooks) and "forward" not in vars(module)
