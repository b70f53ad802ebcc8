"""Sampling by transformers' continuous batching: a paged cache, and a waiting prompt for each freed row.

What this is: the library schedules, keeps the cache and runs the model in a thread of its own; which token
comes next is decided here, in its one logits processor, by the sampler and the uniform numbers of
``rlx.core.decoding``. So draws, log-probs and seeds are those of ``native``, whatever shares a batch. A
prompt is prefilled once and forked for its completions. Cache, graphs and thread live for one call: no key
of older weights is ever met again, and the memory is free for the update.
What this leaves out: repetition penalty and stop strings, which need a row's history; models with other
layers than full and sliding attention.

Legend: N samples, T new tokens, R rows of a step, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from rlx.core import adapters
from rlx.core.decoding import Door, Run
from rlx.core.generation import check_prompts, decoder_of, sampling_mode
from rlx.core.pretrained import quiet
from rlx.core.tree_attention import NAME as TREE
from rlx.plugins.contract import Completions, Sampling
from rlx.plugins.telling import Complete, OnComplete

MOST_BATCH_TOKENS = 8192  # of a step, prompts included, where nobody says how many
MOST_ROWS = 1024  # of a step, likewise: each has its logits in float32, several times over
HALF = (torch.bfloat16, torch.float16)
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.25
"""Largest distance in nats of a trial's log-probs from those of a plain forward."""


@torch.no_grad()
def generate_paged(
    model: nn.Module,
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    seeds: Sequence[int],
    limits: Mapping[str, Any],
    on_complete: OnComplete | None = None,
) -> Completions:
    """Sample n completions of each prompt.

    Args:
        model: a causal language model of transformers, also inside PEFT or accelerate's wrapper.
        prompts: token ids, none empty.
        n: completions a prompt.
        sampling: how to draw; ``batch_size`` is the most rows of a step.
        seeds: one a prompt.
        limits: fields of transformers' ``ContinuousBatchingConfig``.
        on_complete: called with completions that will not change any more, each once.

    Returns:
        Completions, n adjacent ones a prompt. Without log-probs under autocast: the model then runs in the
        type of its weights here, and elsewhere does not.

    Raises:
        ConfigError: sampling options that have no meaning for this model.
        DataError: an empty prompt, an unknown token, or a prompt that leaves no room for a completion.
        DivergedError: logits that are not finite.
    """
    decoder = decoder_of(model)
    check_prompts(decoder, prompts, seeds, sampling)
    if not prompts or n == 0:
        return Completions([], [], [])
    run = Run(Door(model, decoder), prompts, n, sampling, seeds, None, on_complete)
    with (
        sampling_mode(model),
        _attention_kept(decoder),
        torch.random.fork_rng(_devices(decoder)),
        _little_garbage(),
    ):
        _decode(run, sampling, limits)
    done = run.completions()
    if torch.is_autocast_enabled(run.door.device.type):
        return Completions(done.ids, None, done.finished)
    return done


def why_not(model: nn.Module, limits: Mapping[str, Any]) -> str | None:
    """Whether a model can be sampled from in this way, found out by a few tokens.

    Args:
        model: as in ``generate_paged``.
        limits: likewise.

    Returns:
        None if its log-probs are those of a plain forward; else why not.
    """
    adapted: Any = model if adapters.is_adapted(model) else None
    if adapted is not None and adapted.active_peft_config.is_prompt_learning:
        return "its adapter puts virtual tokens before the first one"
    if "page_size" not in ContinuousBatchingConfig.__dataclass_fields__:
        return f"it needs transformers 5.23 or newer, and this is {transformers.__version__}"
    decoder = decoder_of(model)
    draw = torch.Generator().manual_seed(0)
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    prompts = [torch.randint(vocabulary, (size,), generator=draw).tolist() for size in (9, 5)]
    try:
        with quiet(), torch.autocast(decoder.device.type, enabled=False):
            done = generate_paged(model, prompts, 2, Sampling(4), [0, 1], limits)
            worst = max(
                _distance(model, prompts[number // 2], ids, logps)
                for number, (ids, logps) in enumerate(zip(done.ids, done.logprobs or [], strict=True))
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model or the library does with what it does not know
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    tolerance = HALF_TOLERANCE if decoder.dtype in HALF else TOLERANCE
    return None if worst <= tolerance else f"its log-probs would be off by {worst:.2g} nats"


@torch.no_grad()
def _distance(model: nn.Module, prompt: list[int], ids: list[int], logps: list[float]) -> float:
    """How far log-probs are from those of one forward without cache."""
    text = torch.tensor([prompt + ids], device=decoder_of(model).device)
    with sampling_mode(model):
        logits = model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    plain = logits.log_softmax(-1).gather(1, text[0, len(prompt) :, None])[:, 0]
    return float((plain - torch.tensor(logps, device=plain.device)).abs().max())


class _Draw(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Leaves the drawn token alone with a finite score, and writes its log-prob down.

    Each row of a step is told one number: its cell, sample · T + step, in tables that stay where they are, so
    that a CUDA graph may hold them. A spare cell takes what counts for nothing: rows of padding or of a
    warm-up, and the step that is computed before its row is known to have ended.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, run: Run) -> None:
        self.run, self.widest = run, 0
        self.samples: dict[str, int] = {}  # by the library's name of the request
        self.spare = run.logps.numel()
        self.logps = run.logps.new_zeros(self.spare + 1)
        table = run.uniform
        self.uniform = None if table is None else torch.cat([table.flatten(), table.new_zeros(1)])

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """The cell of rows that were told nothing yet."""
        int32_tensor.fill_(self.spare)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """(R,) int32 cells; as many as ever before, for what an earlier step was told stays in place."""
        cells = [self._cell(request.state) for request in requests_with_new_token]
        self.widest = max(self.widest, len(cells))
        return torch.tensor(cells + [self.spare] * (self.widest - len(cells)), dtype=torch.int32)

    def _cell(self, state: Any) -> int:
        sample = self.samples.get(state.request_id)
        if sample is None:  # a warm-up
            return self.spare
        step = int(state.position_offset) - len(self.run.prompts[sample // self.run.n])
        return sample * self.run.length + step if step < self.run.length else self.spare

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        cells = tensor_arg[: len(scores)].long()
        uniform = None if self.uniform is None else self.uniform[cells]
        tokens, logps = self.run.sampler(scores, None, uniform)
        self.logps[cells] = logps
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _decode(run: Run, sampling: Sampling, limits: Mapping[str, Any]) -> None:
    """Sample all of a run, and write down what came of it.

    Raises:
        DivergedError: logits that are not finite.
    """
    draw = _Draw(run)
    manager = _manager(run, sampling, limits, draw)
    try:
        stops = list(sampling.stop_token_ids) or [-1]
        for number, prompt in enumerate(run.prompts):
            # Forking leaves a prompt's last token to each completion; a prompt of one token has no more.
            names = _names(number, run.n, forked=len(prompt) > 1)
            draw.samples |= {name: number * run.n + place for place, name in enumerate(names)}
            manager.num_return_sequences = run.n if len(prompt) > 1 else 1
            for name in names[: 1 if len(prompt) > 1 else run.n]:
                manager.add_request(prompt, name, run.length, eos_token_id=stops)
        # Once all are there: else the clock would decide which share a step, and so rounding and their order.
        manager.start()
        outputs = {}
        for name, ids in _outputs(manager, len(run.prompts) * run.n):
            outputs[name] = ids
            if run.on_complete is not None:
                place = divmod(draw.samples[name], run.n)
                run.on_complete([Complete(*place, ids, finished=ids[-1] in sampling.stop_token_ids)])
    finally:
        if manager.is_running():
            manager.stop(block=True, hard_stop=True)
        manager.destroy()
    run.logps = draw.logps[: draw.spare].view_as(run.logps)
    for name, ids in outputs.items():
        sample = draw.samples[name]
        run.tokens[sample, : len(ids)] = torch.tensor(ids, device=run.door.device)
        run.lengths[sample] = len(ids)
        run.stopped[sample] = ids[-1] in sampling.stop_token_ids
    step = torch.arange(run.length, device=run.door.device)
    broken = ~run.logps.isfinite() & (step < run.lengths[:, None])
    if bool(broken.any()):
        first = int(broken.any(0).nonzero()[0])
        raise run.diverged(broken[:, first].nonzero()[:, 0], first)


def _names(number: int, n: int, forked: bool) -> list[str]:
    """What the library calls the n requests of a prompt."""
    children = [f"{number}__child#{child}" for child in range(n - 1)]
    return [str(number), *(children if forked else (f"{number}.{place}" for place in range(1, n)))]


def _manager(run: Run, sampling: Sampling, limits: Mapping[str, Any], draw: _Draw) -> Any:
    """The library's manager, its cache made and its graphs captured, with room for as much as fits."""
    decoder, rows = run.door.decoder, len(run.prompts) * run.n
    # One that somebody kept has its own processors, and keys of older weights.
    decoder.destroy_cached_continuous_batching_manager()
    tokens = max(rows, sum(map(len, run.prompts)))
    given = {"max_batch_tokens": min(MOST_BATCH_TOKENS, tokens), **_said(limits)}
    given["max_requests_per_batch"] = min(
        sampling.batch_size or min(rows, MOST_ROWS), given["max_batch_tokens"]
    )
    wanted = _blocks(run, given["page_size"])
    # A cache for everything at once, or, where that is too much, as large as the memory allows.
    sizes = [given["num_blocks"]] if "num_blocks" in given else [wanted, None]
    hints = WorkloadHints(max(map(len, run.prompts)), run.length, rows)
    errors: list[Exception] = []
    for blocks in sizes:
        manager = decoder.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=run.length, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                **{
                    **given,
                    "num_blocks": blocks,
                    "auto_switch_to_flash": decoder.device.type == "cuda" and decoder.dtype in HALF,
                    "seed": 0,  # of nothing: our own numbers decide
                }
            ),
            workload_hints=hints,
        )
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([draw]))
        processors.tensors_required = 1  # the row of cells
        manager.logit_processor = processors
        try:
            manager.warmup()
            return manager
        except (MemoryError, ValueError) as error:
            manager.destroy()
            errors.append(error)
    raise torch.OutOfMemoryError(f"no room for the paged cache: {errors[-1]}") from errors[-1]


def _said(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not left to be found out."""
    return {name: value for name, value in limits.items() if value is not None}


def _blocks(run: Run, page_size: int) -> int:
    """Blocks that all samples need at once; a model may have two kinds of layers, each with its own."""
    longest = max(map(len, run.prompts)) + run.length
    return 2 * (len(run.prompts) * run.n + 1) * (math.ceil(longest / page_size) + 1)


def _outputs(manager: Any, total: int) -> Iterator[tuple[str, list[int]]]:
    """Requests with their token ids as they end; what stopped the library's thread is raised."""
    ended: set[str] = set()
    while len(ended) < total:
        output = manager.get_result(timeout=1)
        if output is None and manager.is_running():
            continue
        if output is None or output.error is not None:
            told = "it stopped" if output is None else output.error
            manager.join(0.0, timeout=10)  # the cause is recorded last
            cause = manager.background_thread_status.fatal_error
            raise cause if cause is not None else RuntimeError(f"continuous batching: {told}")
        if output.is_finished():
            ended.add(output.request_id)
            yield output.request_id, output.generated_tokens


@contextmanager
def _attention_kept(decoder: PreTrainedModel) -> Iterator[None]:
    """An attention that the library takes, for a while; afterwards each module has its own again."""
    modules = [module for module in decoder.modules() if isinstance(module, PreTrainedModel)]
    own = [(module, module.config._attn_implementation) for module in modules]
    try:
        if decoder.config._attn_implementation == TREE:
            decoder.set_attn_implementation("sdpa")
        yield
    finally:
        for module, name in own:
            if module.config._attn_implementation != name:
                module.set_attn_implementation(name)


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Garbage is looked for among new objects only: the library does so twice when it stops."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _devices(decoder: PreTrainedModel) -> list[torch.device]:
    """GPUs whose random numbers are put back; those of the CPU always are."""
    return [decoder.device] if decoder.device.type == "cuda" else []
