"""How much memory a run will take, part by part, before it takes it.

Weights, gradients and optimizer are exact: they follow from the parameters' shapes. Activations, logits and
the KV cache are estimates for a plain transformer decoder: within a factor of 1.5 on Llama, Qwen, Gemma and
GPT-2 blocks, an order of magnitude on anything exotic. A model's configuration is enough; no weight needs to
be loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlx.core import adapters
from rlx.core.adapter_files import check_adapter
from rlx.core.gradients import GradientBuffers
from rlx.core.lm_head import CHUNK_BYTES, KEEP_SHARE, free_bytes
from rlx.core.packed_linear import LEAST_STEPS, copies_bytes
from rlx.core.precision import DTYPES
from rlx.core.recompute import recomputes
from rlx.core.settings import Settings
from rlx.core.values import ValueModel

_STEP_BYTES = 4  # AdamW counts each parameter's steps in a float32
_HIDDEN_STATES = 13  # kept by one block, measured on Llama, Qwen, Gemma and GPT-2 blocks: 11 to 16
_MLP_STATES = 4  # gate, activation, up, product
_CHUNKS = 3  # logits, their exponentials and their gradient, at most, of one chunk

LEAST_TOKENS = 1024
MOST_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Bounds of the tokens of a micro-batch where memory decides; other devices have those of the CPU."""
FILLED = 0.8
"""Share of the free memory that an optimizer step may take by this estimate."""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by part.

    Attributes:
        training: parts that exist while an optimizer step is made.
        sampling: parts that exist while completions are sampled, beside what both share.
        shared: parts that exist all the time.
        available: bytes that can still be allocated now.
        loaded: bytes of the parts that are allocated already, and so are no longer among the available.
    """

    shared: dict[str, int]
    training: dict[str, int]
    sampling: dict[str, int]
    available: int
    loaded: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """All parts that take anything."""
        return {name: size for name, size in (self.shared | self.training | self.sampling).items() if size}

    @property
    def peak(self) -> int:
        """Bytes when most is needed: training and sampling take turns."""
        return sum(self.shared.values()) + max(sum(self.training.values()), sum(self.sampling.values()))

    @property
    def step(self) -> int:
        """Bytes that an optimizer step needs and that are not allocated yet."""
        return sum(self.shared.values()) + sum(self.training.values()) - self.loaded

    @property
    def step_fits(self) -> bool:
        """Whether an optimizer step leaves some of the free memory free."""
        return self.step <= FILLED * self.available

    @property
    def fits(self) -> bool:
        """Whether what is not allocated yet is available."""
        return self.peak - self.loaded <= self.available

    def lines(self) -> list[str]:
        """The report for the plan, a warning at its end where it does not fit."""
        parts = ", ".join(f"{name} {show_bytes(size)}" for name, size in self.parts.items())
        lines = [
            f"memory: about {show_bytes(self.peak)} at most ({parts}); {show_bytes(self.available)} free"
        ]
        if not self.fits:
            lines.append(
                "memory: this may not fit; smaller: --max-tokens-per-micro-batch, --generation-batch-size, "
                "--gradient-checkpointing, --lora-r 16, --dtype bfloat16"
            )
        return lines


def estimate(
    model: Any,
    settings: Settings,
    *,
    token_budget: int,
    generation_rows: int,
    reference: str = "none",
    reference_model: Any = None,
    value: nn.Module | None = None,
    trained: Collection[nn.Parameter] | None = None,
    device: torch.device | None = None,
    checkpointing: bool | None = None,
) -> MemoryReport:
    """What a run needs.

    Args:
        model: the policy's model as it is trained (adapter included), loaded or on the meta device.
        settings: optimizer, generation dtype, lengths.
        token_budget: padded tokens of one micro-batch.
        generation_rows: completions sampled at a time.
        reference: kind of the reference: ``none``, ``adapter off``, ``adapter``, ``copy`` or ``model``.
        reference_model: the model of the kind ``model``; None counts it as large as the policy.
        value: the value function's module.
        trained: what is trained of the model; None for what requires gradients.
        device: where it will run; the model's own by default.
        checkpointing: whether activations are recomputed in the backward pass; None: as the models have it.
    """
    place = next(model.parameters()).device
    device = place if device is None else device
    trained = [p for p in model.parameters() if p.requires_grad] if trained is None else list(trained)
    own = _size(model)
    value_trained = [p for p in value.parameters() if p.requires_grad] if value is not None else []
    every = [*trained, *value_trained]
    kept = GradientBuffers([model, value], every).size if device.type == "cpu" else 0
    shared = {
        "weights": own,
        "value": _size(value) if value is not None else 0,
        "optimizer": optimizer_bytes(every, settings.optim),
        "kept gradients": kept,
        "reference": _reference_bytes(model, own, reference, reference_model),
    }
    trunks = [model, value.backbone] if isinstance(value, ValueModel) else [model]
    training = {
        "gradients": sum(map(_bytes, every)) - kept,
        "activations": sum(
            activation_bytes(
                one, token_budget, checkpointing=recomputes(one) if checkpointing is None else checkpointing
            )
            for one in trunks
        ),
        "logits": logits_bytes(model, token_budget, free_bytes(device)),
    }
    sampling = _sampling(model, settings, generation_rows, device)
    loaded = 0 if place.type == "meta" else own + shared["value"] + shared["reference"]
    return MemoryReport(shared, training, sampling, free_bytes(device), loaded)


def token_budget(model: Any, settings: Settings, **sizes: Any) -> int:
    """Tokens of one forward and backward: those asked for, else as many as are of use and fit into memory.

    Powers of two, so that a little more or less of free memory changes nothing.

    Args:
        model: as of ``estimate``.
        settings: ``max_tokens_per_micro_batch``, and what ``estimate`` reads.
        sizes: the reference, value function, device and checkpointing for ``estimate``.
    """
    if settings.max_tokens_per_micro_batch is not None:
        return settings.max_tokens_per_micro_batch
    device = sizes.get("device") or next(model.parameters()).device
    tokens = MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])
    while tokens > LEAST_TOKENS:
        if estimate(model, settings, token_budget=tokens, generation_rows=0, **sizes).step_fits:
            break
        tokens //= 2
    return tokens


def too_large(model: Any, settings: Settings, **sizes: Any) -> str:
    """Why no optimizer step fits as long as activations are kept; empty where one does, by the estimate.

    Args:
        model: as of ``estimate``.
        settings: ``max_tokens_per_micro_batch``, and what ``estimate`` reads.
        sizes: as of ``token_budget``.
    """
    tokens = settings.max_tokens_per_micro_batch or LEAST_TOKENS
    kept = sizes | {"checkpointing": False}
    report = estimate(model, settings, token_budget=tokens, generation_rows=0, **kept)
    if report.step_fits:
        return ""
    return (
        f"a step of {tokens} tokens would need {show_bytes(report.step)} more without, "
        f"and {show_bytes(report.available)} are free"
    )


def kept_budget(state: Mapping[str, Any], settings: Settings, now: int) -> int:
    """The budget of a checkpoint, halved or not, unless another one was asked for since.

    Args:
        state: ``budget`` and, as ``asked``, ``max_tokens_per_micro_batch`` when the checkpoint was written.
        settings: those of the run that goes on.
        now: its budget.
    """
    return int(state["budget"]) if state["asked"] == settings.max_tokens_per_micro_batch else now


def empty_model(config: Any, settings: Settings, dtype: torch.dtype, *, classifier: bool = False) -> Any:
    """The policy's shapes without numbers, on the meta device, with an adapter where the settings want one.

    Args:
        config: what ``load_config`` gave.
        settings: the options of the panel LoRA.
        dtype: type of the weights.
        classifier: the policy is a sequence classifier; its score head counts for nothing.

    Raises:
        ConfigError: an adapter that does not fit.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        if settings.adapter:
            return _with_empty_adapter(model, Path(settings.adapter), classifier=classifier)
        if settings.lora_r:
            model = adapters.add_lora(
                model,
                rank=settings.lora_r,
                alpha=settings.lora_alpha,
                target_modules=settings.lora_target_modules,
            )
    return model


def _with_empty_adapter(model: Any, folder: Path, *, classifier: bool) -> Any:
    """The model with an adapter of the shapes that a folder has, without its numbers; the base is frozen."""
    from peft import PeftConfig, get_peft_model

    check_adapter(model, folder, classifier=classifier)
    config = PeftConfig.from_pretrained(str(folder))
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    return get_peft_model(model, config)


def optimizer_bytes(parameters: Iterable[nn.Parameter], optim: str) -> int:
    """Bytes of an optimizer's state once it has stepped: AdamW keeps two moments in the parameter's type."""
    return sum(2 * _bytes(p) + _STEP_BYTES for p in parameters) if optim == "adamw" else 0


def activation_bytes(model: Any, tokens: int, *, checkpointing: bool = False) -> int:
    """Bytes that a forward pass of the model's trunk keeps for the backward pass.

    A block keeps about 13 hidden states (two norms, queries, keys and values, the attention's output,
    residuals) and 4 MLP-wide ones; with checkpointing it keeps its input, and one block at a time is whole.

    Args:
        model: loaded or on the meta device.
        tokens: padded tokens of the pass.
        checkpointing: whether activations are recomputed.
    """
    config = model.config.get_text_config(decoder=True)
    width = _compute_dtype(model).itemsize
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    block = (_HIDDEN_STATES * hidden + _MLP_STATES * _mlp_width(config)) * width * tokens
    return layers * hidden * width * tokens + block if checkpointing else layers * block


def logits_bytes(model: Any, tokens: int, free: int) -> int:
    """Bytes of float32 logits when every token is scored: all where they may be kept, else a few chunks."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    whole, chunk = 4 * vocabulary * tokens, max(CHUNK_BYTES, 4 * vocabulary)
    passing = min(whole, chunk) * _CHUNKS
    return whole + passing if whole <= KEEP_SHARE * free else passing


def kv_cache_bytes(config: Any, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of all layers when every row is as long as it can get.

    Args:
        config: the model's configuration.
        rows: completions at a time.
        length: tokens of prompt and completion.
        dtype: type of the cache.
    """
    config = config.get_text_config(decoder=True)
    fields = config.to_dict()
    heads = int(fields.get("num_key_value_heads") or config.num_attention_heads)
    head = int(fields.get("head_dim") or config.hidden_size // config.num_attention_heads)
    return 2 * rows * length * int(config.num_hidden_layers) * heads * head * dtype.itemsize


def show_bytes(size: int) -> str:
    """A size for people: ``512 B``, ``3.4 MiB``, ``12 GiB``."""
    number, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(module: nn.Module) -> int:
    """Bytes of parameters and buffers; what is shared counts once."""
    return sum(_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _sampling(model: Any, settings: Settings, rows: int, device: torch.device) -> dict[str, int]:
    """What exists while so many completions are sampled, part by part."""
    length = settings.max_prompt_length + settings.max_completion_length
    dtype, cast = (
        DTYPES.get(settings.generation_dtype, _compute_dtype(model)),
        settings.generation_dtype != "none",
    )
    computes = torch.bfloat16 if settings.mixed_precision == "bf16" and not cast else dtype
    lays_out = rows and device.type == "cpu" and settings.max_completion_length >= LEAST_STEPS
    return {
        "generation weights": sum(p.numel() for p in model.parameters() if p.dtype != dtype) * dtype.itemsize
        if cast
        else 0,
        "laid-out weights": copies_bytes(model, computes) if lays_out else 0,
        "kv cache": kv_cache_bytes(model.config, rows, length, dtype),
    }


def _reference_bytes(model: Any, own: int, kind: str, reference_model: Any) -> int:
    if kind == "copy":
        return own
    if kind == "model":
        return own if reference_model is None else _size(reference_model)
    return 0  # an adapter on the policy's base is counted with the policy


def _compute_dtype(model: Any) -> torch.dtype:
    """The type of the widest weights: of the base, not of a float32 adapter or norm on it."""
    largest: Tensor = max(model.parameters(), key=lambda p: p.numel())
    return largest.dtype


def _mlp_width(config: Any) -> int:
    """Numbers of an MLP's inside for one token; of all its experts in a mixture."""
    fields = config.to_dict()
    dense = int(fields.get("intermediate_size") or fields.get("n_inner") or 4 * config.hidden_size)
    experts, width = fields.get("num_experts_per_tok"), fields.get("moe_intermediate_size")
    return int(experts) * int(width or dense) if experts else dense
