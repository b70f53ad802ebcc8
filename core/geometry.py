"""Sizes and names that follow from several options together: the batch, how it divides, the run folder."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.settings import Settings
from rlx.core.text import safe_text

RUN_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


def processes() -> int:
    """How many processes this run has, as its launcher says (``WORLD_SIZE``)."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() and int(size) > 0 else 1


def join_batch_size(settings: Settings, *, given: bool, where: Mapping[str, str]) -> Settings:
    """Settings with ``per_device_train_batch_size × gradient_accumulation_steps × processes`` as batch_size.

    Args:
        settings: the core options.
        given: whether batch_size was given as well; then both must agree.
        where: option → place, for messages.

    Returns:
        Settings that say batch_size only.

    Raises:
        ConfigError: if they do not agree, or accumulation steps stand alone.
    """
    each, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    if each is None and steps is None:
        return settings
    if each is None:
        raise ConfigError(
            "gradient_accumulation_steps says nothing without per_device_train_batch_size",
            code="E-CONFIG-CONFLICT",
            where=where.get("gradient_accumulation_steps", ""),
            hint="give both, or batch_size alone: micro-batches are cut by tokens, the gradient is the same",
        )
    total = each * (steps or 1) * processes()
    if given and settings.batch_size != total:
        raise ConfigError(
            "batch_size does not agree with its parts",
            code="E-CONFIG-CONFLICT",
            where=where.get("batch_size", ""),
            got=f"{each} a device × {steps or 1} accumulation steps × {processes()} processes = {total}, "
            f"batch_size = {settings.batch_size}",
            hint=f"give one of them: --batch-size {total}",
        )
    return dataclasses.replace(
        settings, batch_size=total, per_device_train_batch_size=None, gradient_accumulation_steps=None
    )


def check_division(algorithm: Any, config: Any, settings: Settings, where: Mapping[str, str]) -> None:
    """The batch must divide into processes and mini-batches.

    Args:
        algorithm: the algorithm's class.
        config: its Config.
        settings: the core options.
        where: option → place, for messages.

    Raises:
        ConfigError: with the equation and the nearest sizes that divide.
    """
    made = algorithm(config)
    completions = made.completions_per_prompt if made.eats == "prompts" else 1
    rows, pieces, ranks = settings.batch_size, made.mini_batches, processes()

    def divides(batch: int, cuts: int) -> bool:
        return batch % ranks == 0 and batch // ranks * completions % cuts == 0

    if divides(rows, pieces):
        return
    # A batch of pieces * ranks rows always divides, so the search finds one on either side, or the first.
    batches = [size for size in range(ranks, rows + pieces * ranks + 1, ranks) if divides(size, pieces)]
    below, above = [b for b in batches if b < rows][-1:], [b for b in batches if b > rows][:1]
    choices = [f"batch_size {_either(below + above)} with {pieces} mini-batches"]
    cuts = [cut for cut in range(1, rows * completions + 1) if divides(rows, cut)]
    if cuts:
        near = sorted(sorted(cuts, key=lambda cut: abs(cut - pieces))[:2])
        choices.append(f"batch_size {rows} with {_either(near)} mini-batches")
    raise ConfigError(
        "the batch cannot be divided",
        code="E-CONFIG-CONFLICT",
        where=where.get("batch_size", where.get("num_mini_batches", "")),
        got=f"{rows} rows × {completions} completions / ({pieces} mini-batches × {ranks} processes)"
        f" = {rows * completions / (pieces * ranks):g}",
        expected="; ".join(choices),
    )


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def run_folder(settings: Settings, algorithm: str, where: Mapping[str, str]) -> str:
    """The run folder: as given, if it is a fit name, or ``runs/<algo>-<model>-<time>``, numbered if taken.

    Args:
        settings: output_dir and model.
        algorithm: its short name.
        where: option → place, for messages.

    Returns:
        The path as text.

    Raises:
        ConfigError: if the name has other characters than letters, digits and ``._-``, or the path leads
        upwards.
    """
    given = settings.output_dir
    if not given:
        model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(settings.model).name).strip("-.") or "model"
        name, number = f"runs/{algorithm}-{model[:60]}-{time.strftime('%Y%m%d-%H%M%S')}", 1
        while Path(name if number == 1 else f"{name}-{number}").exists():  # runs begun in the same second
            number += 1
        return name if number == 1 else f"{name}-{number}"
    path = Path(given)
    if not RUN_NAME.fullmatch(path.name) or ".." in path.parts or not given.isprintable():
        raise ConfigError(
            f"output_dir {safe_text(given, 120)!r} is no fit name for a run folder",
            code="E-CONFIG-NAME",
            where=where.get("output_dir", ""),
            expected="a last part of 1 to 100 letters, digits, '.', '_' and '-', and no '..' anywhere",
        )
    return given
