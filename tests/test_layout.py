"""The folders at the top level are the packages under `rlx`: list, tree and wheel agree, nothing leaks."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS = ("core", "plugins", "algorithms", "rewards", "callbacks")


def tree() -> set[str]:
    """Packages as the folders lay them out."""
    found = {"rlx"}
    for init in (file for room in ROOMS for file in (ROOT / room).rglob("__init__.py")):
        inside = init.parent.relative_to(ROOT)
        parts = inside.parts[2:] if inside.parts[:2] == ("core", "rlx") else inside.parts
        found.add(".".join(("rlx", *parts)))
    return found


def test_the_list_of_packages_equals_the_tree():
    assert sorted(SETUPTOOLS["packages"]) == sorted(tree())


def test_no_top_level_folder_is_called_rlx():
    assert not (
        ROOT / "rlx"
    ).exists()  # it would shadow the installed package from the root of the repository


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_tiny_model(tmp_path):
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    tiny = {file.name for file in (ROOT / "plugins/datasets/tiny").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"} <= tiny
    expected = {"rlx/py.typed", *(f"rlx/plugins/datasets/tiny/{name}" for name in tiny)}
    templates = list((ROOT / "core/templates").iterdir())
    assert len(templates) == 17  # three for every package, a component and its tests for each of seven kinds
    expected |= {f"rlx/core/templates/{file.name}" for file in templates}
    for package in SETUPTOOLS["packages"]:
        folder = ROOT / next(
            Path(where, *package[len(mapped) :].strip(".").split("."))
            for mapped, where in sorted(SETUPTOOLS["package-dir"].items(), key=lambda item: -len(item[0]))
            if package == mapped or package.startswith(mapped + ".")
        )
        expected |= {f"{package.replace('.', '/')}/{file.name}" for file in folder.glob("*.py")}
    assert expected <= names
    assert not any(name.split("/")[0] in (*ROOMS, "tests", "docs") for name in names)


def test_no_folder_is_importable_under_its_own_name():
    code = (
        "import sys, rlx, rlx.core.config, rlx.plugins.registry, rlx.algorithms.ppo, rlx.rewards\n"
        "import rlx.callbacks\n"
        f"print(sorted(set(sys.modules) & {set(ROOMS)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
