"""What needs no training stack imports none: every light module, each alone in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy", "matplotlib", "wandb")
LIGHT = (
    "rlx", "rlx.__main__", "rlx.testing",
    "rlx.core.errors", "rlx.core.options", "rlx.core.settings", "rlx.core.text", "rlx.core.plain",
    "rlx.core.config", "rlx.core.arguments", "rlx.core.yaml_file", "rlx.core.components", "rlx.core.help",
    "rlx.core.geometry",
    "rlx.plugins.contract", "rlx.plugins.registry", "rlx.plugins.discovery", "rlx.plugins.references",
    "rlx.plugins.hookspecs", "rlx.plugins.catalogue", "rlx.plugins.events", "rlx.plugins.light",
    "rlx.plugins.loading",
    *(f"rlx.core.commands.{file.stem}" for file in sorted((ROOT / "core/commands").glob("[a-z]*.py"))),
    *(f"rlx.rewards.{file.stem}" for file in sorted((ROOT / "rewards").glob("[a-z]*.py"))),
    *(f"rlx.callbacks.{file.stem}" for file in sorted((ROOT / "callbacks").glob("[a-z]*.py"))),
)  # fmt: skip

# One interpreter for all: between two imports everything of rlx is forgotten, so that each module answers for
# itself, and a heavy module stays in sys.modules once somebody has imported it.
CODE = f"""
import importlib, sys
for name in sys.argv[1:]:
    for known in [known for known in sys.modules if known.split(".")[0] == "rlx"]:
        del sys.modules[known]
    importlib.import_module(name)
    print(name, *[heavy for heavy in {HEAVY!r} if heavy in sys.modules])
    for known in [known for known in sys.modules if known.split(".")[0] in {HEAVY!r}]:
        del sys.modules[known]
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", CODE, *LIGHT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return {name: heavy for name, *heavy in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_nothing_heavy(module, imported):
    assert imported[module] == []
