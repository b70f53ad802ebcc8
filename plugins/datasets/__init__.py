"""Data sets that need no download, and the model that goes with them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def tiny_path() -> Path:
    """Folder of the packaged model and tokenizer, which ``examples/make_tiny_model.py`` makes."""
    return Path(str(files("rlx.plugins.datasets") / "tiny"))
