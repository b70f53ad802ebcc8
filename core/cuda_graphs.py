"""Sampling by replayed CUDA graphs: one captured decode step for each bucket of rows.

What this is: ``GraphGenerator`` keeps a ``Stage`` of ``rlx.core.static_decoding`` from one round of sampling
to the next, with a graph for each number of rows that it met. A graph holds addresses: of the stage, of the
weights, which the optimizer updates in place, and of an adapter. Whatever changes them (a cast, another
adapter, longer prompts) makes a new stage. Before a graph is used its logits are compared with those of the
step itself. A model for which any of this does not hold is sampled from as ever, and that is said once.
What this leaves out: prefill, drawing and stopping, which are those of ``rlx.core.decoding``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlx.core.decoding import Door, Run
from rlx.core.generation import check_prompts, decoder_of, generate, sampling_mode
from rlx.core.lm_head import free_bytes
from rlx.core.static_decoding import Stage, bucket, decode_static, difference, length_of, why_not
from rlx.plugins.contract import Completions, Sampling
from rlx.plugins.telling import OnComplete

log = logging.getLogger(__name__)

WARM_UPS = 3  # steps before a capture: libraries choose their kernels and take their workspaces
KEPT_SHARE = 0.1
"""Most of the free memory that buffers and graphs may hold while nothing is sampled."""


class CannotCaptureError(Exception):
    """A step cannot be captured, or its replay is not the step."""


class GraphGenerator:
    """Samples as ``rlx.core.generation.generate`` does, each step by a graph.

    Args:
        captured: False: the same steps one kernel at a time, on any device.
    """

    def __init__(self, *, captured: bool = True) -> None:
        self.captured = captured
        self.stage: Stage | None = None
        self.graphs: Graphs | None = None
        self._addresses: object = None
        self._verdicts: dict[object, str | None] = {}  # by what a model is: why it cannot be, or None

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        tokenizer: Any = None,
        batch_size: int | None = None,
        on_complete: OnComplete | None = None,
    ) -> Completions:
        """Sample n completions of each prompt; arguments and errors are those of ``generate``.

        Raises:
            OutOfMemoryError: with stage and graphs given back.
        """
        decoder = decoder_of(model)
        check_prompts(decoder, prompts, seeds, sampling)
        if not prompts or n == 0:
            return Completions([], [], [])
        door = Door(model, decoder)
        try:
            with sampling_mode(model):
                if self._why_not(door) is None:
                    run = Run(door, prompts, n, sampling, seeds, tokenizer, on_complete)
                    self._decode(run, batch_size)
                    return run.completions()
        except CannotCaptureError as error:
            self._refuse(door, str(error))
            on_complete = None  # some may have been told of already
        except BaseException:
            self.release()  # what a step that failed has left in the buffers is not to be met again
            raise
        options: dict[str, Any] = {"batch_size": batch_size, "on_complete": on_complete}
        return generate(model, prompts, n, sampling, seeds, tokenizer=tokenizer, **options)

    def release(self) -> None:
        """Give stage and graphs back."""
        self.stage = self.graphs = self._addresses = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _decode(self, run: Run, batch_size: int | None) -> None:
        batches = list(run.batches(batch_size))
        rows = bucket(max(map(len, batches)))
        length = length_of(max(map(len, run.prompts)) + run.length)
        for samples in batches:
            decode_static(run, samples, lambda cache: self._stage_for(run.door, cache, rows, length))
        held = 0 if self.stage is None else self.stage.bytes + (self.graphs.bytes if self.graphs else 0)
        if held > KEPT_SHARE * free_bytes(run.door.device):
            self.release()

    def _stage_for(self, door: Door, cache: DynamicCache, rows: int, length: int) -> Stage:
        """The stage that is there, if it is large enough and nothing has moved; else a new one."""
        now = (addresses(door), [(layer.keys.dtype, layer.keys.shape[1]) for layer in cache.layers])
        old = self.stage
        if old is None or old.most < rows or old.length < length or self._addresses != now:
            self.release()
            old = self.stage = Stage(door, cache, rows, length)
            self._addresses = now
            if self.captured:
                self.graphs = Graphs(door.device)
                old.replay = self.graphs
        old.door = door
        return old

    def _why_not(self, door: Door) -> str | None:
        key = kind_of(door)
        if key not in self._verdicts:
            reason = self._verdicts[key] = why_not(door)
            if reason is not None:
                self._refuse(door, reason)
        return self._verdicts[key]

    def _refuse(self, door: Door, reason: str) -> None:
        self._verdicts[kind_of(door)] = reason
        self.release()
        log.warning("cuda_graphs: %s is decoded without: %s", type(door.decoder).__name__, reason)


class Graphs:
    """Captured steps of a stage, by rows; called in the place of the step.

    Args:
        device: of the stage.

    Attributes:
        bytes: that capturing has taken from the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self.pool: Any = None
        self.captured: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, stage: Stage) -> Tensor:
        """(R, V) logits, which the next call may write over."""
        if stage.rows not in self.captured:
            self.captured[stage.rows] = self._capture(stage)
        graph, logits = self.captured[stage.rows]
        graph.replay()
        return logits

    def _capture(self, stage: Stage) -> tuple[Any, Tensor]:
        """The graph of a step and its logits; the stage is where it was.

        Raises:
            CannotCaptureError: the step asks the device for a number, or its replay has other logits.
        """
        back, before = stage.remember(), torch.cuda.memory_reserved(self.device)
        with torch.cuda.device(self.device):
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    wanted = stage.step().clone()
                    back()
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads, as of rewards and trackers, may use the device meanwhile.
                # A capture that fails leaves its own stream in use: the outer block goes back to ours.
                with (
                    torch.cuda.stream(torch.cuda.current_stream(self.device)),
                    torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
                ):
                    logits = stage.step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                first = (str(error).strip().splitlines() or [""])[0]
                raise CannotCaptureError(f"its step cannot be captured: {first[:200]}") from error
        graph.replay()
        off = difference(logits, wanted)
        back()
        if off is not None:
            raise CannotCaptureError(f"a replayed step's logits are off by {off:.2g} of the largest")
        self.bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph, logits


def addresses(door: Door) -> tuple[object, ...]:
    """What a graph takes for granted: where weights lie, in which types, and which adapter acts."""
    tensors = [*door.model.parameters(), *door.model.buffers()]
    return tuple((t.data_ptr(), t.dtype) for t in tensors), *kind_of(door)


def kind_of(door: Door) -> tuple[object, ...]:
    """What decides whether a model can be captured: itself, its attention, precision and adapters."""
    kind = door.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    acting = tuple(
        (str(module._active_adapter), getattr(module, "_disable_adapters", False), str(module.scaling))
        for module in door.model.modules()
        if hasattr(module, "_active_adapter") and hasattr(module, "scaling")
    )
    return id(door.decoder), door.decoder.config._attn_implementation, door.decoder.dtype, autocast, acting
