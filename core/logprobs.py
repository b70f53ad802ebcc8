"""Log-probs, entropies and values of scored tokens, from any transformers causal language model.

The trunk (the decoder without its output head) runs over one row in which a shared prompt stands once, or
over right-padded sequences (``rlx.core.states``); its hidden states go through the head only at positions
that predict a scored token, and never as one [batch, time, vocabulary] tensor.
Leaves out: generation, and which model is the reference (the caller passes it).

Legend: N sequences, T tokens, S scored tokens, L tokens of the longest sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from rlx.core.batch import Scores, Sequences, flat_index
from rlx.core.lm_head import (
    EXTRAS,
    Transform,
    chunk_rows,
    head_logps,
    is_plain_linear,
    logits_logps,
    module_logps,
)
from rlx.core.probe import CausalLM, plan_for
from rlx.core.states import micro_batches, padded, states

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.gradients import GradientBuffers


def score(
    model: nn.Module,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    extras: Collection[str] = (),
    logps: bool = True,
    value_head: nn.Module | None = None,
    token_budget: int = 4096,
    accelerator: Accelerator | None = None,
    buffers: GradientBuffers | None = None,
) -> Scores:
    """Log-prob of every scored token under a model.

    With gradients enabled this is one differentiable pass over all sequences: cut them before. Without, they
    are cut here by token budget, and those without a scored token are left out. Train or eval mode, and so
    dropout, is the caller's choice.

    Args:
        model: a transformers causal language model or a PEFT model around one. A data-parallel wrapper is
            taken off, and its forward, which prepares the exchange of gradients, does not run: gradients stay
            those of this process, and the caller adds them up.
        sequences: on any device; N = 0 and sequences without scored tokens are legal.
        temperature: logits are divided by it, > 0.
        entropy: also give the entropy of the distribution that each token is drawn from.
        extras: also give ``correct`` or ``square`` (see ``Scores``), which have no gradient.
        logps: False for the values alone, without a pass through the output head; ``Scores.logps`` is empty.
        value_head: hidden states (S, D) → values (S,), applied where each scored token is predicted.
        token_budget: tokens of a forward pass, when no gradient is wanted.
        accelerator: its autocast is entered; None for none.
        buffers: may hold the head's gradient, to be added to in place.

    Returns:
        (S,) float32 each, in the order of the scored tokens, on the model's device.

    Raises:
        ConfigError: for an encoder-decoder, or a model whose logits change with tokens that come later.
    """
    bare: CausalLM = extract_model_from_parallel(model)
    sequences = sequences.to(bare.get_input_embeddings().weight.device)
    chosen = tuple(x for x in EXTRAS if x in extras)
    wanted = _Wanted(temperature, logps, entropy, chosen, value_head, buffers)
    with accelerator.autocast() if accelerator is not None else nullcontext():
        if torch.is_grad_enabled() and len(sequences):
            return Scores(**wanted.of(bare, sequences))
        parts = _parts((bare,), sequences, token_budget)
        found = [wanted.of(bare, sequences.take(part)) for part in parts]
    return Scores(
        **{name: _in_order([one[name] for one in found], parts, sequences) for name in wanted.names},
        **{} if logps else {"logps": torch.empty(0, device=sequences.ids.device)},
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
        reference_context: gives a context in which the yielded model is the reference; it may be policy_model
            with its adapter off.
        sequences: on any device.
        temperature: both models' logits are divided by it.
        token_budget: tokens of a forward pass.
        accelerator: its autocast is entered; None for none.

    Returns:
        (S,) float32, nats, on the model's device; not negative beyond rounding.
    """
    policy: CausalLM = extract_model_from_parallel(policy_model)
    sequences = sequences.to(policy.get_input_embeddings().weight.device)
    with reference_context() as model:
        both = policy, extract_model_from_parallel(model)
        parts, found = _parts(both, sequences, token_budget), []
    with accelerator.autocast() if accelerator is not None else nullcontext():
        for part in parts:
            taken = sequences.take(part)
            here = _Readout(policy, taken)
            with reference_context() as model:
                there = _Readout(extract_model_from_parallel(model), taken)
            for at in here.chunks():
                p = here.log_softmax(at, temperature)
                with reference_context():
                    q = there.log_softmax(at, temperature)
                found.append(p.exp().mul_(p.sub_(q)).sum(-1))
    return _in_order(found, parts, sequences)


def trunk_for(model: nn.Module, sequences: Sequences) -> nn.Module | None:
    """The part of a model that gives its hidden states; None if it is called as a whole.

    Args:
        model: as in ``score``.
        sequences: at least one token, on the model's device.
    """
    return plan_for(extract_model_from_parallel(model), sequences).trunk


def _parts(models: Iterable[CausalLM], sequences: Sequences, token_budget: int) -> list[Tensor]:
    """Micro-batches of the sequences that have a scored token."""
    some = sequences.counts.nonzero().squeeze(1)
    if not len(some):
        return []
    trunks = [trunk_for(model, sequences) for model in models]
    return [some[part] for part in micro_batches(trunks, sequences.take(some), token_budget)]


def _in_order(values: list[Any], parts: list[Tensor], sequences: Sequences) -> Tensor:
    """Values of the scored tokens of all parts, part after part → (S,) in the order of the sequences."""
    counts = sequences.counts
    if not parts:
        return torch.zeros(int(counts.sum()), device=counts.device)
    joined = torch.cat(values)
    out = torch.empty_like(joined)
    out[flat_index(counts, torch.cat(parts))] = joined
    return out


@dataclass(frozen=True)
class _Wanted:
    """What ``score`` was asked for."""

    temperature: float
    logps: bool
    entropy: bool
    extras: tuple[str, ...]
    value_head: nn.Module | None
    buffers: GradientBuffers | None

    @property
    def names(self) -> list[str]:
        """The fields of ``Scores`` that are filled."""
        asked = {"logps": self.logps, "entropy": self.entropy, "values": self.value_head is not None}
        return [name for name, wanted in asked.items() if wanted] + list(self.extras)

    def of(self, model: CausalLM, sequences: Sequences) -> dict[str, Tensor]:
        """Each of ``names`` for sequences, at least one, in one pass."""
        readout = _Readout(model, sequences, want_hidden=self.value_head is not None)
        found: dict[str, Tensor] = {}
        if self.logps:
            logps, entropy, *more = readout.logps(self)
            found = {"logps": logps, **dict(zip(self.extras, more, strict=True))}
            if self.entropy:
                found["entropy"] = entropy
        else:
            found["logps"] = torch.empty(0, device=sequences.ids.device)
        if self.value_head is not None:
            found["values"] = self.value_head(readout.hidden).float()
        return found


class _Readout:
    """One trunk pass over sequences, and what the head makes of it.

    Attributes:
        hidden: (S, D) states that predict the scored tokens; empty if plan and caller do without.
        logits: (S, V) from the model as a whole; empty if the plan does without.
        targets: (S,) the scored tokens.
    """

    def __init__(self, model: CausalLM, sequences: Sequences, *, want_hidden: bool = False) -> None:
        self.model, self.plan = model, plan_for(model, sequences)
        self.targets = sequences.ids[sequences.scored]
        places = sequences.scored.nonzero().squeeze(1) - 1  # a token is predicted by the state before it
        trunk, masked = self.plan.trunk, self.plan.masked
        self.hidden = self.logits = torch.empty(0)
        if trunk is not None:
            self.hidden = states(trunk, sequences, places, masked=masked)
        else:
            inputs, rows, columns = padded(sequences, places, masked=masked)
            out = model(**inputs, output_hidden_states=want_hidden)
            columns = columns - inputs["input_ids"].shape[1]  # from the right: virtual tokens stand before
            self.logits = out.logits[rows, columns]
            if want_hidden:
                self.hidden = out.hidden_states[-1][rows, columns]

    def logps(self, wanted: _Wanted) -> tuple[Any, ...]:
        """Log-probs (S,) of the scored tokens, entropies (S,) or None, and extras (S,)."""
        plan, targets, temperature = self.plan, self.targets, wanted.temperature
        options: dict[str, Any] = {"entropy": wanted.entropy, "extras": wanted.extras}
        if not plan.direct:
            return logits_logps(Transform(temperature)(self.logits), targets, **options)
        head = self.model.get_output_embeddings()
        if is_plain_linear(head):
            into = None if wanted.buffers is None else wanted.buffers.of(head.weight)
            run = partial(head_logps, self.hidden, head.weight, head.bias, targets, into=into)
        else:
            run = partial(module_logps, head, self.hidden, targets, self.vocabulary)
        return run(temperature=temperature, softcap=plan.softcap, scale=plan.scale, **options)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    def chunks(self) -> list[slice]:
        """Rows whose logits are computed together."""
        rows = chunk_rows(self.vocabulary)
        return [slice(start, start + rows) for start in range(0, len(self.targets), rows)]

    def log_softmax(self, at: slice, temperature: float) -> Tensor:
        """Log-probs (k, V) float32 of the whole distribution at some rows."""
        if not self.plan.direct:
            return Transform(temperature)(self.logits[at]).log_softmax(-1)
        transform = Transform(temperature, self.plan.scale, self.plan.softcap)
        logits: Tensor = self.model.get_output_embeddings()(self.hidden[at])
        return transform(logits).log_softmax(-1)
