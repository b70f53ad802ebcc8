"""The policy: loaded, checked and made ready to train; saved as a plain Hugging Face folder.

Nothing here samples, scores or trains. A model object passed from Python is taken as it is, apart from
dropout, gradient checkpointing and adapters, which the settings ask for by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlx.core import adapters, recompute
from rlx.core.classify import parts_of
from rlx.core.errors import ConfigError, DivergedError
from rlx.core.model_loading import load_causal, load_classifier, savable
from rlx.core.precision import DTYPES, upcast_norms
from rlx.core.pretrained import Source, quiet, restore_weights
from rlx.core.probe import trunk_of
from rlx.core.settings import Settings
from rlx.core.sharing import share_or_not
from rlx.core.streams import rng_scope
from rlx.core.tokenizer import check_vocabulary, load_tokenizer, ready_tokenizer, stop_token_ids
from rlx.core.values import (
    VALUE_HEAD_FILE,
    ValueHead,
    ValueModel,
    load_head_beside,
    load_value_head,
    save_value_head,
)

__all__ = ["Policy", "load_policy", "load_tokenizer", "ready_tokenizer", "remove_dropout", "resolve_dtype"]

VALUE_MODEL_FOLDER = "value_model"
VALUE = "value."  # prefix of the value function's parameters in Policy.trainable


class Policy:
    """The model that is trained, its tokenizer and its value function.

    Attributes:
        model: a transformers causal language model, or peft's wrapper around one.
        adapter: name of the adapter that is trained, on a base that may carry others; None without adapters.
        tokenizer: with a pad token.
        value_head: a head on the policy's backbone; None without a value function, or with a separate one.
        value_model: a separate value model; None otherwise.
        stop_token_ids: end-of-sequence tokens of the tokenizer and of the generation config, sorted.
        report: what was decided while loading, a line each.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        value_head: ValueHead | None = None,
        value_model: ValueModel | None = None,
        report: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.adapter: str | None = model.active_adapter if adapters.is_adapted(model) else None
        self.tokenizer = tokenizer
        self.value_head = value_head
        self.value_model = value_model
        self.stop_token_ids = stop_token_ids(self.base, tokenizer)
        self.report = list(report)
        # Kept, because on a shared base anybody's switch of adapters changes what requires gradients.
        self._trained = {} if self.adapter is None else adapters.trained_parameters(model, self.adapter)
        self._declared: dict[str, Any] = {}  # config fields that were changed for training, as they were

    @property
    def base(self) -> Any:
        """The transformers model, without peft's wrapper."""
        return self.model if self.adapter is None else self.model.get_base_model()

    @property
    def hidden_size(self) -> int:
        """D, numbers of a hidden state."""
        return int(self.base.config.get_text_config(decoder=True).hidden_size)

    @property
    def value(self) -> nn.Module | None:
        """The value function's module, whichever it is."""
        return self.value_head if self.value_head is not None else self.value_model

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by a lasting name; the value function's begin with ``value.``."""
        own = dict(self._trained)
        if self.adapter is None:
            own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.value is not None:
            own |= {VALUE + name: p for name, p in self.value.named_parameters() if p.requires_grad}
        return own

    @contextmanager
    def active(self, *, training: bool = False) -> Iterator[Any]:
        """Within it the model computes as this policy; afterwards adapters and modes are as they were before.

        Args:
            training: with dropout and gradient checkpointing, where they are asked for.

        Yields:
            The model.
        """
        with ExitStack() as stack:
            if self.adapter is not None:
                trained = self._trained.values()
                stack.enter_context(adapters.adapter_switched(self.model, self.adapter, trained))
            stack.enter_context(in_mode(self.model, training))
            if self.value_model is not None:
                stack.enter_context(in_mode(self.value_model, training))
            yield self.model

    def without_dropout(self) -> None:
        """Set every dropout probability to zero; the saved config keeps what it declared."""
        remove_dropout(self.model, but=self._others())
        if self.value_model is not None:
            remove_dropout(self.value_model)
        config = self.base.config.get_text_config(decoder=True)
        for name, value in list(vars(config).items()):
            if _is_dropout(name, value):
                self._declare(config, name, 0.0)

    @property
    def trunks(self) -> list[Any]:
        """The transformers models with activations: the policy's, and that of a value model of its own."""
        return [self.base] if self.value_model is None else [self.base, self.value_model.backbone]

    def with_gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute activations in the backward pass, or keep them again.

        Raises:
            ConfigError: a model does not support it.
        """
        recompute.switch(self.trunks, on=on)
        if on and self.adapter is not None:
            # Frozen embeddings give inputs without gradient; the first checkpointed layer needs one that has.
            self.base.disable_input_require_grads()  # transformers may have seen to it: once is enough
            self.base.enable_input_require_grads()
        config = self.base.config.get_text_config(decoder=True)
        if on:
            self._declare(config, "use_cache", False)
        elif "use_cache" in self._declared:
            config.use_cache = self._declared.pop("use_cache")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``from_pretrained`` reads: weights as they train, tokenizer, value function.

        Raises:
            DivergedError: a trained weight is NaN or infinite; nothing was written.
        """
        self.check_finite()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.base.config.get_text_config(decoder=True)
        changed = {name: getattr(config, name) for name in self._declared}
        for name, value in self._declared.items():
            setattr(config, name, value)
        try:
            with savable(self.base):
                if self.adapter is not None:
                    adapters.save_adapter(self.model, folder, name=self.adapter)
                    if self.base.can_generate():
                        self.base.generation_config.save_pretrained(str(folder))
                else:
                    with quiet():
                        self.model.save_pretrained(str(folder))
        finally:
            for name, value in changed.items():
                setattr(config, name, value)
        self.tokenizer.save_pretrained(str(folder))
        if self.value_head is not None:
            save_value_head(self.value_head, folder)
        if self.value_model is not None:
            self.value_model.save_pretrained(folder / VALUE_MODEL_FOLDER)

    def check_finite(self) -> None:
        """Refuse to go on with trained weights that are NaN or infinite.

        Raises:
            DivergedError: with the first such parameter's name.
        """
        for name, parameter in self.trainable().items():
            if not bool(torch.isfinite(parameter).all()):
                raise DivergedError(
                    f"the trained weight {name!r} is not finite; it is not saved",
                    code="E-NONFINITE-WEIGHT",
                    hint="resume from an older checkpoint, with a lower learning_rate",
                )

    def load_trainable(self, folder: str | Path) -> None:
        """Take back, bit for bit, every trained weight that ``save_pretrained`` wrote.

        Raises:
            ConfigError: a weight is missing in the folder or has another shape.
        """
        folder = Path(folder)
        if self.adapter is not None:
            adapters.restore_adapter(self.model, folder, name=self.adapter)
        else:
            restore_weights(self.model, folder)
        if self.value_head is not None:
            load_value_head(self.value_head, folder / VALUE_HEAD_FILE)
        if self.value_model is not None:
            self.value_model.restore(folder / VALUE_MODEL_FOLDER)

    def _others(self) -> set[str]:
        """Names of the other adapters on the base."""
        return set() if self.adapter is None else set(self.model.peft_config) - {self.adapter}

    def _declare(self, config: Any, name: str, value: Any) -> None:
        self._declared.setdefault(name, getattr(config, name))
        setattr(config, name, value)


def load_policy(
    settings: Settings,
    accelerator: Any = None,
    tokenizer: Any = None,
    model: Any = None,
    *,
    values: bool = False,
    value_model: Any = None,
    classifier: bool = False,
) -> Policy:
    """The policy, ready to train on the accelerator's device.

    Args:
        settings: the options of the panels Model and LoRA.
        accelerator: an ``accelerate.Accelerator``; None means CPU.
        tokenizer: an object to use instead of the one that the settings name.
        model: a model object to use instead of the one that the settings name, in its own dtype.
        values: whether the algorithm needs a value function.
        value_model: a model object to use instead of the one that the settings name.
        classifier: a sequence classifier with one label in the place of a language model; where the weights
            have no score head, it is drawn from the seed.

    Raises:
        ConfigError: the model, tokenizer or adapter cannot be used as asked.
        DivergedError: a weight is not finite.
    """
    report: list[str] = []
    device = torch.device("cpu") if accelerator is None else accelerator.device
    dtype = resolve_dtype(settings, device)
    tokenizer = _tokenizer_for(settings, tokenizer, model, report)
    if model is None:
        model = load_classifier(settings, dtype, report) if classifier else load_causal(settings, dtype)
    check_vocabulary(model, tokenizer)
    model.to(device)
    if classifier:
        parts_of(model)  # or an error that says what is missing
        model.config.pad_token_id = tokenizer.pad_token_id  # by which transformers finds the last token
    policy = Policy(_adapted(settings, model, classifier), tokenizer, report=report)
    if values:
        _add_values(policy, settings, value_model, device, dtype)
    if settings.disable_dropout:
        policy.without_dropout()
    if policy.adapter is not None and settings.lora_r and settings.lora_dropout:
        adapters.set_dropout(policy.model, settings.lora_dropout, name=policy.adapter)
    if settings.upcast_norms:
        upcast_norms(policy.model)
    if settings.gradient_checkpointing is True:
        policy.with_gradient_checkpointing()
    trunks = [parts_of(policy.model)[0] if classifier else trunk_of(policy.model)]
    if policy.value_model is not None:
        trunks.append(policy.value_model.backbone)
    policy.report.append(share_or_not(trunks, settings.share_prefix))
    if not any(parameter.requires_grad for parameter in policy.model.parameters()):
        raise ConfigError(
            "the model has 0 trainable parameters",
            code="E-MODEL-FROZEN",
            hint="set requires_grad on some weights, or train an adapter with --lora-r 16",
        )
    return policy


def resolve_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The type that ``dtype`` means on a device.

    Raises:
        ConfigError: float16 on a CPU, for weights or sampling.
    """
    if device.type == "cpu":
        half = [
            option
            for option, value in (("dtype", settings.dtype), ("generation_dtype", settings.generation_dtype))
            if value == "float16"
        ]
        if half:
            raise ConfigError(
                f"{half[0]}: float16 does not train on a CPU",
                code="E-DTYPE",
                got=f"device {device}",
                expected="float32 or bfloat16",
                hint=f"--{half[0].replace('_', '-')} bfloat16",
            )
    if settings.dtype == "auto":
        # Weights that are trained stay in float32: in bfloat16 updates of usual learning rates round away.
        frozen = settings.lora_r > 0 or settings.adapter is not None
        return torch.bfloat16 if device.type == "cuda" and frozen else torch.float32
    return DTYPES[settings.dtype]


def _tokenizer_for(settings: Settings, tokenizer: Any, model: Any, report: list[str]) -> Any:
    if tokenizer is not None:
        return ready_tokenizer(tokenizer, can_stop=True, report=report)
    if model is None or settings.tokenizer:
        return load_tokenizer(settings, report=report)
    if not model.name_or_path:
        raise ConfigError(
            "a model object without a name came without a tokenizer",
            code="E-TOKENIZER-MISSING",
            hint="pass tokenizer= beside model=",
        )
    return load_tokenizer(replace(settings, tokenizer=model.name_or_path), report=report)


def _adapted(settings: Settings, model: Any, classifier: bool) -> Any:
    if settings.adapter:
        return adapters.load_adapter(model, settings.adapter, classifier=classifier)
    if settings.lora_r:
        with rng_scope(settings.seed, "adapter"):
            return adapters.add_lora(
                model,
                rank=settings.lora_r,
                alpha=settings.lora_alpha,
                target_modules=settings.lora_target_modules,
                classifier=classifier,
            )
    if adapters.wrapper_of(model) not in (None, model):
        raise ConfigError(
            "the model object carries adapters of an earlier run, and this run is to train all weights",
            code="E-ADAPTER",
            hint="set lora_r or adapter to train a further adapter, or pass a model object of its own",
        )
    return model


def _add_values(
    policy: Policy, settings: Settings, given: Any, device: torch.device, dtype: torch.dtype
) -> None:
    if given is not None:
        policy.value_model = ValueModel.around(given).to(device)
    elif settings.value_model is not None:
        source = Source.of(
            settings.value_model, role="value_model", trust_remote_code=settings.trust_remote_code
        )
        policy.value_model = ValueModel.load(source, dtype=dtype, report=policy.report).to(device)
    else:
        head = ValueHead(policy.hidden_size)
        folders = [Path(name) for name in (settings.adapter, policy.base.name_or_path) if name]
        policy.report.append(f"value head: from {load_head_beside(head, folders)}")
        policy.value_head = head.to(device)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while; afterwards each module's mode is what it was."""
    changed = [module for module in model.modules() if module.training != training]
    try:
        for module in changed:
            module.training = training
        yield
    finally:
        for module in changed:
            module.training = not training


def remove_dropout(model: nn.Module, *, but: Collection[str] = ()) -> None:
    """Set the probability of every dropout layer, and of attention's functional dropout, to zero.

    Args:
        model: changed in place.
        but: adapters whose dropout stays.
    """
    for path, module in model.named_modules():
        if not set(but).isdisjoint(path.split(".")):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Attention layers keep the probability of their functional dropout as a plain number.
        for name, value in list(vars(module).items()):
            if _is_dropout(name, value):
                setattr(module, name, 0.0)


def _is_dropout(name: str, value: object) -> bool:
    return isinstance(value, float) and value > 0 and ("dropout" in name or name.endswith("pdrop"))
