"""Finding out, once a model, how its logits come about: trunk, output head, and what happens after the head.

The finding is checked against the model itself on a few tokens, so that no list of architectures is needed
and an unknown one falls back to the model's own logits instead of going wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlx.core.errors import ConfigError
from rlx.core.lm_head import Transform

if TYPE_CHECKING:
    from rlx.core.batch import Sequences

logger = logging.getLogger(__name__)

SCALES: dict[str, Callable[[float], tuple[float, ...]]] = {
    "logit_scale": lambda x: (x,),
    "logits_scaling": lambda x: (1 / x, x),  # Granite divides by it, HyperCLOVA X multiplies
    "lm_head_multiplier": lambda x: (x,),
    "output_multiplier": lambda x: (x,),
}
"""Config names of a factor between head and softmax → the factors it may stand for."""

SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap", "softcap")
"""Config names of a soft cap on the logits."""

PROBE_TOKENS = 8

CausalLM = Any
"""A ``PreTrainedModel`` or a ``PeftModel`` around one: they share methods, but no type."""


@dataclass(frozen=True)
class Plan:
    """How a model's log-probs are computed.

    Attributes:
        head: class of the output head when this was found out; another one means looking again.
        direct: trunk, head and transform one after another give the model's logits. False: call the model.
        masked: padding must be told to the model; most causal models need not know.
        scale: factor between head and softmax.
        softcap: soft cap after it, or None.
        trunk_ref: what gives hidden states; a plan does not keep a model alive. None unless ``direct``.
    """

    head: type
    direct: bool
    masked: bool = False
    scale: float = 1.0
    softcap: float | None = None
    trunk_ref: ref[nn.Module] | None = None

    @property
    def trunk(self) -> nn.Module | None:
        """What gives hidden states, adapters included; None unless ``direct``."""
        return None if self.trunk_ref is None else self.trunk_ref()


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def plan_for(model: CausalLM, sequences: Sequences) -> Plan:
    """The plan of a model, found out with the first few tokens of sequences if it is not known yet.

    Nothing in a plan depends on which adapter is active or on the values of the weights.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        sequences: at least one token, on the model's device.

    Raises:
        ConfigError: for an encoder-decoder, or a model whose logits change with tokens that come later.
    """
    head = type(model.get_output_embeddings())
    plan = _plans.get(model)
    if plan is None or plan.head is not head:
        plan = _plans[model] = _make_plan(model, sequences.ids)
        if not plan.direct:
            logger.warning(
                "%s: trunk and output head called apart do not give its logits; log-probs come from the full "
                "logits instead, which takes more time and memory",
                type(model).__name__,
            )
    return plan


def trunk_of(model: CausalLM) -> nn.Module:
    """The part of a causal language model that gives hidden states, adapters included.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
    """

    def headless(part: nn.Module) -> bool:
        return isinstance(part, PreTrainedModel) and part.get_output_embeddings() is None

    # In some architectures transformers' rule of thumb finds the head, or the model itself: look further.
    candidates: list[nn.Module] = [model.get_decoder(), *model.modules()]
    return next(filter(headless, candidates), candidates[0])


def _make_plan(model: CausalLM, ids: Tensor) -> Plan:
    """Probe a model in eval mode (no random draw is used up), and put every module back into its mode."""
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder",
            code="E-MODEL-ENCODER-DECODER",
            expected="a causal language model (decoder only)",
            hint="choose another model",
        )
    ids = ids[torch.arange(PROBE_TOKENS, device=ids.device) % len(ids)]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            return _probe(model, ids)
    finally:
        for module in training:
            module.training = True


def _probe(model: CausalLM, ids: Tensor) -> Plan:
    """Watch the model on a few tokens (PROBE_TOKENS,), and see whether its parts do the same."""
    head = type(model.get_output_embeddings())
    hidden, transform = _watch_head(model, ids)
    padded, half = ids.repeat(2, 1), PROBE_TOKENS // 2
    padded[1, half:] = 0
    mask = torch.ones_like(padded)
    mask[1, half:] = 0

    def imitated(got: Tensor, want: Tensor) -> bool:
        """Whether rows (2, L, …), the second one cut and padded, agree with one row (L, …)."""
        return _close(got[0], want) and _close(got[1, :half], want[:half])

    masks: list[dict[str, Tensor]] = [{}, {"attention_mask": mask}]
    if hidden is not None and transform is not None:
        trunk = trunk_of(model)
        for extra in masks:
            if imitated(trunk(input_ids=padded, use_cache=False, **extra)[0], hidden):
                return Plan(head, True, bool(extra), transform.scale, transform.softcap, ref(trunk))
    want = model(input_ids=ids[None], use_cache=False).logits[0, -PROBE_TOKENS:]
    for extra in masks:
        got = model(input_ids=padded, use_cache=False, **extra).logits
        if imitated(got[:, -PROBE_TOKENS:], want):
            return Plan(head, False, bool(extra))
    raise ConfigError(
        f"the logits of {type(model).__name__} change with tokens that come later",
        code="E-MODEL-NOT-CAUSAL",
        expected="a causal language model",
        hint="load it as a decoder (is_decoder in its config), or choose another model",
    )


def _watch_head(model: CausalLM, ids: Tensor) -> tuple[Tensor | None, Transform | None]:
    """What the head is given (L, D), and what is done with its output; None where that is not known."""
    head = model.get_output_embeddings()
    # Prompt and prefix tuning act outside the trunk. Only PEFT models, and transformers models with an
    # adapter loaded into them, have peft_config.
    adapters = model.peft_config if hasattr(model, "peft_config") else {}
    if head is None or any(adapter.is_prompt_learning for adapter in adapters.values()):
        return None, None
    hidden, raw = [], []

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Known large logits instead of the head's: a soft cap does nothing to the small ones of a new model.
        ramp = torch.linspace(-200, 200, output.shape[-1], device=output.device)
        hidden.append(inputs[0])
        raw.append(ramp.to(output.dtype).expand_as(output))
        return raw[-1].clone()

    watch = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits
    finally:
        watch.remove()
    if len(hidden) != 1 or hidden[0].dim() != 3 or raw[0].shape != logits.shape:
        return None, None
    return hidden[0][0], _find_transform(model, raw[0], logits)


def _find_transform(model: CausalLM, raw: Tensor, logits: Tensor) -> Transform | None:
    """The combination of the config's factors and soft caps that makes logits of the head's output."""
    config = model.config.get_text_config(decoder=True).to_dict()
    numbers = {name: float(x) for name, x in config.items() if isinstance(x, int | float) and x}
    scales = [1.0] + [f for name in SCALES if name in numbers for f in SCALES[name](numbers[name])]
    softcaps = [None] + [numbers[name] for name in SOFTCAPS if name in numbers]
    for scale, softcap in product(scales, softcaps):
        transform = Transform(scale=scale, softcap=softcap)
        if _close(transform(raw), logits):
            return transform
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which is coarse in half precision."""
    if a.shape != b.shape:
        return False
    half = torch.is_autocast_enabled(a.device.type) or min(a.element_size(), b.element_size()) < 4
    # Weights that are not finite show up in the log-probs, where they are reported as what they are.
    a, b = a.float().nan_to_num(), b.float().nan_to_num()
    return bool((a - b).abs().max() <= (0.05 if half else 1e-3) * b.abs().max())
