"""LoRA adapters through peft: start a new one, or go on with one from a folder.

Adapter weights are float32 where the base is in half precision: they are what the optimizer moves.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlx.core.errors import ConfigError
from rlx.core.pretrained import ADAPTER_CONFIG_FILE, check_finite, check_safetensors_file, fill, read_json
from rlx.core.text import safe_text

ADAPTER_FILE = "adapter_model.safetensors"
TRAINED = "default"  # peft's name for the adapter that is saved at a folder's root
_CAUSAL = (None, "CAUSAL_LM")


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is peft's wrapper around a base."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
) -> Any:
    """The model with a new LoRA adapter named ``default``; only the adapter can be trained then.

    Its B matrices are zero, so the model computes what it computed before.

    Args:
        model: a transformers causal language model.
        rank: r.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: on the adapter's input.
        target_modules: ends of module names, or ``all-linear`` alone.

    Raises:
        ConfigError: no module of these names, or an adapter is there already.
    """
    from peft import LoraConfig, get_peft_model

    if is_adapted(model):
        raise ConfigError(
            "lora_r is set, but the model already has an adapter",
            code="E-ADAPTER",
            hint="leave lora_r out to train the adapter that is there, or pass the base model",
        )
    targets: str | list[str] = list(target_modules)
    if "all-linear" in targets:
        if len(targets) > 1:
            raise ConfigError(
                "lora_target_modules names modules beside all-linear",
                code="E-ADAPTER",
                got=", ".join(targets),
                expected="all-linear alone, or module names",
            )
        targets = "all-linear"
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        with _hushed():
            return get_peft_model(model, config, adapter_name=TRAINED, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ConfigError(
            "no LoRA adapter fits this model",
            code="E-ADAPTER",
            where="lora_target_modules",
            got=safe_text(error, 200),
            expected=f"some of: {', '.join(_linear_names(model)[:10])}",
        ) from error


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = TRAINED, trainable: bool = True) -> Any:
    """The model with an adapter from a folder, after checking that it fits.

    Args:
        model: the base, or a model that has adapters of other names.
        folder: what peft's ``save_pretrained`` wrote.
        name: the adapter's name from now on.
        trainable: whether it is trained on; otherwise frozen, and the adapter in use stays in use.

    Raises:
        ConfigError: not an adapter, for another task, or for a base of other shapes.
    """
    from peft import PeftModel

    folder = Path(folder)
    described = _check_adapter(model, folder)
    try:
        with _hushed():
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=name, is_trainable=trainable)
            else:
                model = PeftModel.from_pretrained(
                    model, str(folder), adapter_name=name, is_trainable=trainable
                )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            "the adapter does not fit the model",
            code="E-ADAPTER",
            where=str(folder),
            got=safe_text(error, 300),
            expected=f"an adapter of {described}",
        ) from error
    _check_complete(model, name, folder)
    return model


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


def is_identity(model: Any) -> bool:
    """Whether the adapter in use changes nothing yet: plain LoRA with every B matrix zero."""
    config = model.peft_config[model.active_adapter]
    if config.peft_type.value != "LORA" or config.use_dora or config.modules_to_save:
        return False
    outs = [
        tensor
        for key, tensor in adapter_parameters(model, model.active_adapter).items()
        if ".lora_B." in key or ".lora_embedding_B." in key
    ]
    return bool(outs) and not any(bool(tensor.any()) for tensor in outs)


@contextmanager
def adapter_switched(model: Any, name: str | None) -> Iterator[None]:
    """Another adapter, or none, for a while; whatever happens inside, all is as before afterwards.

    peft changes which weights require gradients when it switches; that is put back too.

    Args:
        model: a PeftModel.
        name: the adapter to use; None for the bare base.
    """
    active = model.active_adapter
    required = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name, inference_mode=True)
            yield
    finally:
        if model.active_adapter != active:
            model.set_adapter(active)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(required[key])


def _check_adapter(model: nn.Module, folder: Path) -> str:
    """Compare an adapter folder with the model it is meant for; the base id it names, for messages."""
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ConfigError(
            f"adapter {str(folder)!r} is not an adapter folder",
            code="E-ADAPTER",
            got=f"no {ADAPTER_CONFIG_FILE}",
            expected="a folder that peft's save_pretrained wrote",
        )
    config = read_json(folder / ADAPTER_CONFIG_FILE)
    if config.get("task_type") not in _CAUSAL:
        raise ConfigError(
            "the adapter is for another task",
            code="E-ADAPTER",
            where=str(folder),
            got=safe_text(config["task_type"], 40),
            expected="CAUSAL_LM",
        )
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise ConfigError(
            "the adapter has no safetensors weights",
            code="E-ADAPTER",
            where=str(folder),
            expected=ADAPTER_FILE,
        )
    check_safetensors_file(file)
    if config.get("peft_type") == "LORA":
        _check_lora_shapes(model, file, config)
    return str(config.get("base_model_name_or_path"))


def _check_lora_shapes(model: Any, file: Path, config: dict[str, Any]) -> None:
    """Each pair of LoRA matrices must fit the linear layer of its name, and agree on the rank."""
    from safetensors import safe_open

    base = model.get_base_model() if is_adapted(model) else model
    modules = {name.replace(".base_layer", ""): module for name, module in base.named_modules()}
    ids = f"adapter of {config.get('base_model_name_or_path')}, model {base.name_or_path or 'from Python'}"
    with safe_open(str(file), framework="pt") as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    for key, shape in shapes.items():
        name, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        if kind not in ("A.weight", "B.weight") or len(shape) != 2:
            continue
        module = modules.get(name)
        if module is None:
            raise ConfigError(
                "the adapter is for another model",
                code="E-ADAPTER",
                where=str(file),
                got=ids,
                expected=f"a model with the module {safe_text(name, 120)}",
            )
        rows, columns = _linear_shape(module)
        have, want = (shape[1], columns) if kind[0] == "A" else (shape[0], rows)
        rank = shape[0] if kind[0] == "A" else shape[1]
        expected_rank = _rank(name, config)
        if have != want or rank != expected_rank:
            fits = (expected_rank, columns) if kind[0] == "A" else (rows, expected_rank)
            raise ConfigError(
                "the adapter does not fit the model",
                code="E-ADAPTER",
                where=f"{safe_text(key, 120)} in {file}",
                got=f"shape {shape} ({ids})",
                expected=f"shape {fits}, rank {expected_rank}",
            )


def _rank(name: str, config: dict[str, Any]) -> int:
    """The rank that an adapter's configuration gives one module."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return int(rank)
    return int(config.get("r", 0))


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, also of GPT-2's transposed one."""
    from transformers.pytorch_utils import Conv1D

    weight: Tensor = module.weight  # type: ignore[assignment]
    return (
        (weight.shape[1], weight.shape[0])
        if isinstance(module, Conv1D)
        else (weight.shape[0], weight.shape[1])
    )


def _linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers."""
    return sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )


def set_dropout(model: Any, probability: float, *, name: str = TRAINED) -> None:
    """Dropout on the input of one LoRA adapter."""
    for module in model.modules():
        held = getattr(module, "lora_dropout", None)  # only peft's LoRA layers have it
        if held is not None and name in held:
            held[name] = nn.Dropout(probability) if probability else nn.Identity()


def snapshot(model: Any, name: str) -> None:
    """Add a frozen adapter with the configuration and the weights that the adapter in use has now."""
    active = model.active_adapter
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    config = copy.deepcopy(model.peft_config[active])
    config.inference_mode = True
    with _hushed():
        model.add_adapter(name, config)
    model.set_adapter(active)
    trained = adapter_parameters(model, active)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, name).items():
            parameter.copy_(trained[re.sub(rf"\.{name}(\.|$)", rf".{active}\1", key)])
    for key, p in model.named_parameters():
        p.requires_grad_(before.get(key, False))


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in use to a folder's root, as peft does, whatever its name.

    Base weights are not written, and the hub is not asked whether the base's vocabulary was resized.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = model.active_adapter
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True  # so that a plain PeftModel.from_pretrained does not train by accident
    config.base_model_name_or_path = config.base_model_name_or_path or model.get_base_model().name_or_path
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / ADAPTER_FILE), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def restore_adapter(model: Any, folder: Path) -> None:
    """Fill the adapter in use, in place and bit for bit, with what ``save_adapter`` wrote.

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
        get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False),
        load_file(str(file)),
        where=str(file),
    )
