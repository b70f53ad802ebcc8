"""Whether an adapter in a folder fits a model: its task, its modules, its shapes and its rank."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlx.core.errors import ConfigError
from rlx.core.pretrained import ADAPTER_CONFIG_FILE, check_safetensors_file, read_json
from rlx.core.text import safe_text

ADAPTER_FILE = "adapter_model.safetensors"
CAUSAL_TASKS: tuple[str | None, ...] = (None, "CAUSAL_LM")
CLASSIFIER_TASKS: tuple[str | None, ...] = ("SEQ_CLS",)
_SCORE = "base_model.model.score."  # where peft keeps the head of a classifier's adapter
_FIXES = {
    "SEQ_CLS": "it scores texts: train it on with --algo reward, or take it as a reward: --reward lora:DIR",
    "CAUSAL_LM": "it has no score head: merge it into its base, and start there with --model and --lora-r",
}


def check_adapter(model: nn.Module, folder: Path, *, classifier: bool) -> str:
    """As ``check_folder``, for an adapter that is all there is: a classifier's brings its score head.

    Raises:
        ConfigError: as there, and for a classifier without a head of one score.
    """
    described = check_folder(model, folder, CLASSIFIER_TASKS if classifier else CAUSAL_TASKS)
    if classifier and score_head(folder) is None:
        raise ConfigError(
            "the adapter of a classifier has no score head",
            code="E-ADAPTER",
            where=str(folder / ADAPTER_FILE),
            expected="a weight called score, as --algo reward saves it",
        )
    return described


def check_folder(model: nn.Module, folder: Path, tasks: Collection[str | None]) -> str:
    """Compare an adapter folder with the model it is meant for; the base id it names, for messages.

    Args:
        model: the base, bare or with adapters.
        folder: what peft's ``save_pretrained`` wrote.
        tasks: the task types that will do, None for a configuration that names none.

    Raises:
        ConfigError: no adapter, one for another task, or one for a base of other modules or shapes.
    """
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ConfigError(
            f"adapter {str(folder)!r} is not an adapter folder",
            code="E-ADAPTER",
            got=f"no {ADAPTER_CONFIG_FILE}",
            expected="a folder that peft's save_pretrained wrote",
        )
    config = read_json(folder / ADAPTER_CONFIG_FILE)
    task = config.get("task_type")
    if task not in tasks:
        raise ConfigError(
            "the adapter is for another task",
            code="E-ADAPTER",
            where=str(folder),
            got=safe_text(task or "no task", 40),
            expected=" or ".join(one for one in tasks if one),
            hint=_FIXES.get(task or "CAUSAL_LM", ""),
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


def score_head(folder: Path) -> tuple[Tensor, Tensor | None] | None:
    """Weight (1, D) and bias (1,), if it has one, of the score head in an adapter; None if there is no head.

    Raises:
        ConfigError: it gives several scores.
    """
    from safetensors import safe_open

    file = folder / ADAPTER_FILE
    with safe_open(str(file), framework="pt") as tensors:
        weight, bias = (
            tensors.get_tensor(_SCORE + name) if _SCORE + name in tensors.keys() else None
            for name in ("weight", "bias")
        )
    if weight is None:
        return None
    if weight.shape[0] != 1:
        raise ConfigError(
            "the adapter's score head gives no single score",
            code="E-ADAPTER",
            where=f"{_SCORE}weight in {file}",
            got=f"{weight.shape[0]} labels",
            expected="one label",
        )
    return weight, bias


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
