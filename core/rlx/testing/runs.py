"""Whole runs compared: what a run leaves, bit for bit, interrupted or not, in one process or in two."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, equal

from rlx.core.run import prepare, reopen, train
from rlx.plugins.hookspecs import hookimpl

# A step of plain gradient descent is as large as the gradient says: Adam's would blow up rounding errors, and
# clipping would hide a gradient that is a multiple of what it should be.
PLAIN = {"optim": "sgd", "learning_rate": 0.002, "max_grad_norm": 0, "lr_scheduler_type": "constant"}


@dataclass(frozen=True)
class Left:
    """What a run leaves in its folder.

    Attributes:
        tensors: of its policy, by file and name.
        lines: of its log, without what clocks and budgets say.
        samples: its completions.jsonl.
    """

    tensors: dict[str, Tensor]
    lines: list[dict[str, Any]]
    samples: str

    @classmethod
    def by(cls, folder: Path) -> Left:
        """What the run of a folder left there."""
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= {f"{file.name} {name}": tensor for name, tensor in load_file(file).items()}
        samples = folder / "completions.jsonl"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return cls(tensors, timeless(lines), samples.read_text() if samples.exists() else "")

    def same(self, other: Left) -> bool:
        """Bit for bit."""
        tensors = self.tensors.keys() == other.tensors.keys() and all(
            equal(self.tensors[name], other.tensors[name]) for name in self.tensors
        )
        return tensors and (self.lines, self.samples) == (other.lines, other.samples)

    def farthest(self, other: Left) -> float:
        """The largest difference of two weights; infinite if they are not the same ones."""
        if self.tensors.keys() != other.tensors.keys():
            return float("inf")
        pairs = [(self.tensors[name].float(), other.tensors[name].float()) for name in self.tensors]
        return max((float((one - two).abs().max()) for one, two in pairs), default=0.0)


def timeless(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Log lines without what the clock says."""
    return [{k: v for k, v in line.items() if "time/" not in k and "second" not in k} for line in lines]


class Killed(Exception):
    """A run was ended in the middle of a step, as if it had been killed."""


class _Kill:
    """Ends a run in the middle of its step number ``after``, counted from 0."""

    def __init__(self, after: int) -> None:
        self.after = after

    @hookimpl
    def on_loss(self, run: Any) -> None:
        if run.global_step == self.after:
            raise Killed


def killed(options: Mapping[str, Any], after: int = 1, **objects: Any) -> Path:
    """The folder of a run that was killed in the middle of a step.

    Args:
        options: of the run.
        after: whole steps before it is killed.
        objects: its model and tokenizer, if they are objects.
    """
    run = prepare(**options, **objects)
    run.events.add(_Kill(after))
    with contextlib.suppress(Killed):
        train(run)
    return run.path


def killed_and_resumed(options: Mapping[str, Any], after: int = 1) -> Path:
    """The folder of a run that was killed in the middle of a step, and then resumed to its end.

    Args:
        options: of the run; it has to write checkpoints.
        after: whole steps before it is killed.
    """
    folder = killed(options, after)
    plain = (str, int, float, bool, type(None), dict)
    train(reopen(folder, {name: value for name, value in options.items() if not isinstance(value, plain)}))
    return folder


def train_in_two_processes(runs: Sequence[Mapping[str, Any]], seconds: float = 280) -> None:
    """Train runs one after the other, each in the same two processes on this CPU.

    Args:
        runs: options of each, plain values only.
        seconds: after which they are given up.

    Raises:
        RuntimeError: one of them failed; what the processes printed is in it.
    """
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlx.testing.train_all"]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", *words, json.dumps([dict(run) for run in runs])],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    if done.returncode != 0:
        raise RuntimeError(f"a run in two processes failed:\n{done.stdout[-2000:]}\n{done.stderr[:6000]}")
