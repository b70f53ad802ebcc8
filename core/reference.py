"""The reference: the model that the policy is kept close to, or is compared with.

Four kinds give the same numbers: the policy with its adapter off, a frozen adapter on the policy's base, a
frozen copy, or another model. None is ever trained, and using one leaves the policy as it was, whatever
happens meanwhile.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlx.core import adapters
from rlx.core.components import REFERENCE_OFF
from rlx.core.errors import ConfigError
from rlx.core.models import VALUE, Policy, in_mode, resolve_dtype
from rlx.core.pretrained import Source, fill, load_config, load_weights
from rlx.core.probe import trunk_of
from rlx.core.settings import Settings
from rlx.core.sharing import share_or_not
from rlx.core.tokenizer import check_vocabulary

if TYPE_CHECKING:
    from rlx.core.components import Component
    from rlx.plugins.contract import Algorithm

# The options of REFERENCE_OFF with a value at which a reference is asked.
SWITCHED_ON = {"beta": "above 0, say 0.1", "kl_coef": "above 0, say 0.05", "reference_free": "to false"}
# Entries of configurations that change no number.
ORIGINS = {"transformers_version", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
REFERENCE = "reference"  # a frozen adapter of this name on a model from Python is the reference


@dataclass(frozen=True)
class Reference:
    """A frozen model behind a context manager.

    Attributes:
        kind: ``adapter off``, ``adapter``, ``copy`` or ``model``.
        model: the module to call; the policy's own one for the first two kinds.
        adapter: name of the frozen adapter; None for the other kinds.
        moving: name → the reference's parameter and the policy's that it is moved after; empty if it stays.
    """

    kind: str
    model: Any
    adapter: str | None = None
    moving: Mapping[str, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Within it the yielded module is the reference, in eval mode and without gradients."""
        with in_mode(self.model, False), torch.no_grad():
            if self.kind in ("copy", "model"):
                yield self.model
            else:
                with adapters.adapter_switched(self.model, self.adapter):
                    yield self.model

    @torch.no_grad()
    def follow(self, alpha: float) -> None:
        """Move every weight that moves: reference ← alpha · policy + (1 − alpha) · reference.

        Of an adapter A and B are mixed, each by itself, not their product.

        Args:
            alpha: in (0, 1]; 1 copies the policy exactly.

        Source: arXiv:2404.09656, equations 2 (alpha < 1, soft) and 3 (alpha = 1, hard)
        """
        for own, policys in self.moving.values():
            own.lerp_(policys.to(own.dtype), alpha)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep: a frozen adapter, and what moves. Settings tell the rest."""
        return {name: tensor.detach().clone() for name, tensor in self._kept().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ConfigError: if it is for a reference of another kind or shape.
        """
        fill({name: parameter.data for name, parameter in self._kept().items()}, state, where="reference")

    def fingerprint(self) -> str:
        """Sha256 of the reference's weights as they are now, and of its configuration; reads all of them."""
        parts: dict[str, Tensor] = dict(self.model.named_parameters())
        configurations = [self.model.config]
        if self.kind in ("adapter off", "adapter"):
            # Of the adapters on the policy's base only the frozen one is part of the reference.
            for adapter in self.model.peft_config:
                for name in adapters.adapter_parameters(self.model, adapter):
                    parts.pop(name, None)
            parts |= self.frozen_adapter()
            configurations += [] if self.adapter is None else [self.model.peft_config[self.adapter]]
        digest = hashlib.sha256(_computing(configurations).encode())
        for name, tensor in sorted(parts.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _kept(self) -> dict[str, nn.Parameter]:
        """The parameters that a checkpoint keeps."""
        return self.frozen_adapter() | {name: own for name, (own, _) in self.moving.items()}

    def frozen_adapter(self) -> dict[str, nn.Parameter]:
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
        reference = _given(model, policy, device)
    elif settings.reference_model:
        reference = _named(settings, settings.reference_model, policy, device)
    elif settings.reference_adapter:
        reference = _adapter(settings.reference_adapter, policy)
    else:
        reference = _at_the_start(policy, moves=settings.sync_ref_model)
    if reference.kind == "model":  # the others compute as the policy does
        how = share_or_not([trunk_of(reference.model)], settings.share_prefix)
        policy.report.append(f"reference's {how}")
    return replace(reference, moving=_pairs(reference, policy)) if settings.sync_ref_model else reference


def check_reference_options(settings: Settings, algorithm: Algorithm, chosen: Component) -> None:
    """Refuse options for a reference where the algorithm has none; before weights are loaded.

    Args:
        settings: precompute_ref_log_probs and sync_ref_model.
        algorithm: built; whether it needs a reference may depend on its options.
        chosen: the same as the configuration has it.

    Raises:
        ConfigError: one of the two is set in vain.
    """
    for option, needed in (
        ("sync_ref_model", {"reference", "kl"}),
        ("precompute_ref_log_probs", {"reference"}),
    ):
        if not getattr(settings, option) or algorithm.needs & needed:
            continue
        off = [name for name, value in REFERENCE_OFF.items() if chosen.options.get(name) == value]
        raise ConfigError(
            f"{option} is for a reference, and {chosen.name} has none"
            + (" with these options" if off else ""),
            code="E-CONFIG-CONFLICT",
            got=", ".join(f"{name}: {chosen.options[name]}" for name in off),
            hint=f"leave {option} out" + "".join(f", or set {name} {SWITCHED_ON[name]}" for name in off),
        )


def _computing(configurations: Iterable[Any]) -> str:
    """What configurations say of how weights are computed with, as text; not where they come from."""
    kept = [
        {name: value for name, value in one.to_dict().items() if name not in ORIGINS and name[0] != "_"}
        for one in configurations
    ]
    # Sets, of target modules say, have no order of their own.
    return json.dumps(kept, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))


def _pairs(reference: Reference, policy: Policy) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Each weight that is trained, and the reference's of the same name that is to follow it.

    Raises:
        ConfigError: the reference has other weights than the policy.
    """
    own = reference.frozen_adapter()
    if reference.adapter is None:
        own = dict(reference.model.named_parameters())
        if policy.adapter is not None:  # a copy of base and adapter
            own = {adapters.lasting_name(name, policy.adapter): p for name, p in own.items()}
    theirs = {name: p for name, p in policy.trainable().items() if not name.startswith(VALUE)}
    for name, parameter in theirs.items():
        if name not in own or own[name].shape != parameter.shape:
            raise ConfigError(
                "sync_ref_model mixes the policy into the reference, and they have other weights",
                code="E-REFERENCE",
                where=name,
                got=f"shape {tuple(own[name].shape)}" if name in own else "no such weight in the reference",
                expected=f"shape {tuple(parameter.shape)}",
                hint="leave reference_model and reference_adapter out: it is then the policy at its start",
            )
    return {name: (own[name], parameter) for name, parameter in theirs.items()}


def _at_the_start(policy: Policy, *, moves: bool) -> Reference:
    """The policy as it is now, by the cheapest kind that can then stay, or move, apart from the policy."""
    model = policy.model
    if policy.adapter is None:
        return Reference("copy", _frozen(copy.deepcopy(model)))
    if REFERENCE in model.peft_config and policy.adapter != REFERENCE:
        return Reference("adapter", model, REFERENCE)
    adapter = {id(parameter) for parameter in adapters.adapter_parameters(model, policy.adapter).values()}
    if any(id(p) not in adapter for name, p in policy.trainable().items() if not name.startswith(VALUE)):
        return Reference("copy", _frozen(copy.deepcopy(model)))  # part of the base is trained along
    if adapters.is_identity(model, policy.adapter) and not moves:
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
