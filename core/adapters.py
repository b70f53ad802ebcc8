"""LoRA adapters through peft: start a new one, go on with one from a folder, switch between those of a base.

One base may carry the adapters of several runs. Each has a name of its own there, and only one is in use at a
time; which one that is changes no weight, and not which weights require gradients. Adapter weights are in
float32 where the base is in half precision: they are what the optimizer moves.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlx.core.adapter_files import ADAPTER_FILE, check_adapter, linear_names
from rlx.core.errors import ConfigError
from rlx.core.pretrained import check_finite, check_safetensors_file, fill
from rlx.core.text import safe_text

TRAINED = "default"  # peft's name for the adapter that is saved at a folder's root
_WRAPPER = "_rlx_wrapper"


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is peft's wrapper around a base."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def wrapper_of(model: nn.Module) -> Any | None:
    """The peft model around a model: itself if it is one, or the one that was put around it here, or None."""
    if is_adapted(model):
        return model
    held = vars(model).get(_WRAPPER)
    return held[0] if held else None


def free_name(model: nn.Module, stem: str = TRAINED) -> str:
    """A name that no adapter on a model has: the stem, then stem-2 and so on."""
    wrapper = wrapper_of(model)
    taken = {} if wrapper is None else wrapper.peft_config
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    classifier: bool = False,
) -> Any:
    """The model with a new LoRA adapter in use, named ``default`` or the next free name; the base is frozen.

    Its B matrices are zero, so the model computes what the bare base computes. Adapters that the base carries
    already stay as they are.

    Args:
        model: a transformers causal language model, bare or with adapters.
        rank: r.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: on the adapter's input.
        target_modules: ends of module names, or ``all-linear`` alone.
        classifier: the model is a sequence classifier; its score head is trained and saved with the adapter.

    Raises:
        ConfigError: no module of these names, or the base carries adapters of another kind.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_targets(target_modules),
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
    )
    wrapper, name = wrapper_of(model), free_name(model)
    try:
        with _hushed():
            if wrapper is None:
                return _remembered(get_peft_model(model, config, adapter_name=name))
            with _kept(wrapper):
                wrapper.add_adapter(name, config)
                wrapper.set_adapter(name)
            return wrapper
    except ValueError as error:
        raise ConfigError(
            "no LoRA adapter fits this model",
            code="E-ADAPTER",
            where="lora_target_modules",
            got=safe_text(error, 200),
            expected=f"some of: {', '.join(linear_names(model)[:10])}",
        ) from error


def _targets(names: Sequence[str]) -> str | list[str]:
    """Target modules as peft wants them."""
    if "all-linear" not in names:
        return list(names)
    if len(names) > 1:
        raise ConfigError(
            "lora_target_modules names modules beside all-linear",
            code="E-ADAPTER",
            got=", ".join(names),
            expected="all-linear alone, or module names",
        )
    return "all-linear"


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    trainable: bool = True,
    classifier: bool = False,
) -> Any:
    """The model with an adapter from a folder, after checking that it fits.

    Args:
        model: the base, bare or with adapters of other names.
        folder: what peft's ``save_pretrained`` wrote.
        name: the adapter's name from now on; None for ``default`` or the next free name.
        trainable: whether it is put to use and trained on; otherwise it is frozen, and the adapter in use
            stays in use.
        classifier: the model is a sequence classifier; the adapter brings its score head.

    Raises:
        ConfigError: not an adapter, for another task, or for a base of other shapes.
    """
    from peft import PeftModel

    folder, wrapper = Path(folder), wrapper_of(model)
    name = name or free_name(model)
    described = check_adapter(model if wrapper is None else wrapper, folder, classifier=classifier)
    try:
        with _hushed():
            if wrapper is None:
                wrapper = _remembered(
                    PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=trainable)
                )
            else:
                with _kept(wrapper):
                    wrapper.load_adapter(str(folder), adapter_name=name, is_trainable=trainable)
                    if trainable:
                        wrapper.set_adapter(name)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            "the adapter does not fit the model",
            code="E-ADAPTER",
            where=str(folder),
            got=safe_text(error, 300),
            expected=f"an adapter of {described}",
        ) from error
    _check_complete(wrapper, name, folder)
    return wrapper


def _remembered(wrapper: Any) -> Any:
    """The wrapper, which its base leads to from now on."""
    # In a tuple, so that torch does not take the wrapper for a part of the base.
    vars(wrapper.get_base_model())[_WRAPPER] = (wrapper,)
    return wrapper


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Parameters that are there already require gradients afterwards as before, and modules keep their mode.

    peft changes the former with every switch, and the latter when it loads a frozen adapter.
    """
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def _check_complete(model: nn.Module, name: str, folder: Path) -> None:
    """Every weight of a loaded adapter came from its file, and is finite."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    with safe_open(str(folder / ADAPTER_FILE), framework="pt") as tensors:
        missing = sorted(set(own) - set(tensors.keys()))
    if missing:
        raise ConfigError(
            "the adapter is incomplete",
            code="E-ADAPTER",
            where=str(folder / ADAPTER_FILE),
            got=f"{len(missing)} weights are missing, first {safe_text(missing[0], 120)}",
        )
    check_finite(own, str(folder / ADAPTER_FILE))


@contextmanager
def _hushed() -> Iterator[None]:
    # peft asks transformers for renamed properties, and warns of missing weights, which are an error here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters that belong to the adapter of this name, by their names in the model."""
    return {
        key: parameter
        for key, parameter in model.named_parameters()
        if f".{name}." in key or key.endswith(f".{name}")
    }


def lasting_name(key: str, adapter: str) -> str:
    """A parameter's name in the model, the adapter being called ``default`` whatever its name there."""
    return re.sub(rf"\.{re.escape(adapter)}(?=\.|$)", f".{TRAINED}", key)


def trained_parameters(model: Any, name: str) -> dict[str, nn.Parameter]:
    """What is trained with an adapter, by lasting names: what requires gradients, but for other adapters."""
    others = [adapter_parameters(model, other) for other in model.peft_config if other != name]
    return {
        lasting_name(key, name): parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and not any(key in other for other in others)
    }


def is_identity(model: Any, name: str) -> bool:
    """Whether an adapter changes nothing yet: plain LoRA with every B matrix zero."""
    config = model.peft_config[name]
    if config.peft_type.value != "LORA" or config.use_dora or config.modules_to_save:
        return False
    outs = [
        tensor
        for key, tensor in adapter_parameters(model, name).items()
        if ".lora_B." in key or ".lora_embedding_B." in key
    ]
    return bool(outs) and not any(bool(tensor.any()) for tensor in outs)


@contextmanager
def adapter_switched(model: Any, name: str | None, trained: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Another adapter, or none, for a while; whatever happens inside, all is as before afterwards.

    Which weights require gradients stays the same inside as well, but for those that are to be trained. With
    the adapter that is in use anyway this costs nothing.

    Args:
        model: a PeftModel.
        name: the adapter to use; None for the bare base.
        trained: parameters that require gradients inside, whoever switched them off.
    """
    active = model.active_adapter
    if name == active and all(parameter.requires_grad for parameter in trained):
        yield
        return
    with _kept(model):
        if name is None:
            with model.disable_adapter():
                yield
            return
        try:
            with _kept(model):
                model.set_adapter(name)
            for parameter in trained:
                parameter.requires_grad_(True)
            yield
        finally:
            model.set_adapter(active)


def set_dropout(model: Any, probability: float, *, name: str = TRAINED) -> None:
    """Dropout on the input of one LoRA adapter."""
    for module in model.modules():
        held = getattr(module, "lora_dropout", None)  # only peft's LoRA layers have it
        if held is not None and name in held:
            held[name] = nn.Dropout(probability) if probability else nn.Identity()


def add_frozen(model: Any, name: str, config: Any, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Add a frozen adapter; the one in use stays in use, and where this fails nothing is added.

    Args:
        model: a PeftModel.
        name: of the new adapter.
        config: its peft configuration.
        weights: by the names under which peft saves them.
        where: what they come from, for messages.

    Raises:
        ConfigError: the weights are not those of such an adapter on this model.
    """
    from peft import get_peft_model_state_dict

    config.inference_mode = True
    with _hushed(), _kept(model):
        try:
            model.add_adapter(name, config)
            fill(
                get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False),
                weights,
                where=where,
            )
        except (ConfigError, ValueError) as error:
            if name in model.peft_config:
                model.delete_adapter(name)
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                "the adapter does not fit the model",
                code="E-ADAPTER",
                where=where,
                got=safe_text(error, 300),
            ) from error
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(False)


def snapshot(model: Any, name: str, *, of: str) -> None:
    """Add a frozen adapter with the configuration and the weights that another one has now."""
    config = copy.deepcopy(model.peft_config[of])
    config.inference_mode = True
    with _hushed(), _kept(model):
        model.add_adapter(name, config)
    source = {lasting_name(key, of): p for key, p in adapter_parameters(model, of).items()}
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, name).items():
            parameter.copy_(source[lasting_name(key, name)])
            parameter.requires_grad_(False)


def save_adapter(model: Any, folder: Path, *, name: str) -> None:
    """Write one adapter to a folder's root, as peft does with the one named ``default``.

    Base weights are not written, and the hub is not asked whether the base's vocabulary was resized.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True  # so that a plain PeftModel.from_pretrained does not train by accident
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / ADAPTER_FILE), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def restore_adapter(model: Any, folder: Path, *, name: str) -> None:
    """Fill one adapter, in place and bit for bit, with what ``save_adapter`` wrote.

    Raises:
        ConfigError: no adapter there, or one of other shapes.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise ConfigError(
            "the folder holds no adapter", code="E-ADAPTER", where=str(folder), expected=ADAPTER_FILE
        )
    check_safetensors_file(file)
    fill(
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False),
        load_file(str(file)),
        where=str(file),
    )
