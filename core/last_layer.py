"""What a trunk's last layer does token by token, done only for the tokens whose states are read.

Of a prompt only the last state is wanted, of a sequence that is classified only the last one. Keys and values
of the last layer are needed of every token; queries, the attention's output map and the MLP only of those
tokens. The modules that compute them get the rows that are read, and zeros stand for the others.
Which modules these are is found by their place and name, and tried by ``rlx.core.sharing`` before it is used.

Legend: M tokens of the row, R of them read, D numbers in, E out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from rlx.core.recompute import recomputes

MARK = "rlx_token_wise"
"""Attribute of a trunk: names, within its last layer, of the modules that may be given some rows alone."""
ATTENTION = ("attn", "attention")
PROJECTIONS = ("q_proj", "o_proj")
CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute of a layer: what transformers has it recomputed with."""

Forward = Callable[..., Any]

_reading: ContextVar[Tensor | None] = ContextVar("reading", default=None)
"""The rows of this thread's pass: another thread may be in the same module."""


def token_wise(trunk: nn.Module) -> tuple[str, ...]:
    """Names within the last layer of modules that seem to take each token by itself, the MLP last."""
    layer = _last_layer(trunk)
    names, sizes = list[str](), dict[str, int]()
    for name, child in () if layer is None else layer.named_children():
        if any(word in name for word in ATTENTION):
            names += [f"{name}.{part}" for part in PROJECTIONS if hasattr(child, part)]
        else:
            sizes[name] = sum(parameter.numel() for parameter in child.parameters())
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    return (*names, largest) if largest is not None else ()


@contextmanager
def read_at(trunk: nn.Module, rows: Tensor, tokens: int) -> Iterator[None]:
    """Within it a pass of the trunk computes its last layer for some rows; so does what is recomputed of it.

    Args:
        trunk: any; nothing changes unless it is marked.
        rows: (K,) int64, places in the row of the states that are read.
        tokens: M.
    """
    layer, names = _last_layer(trunk), vars(trunk).get(MARK, ())
    read = rows.unique() if names else rows
    recomputed = trunk.training and recomputes(trunk)
    if layer is None or not names or (recomputed and CHECKPOINT not in vars(layer)):
        yield
        return
    if not 0 < len(read) < tokens or any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules()):
        yield  # who has put a hook there wants to see all tokens
        return
    modules = [layer.get_submodule(name) for name in names]
    forwards = {
        module: _of_some_rows(module.forward, read, tokens)
        for module in modules
        if "forward" not in vars(module)  # nobody else has put something around it
    }
    if not recomputed:
        with _replaced(forwards, read):
            yield
        return
    checkpoint = vars(layer)[CHECKPOINT]

    def again(function: Forward, *args: Any) -> Any:
        def inner(*args: Any) -> Any:
            with _replaced(forwards, read):
                return function(*args)

        return checkpoint(inner, *args)

    vars(layer)[CHECKPOINT] = again
    try:
        yield
    finally:
        vars(layer)[CHECKPOINT] = checkpoint


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Forward], read: Tensor) -> Iterator[None]:
    """Other forward passes of modules for a while, which compute the rows that are read."""
    token = _reading.set(read)
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)
        _reading.reset(token)


def _last_layer(trunk: nn.Module) -> nn.Module | None:
    config: Any = trunk.config
    count = config.get_text_config(decoder=True).num_hidden_layers
    for layers in trunk.children():
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            return layers[-1]
    return None


def _of_some_rows(inner: Forward, read: Tensor, tokens: int) -> Forward:
    """A forward pass (1, M, D) → (1, M, E) by way of (1, R, D) → (1, R, E)."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _reading.get() is not read or args or kwargs or x.shape[:-1] != (1, tokens):
            return inner(x, *args, **kwargs)
        out = inner(x.index_select(1, read))
        return out.new_zeros(1, tokens, out.shape[-1]).index_copy(1, read, out)

    return forward
