"""The reference: the model that the policy is kept close to, or is compared with.

Four kinds give the same numbers: the policy with its adapter off, a frozen adapter on the policy's base, a
frozen copy, or another model. None is ever trained, and using one leaves the policy as it was, whatever
happens meanwhile.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlx.core import adapters
from rlx.core.errors import ConfigError
from rlx.core.models import VALUE, Policy, in_mode, resolve_dtype
from rlx.core.pretrained import Source, fill, load_config, load_weights
from rlx.core.settings import Settings
from rlx.core.tokenizer import check_vocabulary

REFERENCE = "reference"  # a frozen adapter of this name on a model from Python is the reference


@dataclass(frozen=True)
class Reference:
    """A frozen model behind a context manager.

    Attributes:
        kind: ``adapter off``, ``adapter``, ``copy`` or ``model``.
        model: the module to call; the policy's own one for the first two kinds.
        adapter: name of the frozen adapter; None for the other kinds.
    """

    kind: str
    model: Any
    adapter: str | None = None

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Within it the yielded module is the reference, in eval mode and without gradients."""
        with in_mode(self.model, False), torch.no_grad():
            if self.kind in ("copy", "model"):
                yield self.model
            else:
                with adapters.adapter_switched(self.model, self.adapter):
                    yield self.model

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: the frozen adapter. The other kinds follow from the settings."""
        return {name: tensor.detach().clone() for name, tensor in self._frozen_adapter().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ConfigError: if it is for a reference of another kind or shape.
        """
        own = {name: parameter.data for name, parameter in self._frozen_adapter().items()}
        fill(own, state, where="reference")

    def fingerprint(self) -> str:
        """Sha256 of the reference's weights as they are now; reads all of them."""
        parts: dict[str, Tensor] = dict(self.model.named_parameters())
        if self.kind in ("adapter off", "adapter"):
            # Of the adapters on the policy's base only the frozen one is part of the reference.
            for adapter in self.model.peft_config:
                for name in adapters.adapter_parameters(self.model, adapter):
                    parts.pop(name, None)
            parts |= self._frozen_adapter()
        digest = hashlib.sha256()
        for name, tensor in sorted(parts.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _frozen_adapter(self) -> dict[str, nn.Parameter]:
        """The frozen adapter's parameters under names that last; none for the other kinds."""
        if self.adapter is None:
            return {}
        own = adapters.adapter_parameters(self.model, self.adapter)
        return {adapters.lasting_name(name, self.adapter): parameter for name, parameter in own.items()}


def build_reference(
    settings: Settings, policy: Policy, accelerator: Any = None, model: Any = None
) -> Reference:
    """The reference that the settings name; without one, the policy as it is at this moment.

    Args:
        settings: reference_model, reference_adapter and how the policy was loaded.
        policy: before its first update. A frozen adapter may be added to it; what it computes stays.
        accelerator: gives the device; None means CPU.
        model: a model object to use as it is; it gets frozen.

    Raises:
        ConfigError: it cannot be loaded, has another vocabulary, or is the policy itself.
    """
    device = torch.device("cpu") if accelerator is None else accelerator.device
    if model is not None:
        return _given(model, policy, device)
    if settings.reference_model:
        return _named(settings, settings.reference_model, policy, device)
    if settings.reference_adapter:
        return _adapter(settings.reference_adapter, policy)
    return _at_the_start(policy)


def _at_the_start(policy: Policy) -> Reference:
    """The policy as it is now, by the cheapest kind that stays as it is while the policy is trained."""
    model = policy.model
    if policy.adapter is None:
        return Reference("copy", _frozen(copy.deepcopy(model)))
    if REFERENCE in model.peft_config and policy.adapter != REFERENCE:
        return Reference("adapter", model, REFERENCE)
    adapter = {id(parameter) for parameter in adapters.adapter_parameters(model, policy.adapter).values()}
    if any(id(p) not in adapter for name, p in policy.trainable().items() if not name.startswith(VALUE)):
        return Reference("copy", _frozen(copy.deepcopy(model)))  # part of the base is trained along
    if adapters.is_identity(model, policy.adapter):
        return Reference("adapter off", model)
    name = adapters.free_name(model, f"{policy.adapter}-reference")
    adapters.snapshot(model, name, of=policy.adapter)
    return Reference("adapter", model, name)


def _given(model: Any, policy: Policy, device: torch.device) -> Reference:
    theirs = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    shared = [name for name, p in policy.trainable().items() if p.numel() and p.data_ptr() in theirs]
    if shared:
        raise ConfigError(
            "the reference shares weights with the policy, so it would be trained along",
            code="E-REFERENCE",
            got=f"{len(shared)} shared weights, first {shared[0]!r}",
            hint="leave the reference out (a frozen copy is made), or pass copy.deepcopy(model)",
        )
    check_vocabulary(model, policy.tokenizer)
    return Reference("model", _frozen(model.to(device)))


def _named(settings: Settings, name: str, policy: Policy, device: torch.device) -> Reference:
    from transformers import AutoModelForCausalLM

    source = Source.of(name, role="reference_model", trust_remote_code=settings.trust_remote_code)
    arguments = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    model = load_weights(
        source, AutoModelForCausalLM, load_config(source), dtype=resolve_dtype(settings, device), **arguments
    )
    check_vocabulary(model, policy.tokenizer)
    return Reference("model", _frozen(model.to(device)))


def _adapter(folder: str, policy: Policy) -> Reference:
    if policy.adapter is None:
        raise ConfigError(
            "reference_adapter needs a policy that is trained with LoRA",
            code="E-REFERENCE",
            hint="add --lora-r or --adapter, or name a whole model with --reference-model",
        )
    name = adapters.free_name(policy.model, f"{policy.adapter}-reference")
    adapters.load_adapter(policy.model, Path(folder), name=name, trainable=False)
    adapters.set_dropout(policy.model, 0.0, name=name)
    return Reference("adapter", policy.model, name)


def _frozen(model: Any) -> Any:
    """The model, never to be trained."""
    model.requires_grad_(False)
    return model.eval()  # also ends gradient checkpointing, which transformers does in training mode only
