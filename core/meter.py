"""Metrics between two log lines: sums and counts on the device, read once, over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import Tensor


class Meter:
    """Running means by name. Nothing is read from the device before ``means``."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor | float) -> None:
        """Take in values of any shape; they count one by one."""
        tensor = torch.as_tensor(values).detach()
        added = tensor.double().sum()
        self.sums[name] = self.sums[name] + added if name in self.sums else added
        self.counts[name] = self.counts.get(name, 0) + tensor.numel()

    def merge(self, other: Meter) -> None:
        """Take in all that another meter holds."""
        for name, added in other.sums.items():
            self.sums[name] = self.sums[name] + added if name in self.sums else added
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each name over all processes; a name that saw no value anywhere is left out."""
        names = list(self.sums)
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            names = sorted(set(gather_object(names)))
        if not names:
            return {}
        zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        sums = torch.stack([self.sums.get(name, zero).to(accelerator.device) for name in names])
        counts = torch.tensor([self.counts.get(name, 0) for name in names], dtype=torch.float64)
        both = total(accelerator, torch.stack([sums, counts.to(accelerator.device)])).tolist()
        return {name: s / n for name, s, n in zip(names, *both, strict=True) if n}

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts; the sums are tensors on the CPU, for other processes do not have this device."""
        return {"sums": {name: added.cpu() for name, added in self.sums.items()}, "counts": dict(self.counts)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Meter:
        """The meter whose ``state_dict`` this is."""
        meter = cls()
        meter.sums, meter.counts = dict(state["sums"]), dict(state["counts"])
        return meter


def total(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The element-wise sum of values over all processes."""
    if accelerator.num_processes == 1:
        return values
    summed: Tensor = accelerator.reduce(values, reduction="sum")  # of a copy; values stay as they are
    return summed


def largest(accelerator: Accelerator, value: float) -> float:
    """The largest value of all processes."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())
