"""Gradients that a backward pass may add to past autograd, and whether this is a pass that may."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sink:
    """A gradient that a backward pass may add to past autograd.

    Attributes:
        leaf: a weight.
        grad: what ``leaf.grad`` was when this was made.
    """

    leaf: Tensor
    grad: Tensor

    def open(self) -> Tensor | None:
        """The gradient, within a backward pass that is to leave its sum there; None in any other."""
        if self.leaf.grad is not self.grad:
            return None
        try:
            # Not if gradients of other tensors were asked for; it raises if this one's are to be handed over.
            node = torch.autograd.graph.get_gradient_edge(self.leaf).node
            return self.grad if torch._C._will_engine_execute_node(node) else None
        except (AttributeError, RuntimeError):
            return None
