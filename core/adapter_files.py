"""Whether an adapter in a folder fits a model: its task, its modules, its shapes and its rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlx.core.errors import ConfigError
from rlx.core.pretrained import ADAPTER_CONFIG_FILE, check_safetensors_file, read_json
from rlx.core.text import safe_text

ADAPTER_FILE = "adapter_model.safetensors"
_CAUSAL = (None, "CAUSAL_LM")


def check_folder(model: nn.Module, folder: Path) -> str:
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
    from peft import PeftModel
    from safetensors import safe_open

    base = model.get_base_model() if isinstance(model, PeftModel) else model
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


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers, those inside adapters left out."""
    return sorted(
        {
            name.removesuffix(".base_layer").rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".lora_" not in name
        }
    )
