"""Log-probs, entropies and values of scored tokens, from any transformers causal language model.

The trunk (the decoder without its output head) runs over right-padded sequences; its hidden states go through the head
only at positions that predict a scored token, and never as one [batch, time, vocabulary] tensor. Leaves out: generation,
and which model is the reference (the caller passes it).

Legend: N sequences, T tokens, S scored tokens, L tokens of the longest sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from rlx.core.batch import Scores, Sequences, flat_index
from rlx.core.errors import ConfigError
from rlx.core.lm_head import CHUNK_BYTES, Transform, head_logps, logits_logps, module_logps
from rlx.core.microbatch import cut

if TYPE_CHECKING:
    from accelerate import Accelerator

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


@dataclass(frozen=True)
class Plan:
    """How a model's log-probs are computed, found out once a model.

    Attributes:
        head: class of the output head when this was found out; another one means looking again.
        direct: trunk, head and transform called one after another give the model's logits. False: call the model.
        masked: padding must be told to the model; most causal models need not know.
        scale: factor between head and softmax.
        softcap: soft cap after it, or None.
    """

    head: type | None
    direct: bool
    masked: bool = False
    scale: float = 1.0
    softcap: float | None = None


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def score(
    model: nn.Module,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    value_head: nn.Module | None = None,
    token_budget: int = 4096,
    accelerator: Accelerator | None = None,
) -> Scores:
    """Log-prob of every scored token under a model.

    With gradients enabled this is one differentiable pass over all sequences: cut them before. Without, they are cut
    here by token budget, and those without a scored token are left out. Train or eval mode, and so dropout, is the
    caller's choice.

    Args:
        model: a transformers causal language model or a PEFT model around one. Data-parallel wrappers are taken off, so
            their gradient hooks do not run: gradients are those of this process, and the caller adds them up.
        sequences: on any device.
        temperature: logits are divided by it, > 0.
        entropy: also give the entropy of the distribution that each token is drawn from.
        value_head: hidden states (S, D) → values (S,), applied where each scored token is predicted.
        token_budget: padded tokens of a forward pass, when no gradient is wanted.
        accelerator: its autocast is entered; None for none.

    Returns:
        (S,) float32 each, in the order of the scored tokens, on the model's device.

    Raises:
        ConfigError: for an encoder-decoder, or a model whose logits change with tokens that come later.
    """
    bare = extract_model_from_parallel(model)
    sequences = sequences.to(bare.get_input_embeddings().weight.device)
    with accelerator.autocast() if accelerator is not None else nullcontext():
        plan = plan_for(bare, sequences)
        if torch.is_grad_enabled():
            return _score_part(bare, plan, sequences, temperature, entropy, value_head)
        parts = _parts(sequences, token_budget)
        scored = [
            _score_part(bare, plan, sequences.take(part), temperature, entropy, value_head) for part in parts
        ]
    return Scores(
        _in_order([s.logps for s in scored], parts, sequences),
        _in_order([s.entropy for s in scored], parts, sequences) if entropy else None,
        _in_order([s.values for s in scored], parts, sequences) if value_head is not None else None,
    )


@torch.no_grad()
def full_kl(
    policy_model: nn.Module,
    reference_context: Callable[[], AbstractContextManager[nn.Module]],
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    token_budget: int = 4096,
    accelerator: Accelerator | None = None,
) -> Tensor:
    """Exact KL(policy‖reference) of the next-token distributions, at every scored token.

    The context is entered again for every chunk of rows, because an adapter may sit on the head itself.

    Args:
        policy_model: as in ``score``.
        reference_context: gives a context in which the yielded model is the reference; it may be policy_model with its
            adapter off.
        sequences: on any device.
        temperature: both models' logits are divided by it.
        token_budget: padded tokens of a forward pass.
        accelerator: its autocast is entered; None for none.

    Returns:
        (S,) float32, nats, on the model's device; not negative beyond rounding.
    """
    policy = extract_model_from_parallel(policy_model)
    sequences = sequences.to(policy.get_input_embeddings().weight.device)
    parts, found = _parts(sequences, token_budget), []
    with accelerator.autocast() if accelerator is not None else nullcontext():
        for part in parts:
            taken = sequences.take(part)
            here = _Readout(policy, plan_for(policy, taken), taken)
            with reference_context() as model:
                reference = extract_model_from_parallel(model)
                there = _Readout(reference, plan_for(reference, taken), taken)
            for at in here.chunks():
                p = here.log_softmax(at, temperature)
                with reference_context():
                    q = there.log_softmax(at, temperature)
                found.append(p.exp().mul_(p.sub(q)).sum(-1))
    flat = torch.cat(found) if found else torch.zeros(0, device=sequences.ids.device)
    return _in_order([flat], [torch.cat(parts)] if parts else [], sequences)


def plan_for(model: nn.Module, sequences: Sequences) -> Plan:
    """The plan of a model, found out with the first few tokens of sequences if it is not known yet.

    Raises:
        ConfigError: for an encoder-decoder, or a model whose logits change with tokens that come later.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder",
            code="E-MODEL-ENCODER-DECODER",
            expected="a causal language model (decoder only)",
            hint="choose another model",
        )
    head = model.get_output_embeddings()
    plan = _plans.get(model)
    if plan is None or plan.head is not type(head):
        if not len(sequences.ids):
            return Plan(type(head), direct=False)
        plan = _plans[model] = _make_plan(model, head, sequences.ids)
        if not plan.direct:
            logger.warning(
                "%s: trunk and head called apart do not give the model's logits; log-probs come from the full logits "
                "instead, which is slower and takes more memory",
                type(model).__name__,
            )
    return plan


def _make_plan(model: nn.Module, head: nn.Module | None, ids: Tensor) -> Plan:
    """Probe a model in eval mode (no random draw is used up), and put every module back into its mode."""
    ids = ids[torch.arange(PROBE_TOKENS, device=ids.device) % len(ids)]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            return _probe(model, head, ids)
    finally:
        for module in training:
            module.training = True


def _probe(model: nn.Module, head: nn.Module | None, ids: Tensor) -> Plan:
    """Call the model on a few tokens (PROBE_TOKENS,), watch its trunk and head, and imitate it."""
    seen: dict[str, Tensor] = {}

    def loud(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A soft cap does nothing to the small logits of an untrained model: make them large before the model goes on.
        seen["hidden"], seen["raw"] = inputs[0], output * (50 / output.abs().max().clamp(min=1e-6))
        return seen["raw"]

    watched = head.register_forward_hook(loud) if head is not None else None
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits
    finally:
        if watched is not None:
            watched.remove()
    padded = ids.repeat(2, 1)
    padded[1, PROBE_TOKENS // 2 :] = 0
    lengths = torch.tensor([PROBE_TOKENS, PROBE_TOKENS // 2], device=ids.device)
    mask = torch.arange(PROBE_TOKENS, device=ids.device) < lengths[:, None]
    transform = (
        None
        if "raw" not in seen or _is_prompt_learning(model)
        else _find_transform(model, seen["raw"], logits)
    )
    if transform is not None:
        trunk = model.get_decoder()
        for attention_mask in (None, mask.long()):
            hidden = trunk(input_ids=padded, attention_mask=attention_mask, use_cache=False)[0]
            if _close(hidden[0], seen["hidden"][0]) and _close(
                hidden[1][mask[1]], seen["hidden"][0][mask[1]]
            ):
                masked = attention_mask is not None
                return Plan(type(head), True, masked, transform.scale, transform.softcap)
    want = model(input_ids=ids[None], use_cache=False).logits[0, -PROBE_TOKENS:]
    for attention_mask in (None, mask.long()):
        got = model(input_ids=padded, attention_mask=attention_mask, use_cache=False).logits[
            :, -PROBE_TOKENS:
        ]
        if _close(got[0], want) and _close(got[1][mask[1]], want[mask[1]]):
            return Plan(type(head), direct=False, masked=attention_mask is not None)
    raise ConfigError(
        f"the logits of {type(model).__name__} depend on tokens that come later, or on padding",
        code="E-MODEL-NOT-CAUSAL",
        expected="a causal language model",
        hint="load it with is_decoder=true in its config, or choose another model",
    )


def _find_transform(model: nn.Module, raw: Tensor, logits: Tensor) -> Transform | None:
    """Which combination of the config's factors and soft caps makes logits of the head's raw output; None for none."""
    config = model.config.get_text_config(decoder=True)
    numbers = {
        name: value for name, value in config.to_dict().items() if isinstance(value, int | float) and value
    }
    scales = [1.0] + [
        f for name, factors in SCALES.items() if name in numbers for f in factors(numbers[name])
    ]
    softcaps = [None] + [float(numbers[name]) for name in SOFTCAPS if name in numbers]
    for scale, softcap in product(scales, softcaps):
        transform = Transform(scale=scale, softcap=softcap)
        if raw.shape == logits.shape and _close(transform(raw), logits):
            return transform
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which is coarse in half precision."""
    if a.shape != b.shape:
        return False
    loose = min(torch.finfo(a.dtype).bits, torch.finfo(b.dtype).bits) < 32 or torch.is_autocast_enabled(
        a.device.type
    )
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= (0.05 if loose else 1e-3) * b.abs().max())


def _is_prompt_learning(model: nn.Module) -> bool:
    """Whether virtual tokens are put before the input outside the trunk (PEFT's prompt and prefix tuning)."""
    # Only PEFT models, and transformers models with an adapter loaded into them, have the attribute.
    adapters = model.peft_config if hasattr(model, "peft_config") else {}
    return any(adapter.is_prompt_learning for adapter in adapters.values())


def _parts(sequences: Sequences, token_budget: int) -> list[Tensor]:
    """Micro-batches of the sequences that have a scored token."""
    some = sequences.counts.nonzero().squeeze(1)
    return [some[part] for part in cut(sequences.lengths[some], token_budget)]


def _in_order(values: list[Any], parts: list[Tensor], sequences: Sequences) -> Tensor:
    """Values a scored token of each part, put back into the order of the sequences → (S,)."""
    counts = sequences.counts
    out = torch.zeros(int(counts.sum()), device=sequences.ids.device)
    if parts:
        out[flat_index(counts, torch.cat(parts))] = torch.cat(values)
    return out


class _Readout:
    """One trunk pass over sequences, and what the head makes of it.

    Attributes:
        hidden: (S, D) states that predict the scored tokens; None if the model was called whole and gave logits.
        logits: (S, V) in the other case.
        targets: (S,) the scored tokens.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, sequences: Sequences, *, want_hidden: bool = False
    ) -> None:
        self.model, self.plan = model, plan
        ids_NL, mask_NL, scored_NL = _pad(sequences)
        # The state of the last column predicts nothing, so its token is not fed (a lone column must be).
        width = max(1, ids_NL.shape[1] - 1)
        inputs: dict[str, Any] = {"input_ids": ids_NL[:, :width], "use_cache": False}
        if plan.masked:
            inputs["attention_mask"] = mask_NL[:, :width].long()
        predicts = torch.zeros_like(scored_NL[:, :width])
        predicts[:, : scored_NL.shape[1] - 1] = scored_NL[:, 1:]
        self.targets = sequences.ids[sequences.scored]
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None
        if plan.direct:
            self.hidden = model.get_decoder()(**inputs)[0][predicts]
        else:
            out = model(**inputs, output_hidden_states=want_hidden)
            self.logits = out.logits[:, -width:][
                predicts
            ]  # prompt tuning puts virtual tokens before the first
            self.hidden = out.hidden_states[-1][:, -width:][predicts] if want_hidden else None

    def logps(self, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs (S,) and entropies (S,) of the scored tokens."""
        if self.logits is not None:
            logps, entropies = logits_logps(self.logits.float() / temperature, self.targets, entropy=entropy)
            return logps, entropies if entropy else None
        options: dict[str, Any] = {
            "temperature": temperature, "softcap": self.plan.softcap, "scale": self.plan.scale, "entropy": entropy
        }  # fmt: skip
        head = self.model.get_output_embeddings()
        if _is_plain(head):
            return head_logps(self.hidden, head.weight, head.bias, self.targets, **options)
        return module_logps(head, self.hidden, self.targets, **options)

    def chunks(self) -> list[slice]:
        """Rows whose logits take ``CHUNK_BYTES``."""
        count, vocabulary = len(self.targets), self.model.get_input_embeddings().weight.shape[0]
        rows = max(1, CHUNK_BYTES // (4 * vocabulary))
        return [slice(start, start + rows) for start in range(0, count, rows)]

    def log_softmax(self, at: slice, temperature: float) -> Tensor:
        """Log-probs (k, V) float32 of the whole distribution at some rows."""
        if self.logits is not None:
            return (self.logits[at].float() / temperature).log_softmax(-1)
        transform = Transform(temperature, self.plan.scale, self.plan.softcap)
        return transform(self.model.get_output_embeddings()(self.hidden[at])).log_softmax(-1)


def _score_part(
    model: nn.Module,
    plan: Plan,
    sequences: Sequences,
    temperature: float,
    entropy: bool,
    value_head: nn.Module | None,
) -> Scores:
    """Scores of sequences in one pass."""
    if not len(sequences.ids):
        none = torch.zeros(0, device=sequences.ids.device)
        return Scores(none, none if entropy else None, none if value_head is not None else None)
    readout = _Readout(model, plan, sequences, want_hidden=value_head is not None)
    logps, entropies = readout.logps(temperature, entropy)
    values = value_head(readout.hidden).float() if value_head is not None else None
    return Scores(logps, entropies, values)


def _pad(sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (N, L) right-padded with 0, which positions are real (N, L), and which are scored (N, L)."""
    longest = int(sequences.lengths.max())
    mask = torch.arange(longest, device=sequences.ids.device) < sequences.lengths[:, None]
    ids, scored = torch.zeros_like(mask, dtype=torch.long), torch.zeros_like(mask)
    ids[mask], scored[mask] = sequences.ids, sequences.scored
    return ids, mask, scored


def _is_plain(head: nn.Module) -> bool:
    """A linear layer that nothing has been put around: no adapter, quantisation, hook or replaced forward."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return type(head) is nn.Linear and not any(hooks) and "forward" not in vars(head)
