"""Fingerprints of the files that decide what a run computes: models, adapters, tokenizers, code.

A resume compares them with those of the checkpoint. Weights are not read whole: names, sizes and both ends of
each file tell a retrained or swapped model from the same one, in milliseconds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlx.core.components import Component
    from rlx.core.config import RunConfig

END = 1 << 16  # bytes read at either end of a file
SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
MODELS = ("model", "tokenizer", "reference_model", "reference_adapter", "value_model", "adapter")
CODE = ("algo", "reward", "judge", "transform", "generator", "callback")
ACCEPTED = ("data", *MODELS, *CODE)  # what a resume may be told to accept as it lies there now


def fingerprints(config: RunConfig, commit: str | None = None) -> dict[str, str]:
    """Option → fingerprint of the files that it names; options that name none are left out.

    Args:
        config: the resolved configuration.
        commit: what the model's revision on the hub stands for, if it came from there.
    """
    from rlx.core.pretrained import Source

    settings, found = config.settings, {}
    for option in MODELS:
        name = getattr(settings, option)
        if name is None or name.startswith("object-"):  # an object given in Python has no files
            continue
        folder = Source.of(name, role=option).folder
        revision = (commit or settings.model_revision or "main") if option == "model" else "main"
        found[option] = of_folder(folder) if folder is not None else f"{name}@{revision}"
    chosen = {
        "algo": [config.algorithm],
        "reward": [component for component, _ in config.rewards],
        "judge": [config.judge] if config.judge else [],
        "transform": config.transforms,
        "generator": [config.generator],
        "callback": config.callbacks,
    }
    for option in CODE:
        refs = [component.ref for component in chosen[option] if isinstance(component.ref, str)]
        files = [Path(ref.rpartition(":")[0]).expanduser() for ref in refs if ".py:" in ref]
        digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
        digests += [bytes.fromhex(of_folder(folder)) for folder in _models(chosen[option])]
        if digests:
            found[option] = hashlib.sha256(b"".join(digests)).hexdigest()
    return found


def _models(components: Sequence[Component]) -> list[Path]:
    """Folders of models and adapters that options of components name: a reward model, say."""
    values = [value for one in components for value in one.options.values() if isinstance(value, str)]
    marks = ("config.json", "adapter_config.json")
    # os.path, because it takes any text for what it is: no file. A pattern is too long for a name, say.
    return [Path(v) for v in values if any(os.path.isfile(os.path.join(v, mark)) for mark in marks)]


def of_folder(folder: Path) -> str:
    """sha256 over name, size and both ends of each file of a model's folder; logs and manifest left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or path.name == "manifest.json" or not path.is_file():
            continue
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest.update(f"{path.name}\0{size}\0".encode() + file.read(END))
            file.seek(max(0, size - END))
            digest.update(file.read(END))
    return digest.hexdigest()
