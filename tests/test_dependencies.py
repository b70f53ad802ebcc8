"""What is imported is declared, what is declared is imported, and the extras can be done without."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROOMS = ("core", "plugins", "algorithms", "rewards", "callbacks")
MODULE = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}  # where the name is not that of the project
FOR_TESTS = ("dev", "oracle")
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name not in FOR_TESTS}
UNIMPORTED = {"tensorboard", "wandb", "tokenizers"}  # called by accelerate, by transformers


def modules(*lists: list[str]) -> set[str]:
    """Import names of lists of requirement lines."""
    lines = [line for one in lists for line in one]
    names = [re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in lines]
    return {MODULE.get(name, name.replace("-", "_")) for name in names}


def imports(*folders: str) -> dict[str, str]:
    """Third-party module → the first file that imports it."""
    found: dict[str, str] = {}
    for file in sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - {"rlx", *sys.stdlib_module_names}:
                found.setdefault(top, str(file.relative_to(ROOT)))
    return found


def test_every_import_is_declared():
    declared = modules(PROJECT["dependencies"], *EXTRAS.values())
    theirs = {"pytest"}  # of plugin authors, inside their own tests: rlx.testing.conformance
    found = imports(*ROOMS)
    assert {module: file for module, file in found.items() if module not in declared | theirs} == {}


def test_every_dependency_is_imported():
    declared = modules(PROJECT["dependencies"], *EXTRAS.values())
    assert declared - set(imports(*ROOMS)) <= UNIMPORTED


def test_what_tests_and_benchmarks_import_is_declared():
    declared = modules(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    beside = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").glob("*/programs/*.py")]
    ours = {"conftest", "my_pkg", "rlx_sppo", *(file.stem for file in beside)}
    found = imports("tests", "benchmarks", "examples")
    assert {module: file for module, file in found.items() if module not in declared | ours} == {}


@pytest.mark.slow
def test_a_run_without_the_extras_says_what_is_missing_and_ends_well(tmp_path):
    blocked = sorted(modules(*EXTRAS.values()))
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def without_extras(name, path=None, target=None):\n"
        f"    return None if name.partition('.')[0] in {blocked!r} else find(name, path, target)\n"
        "PathFinder.find_spec = staticmethod(without_extras)\n"
        "from rlx.core.commands.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = "run --algo ppo --reward exact_match --max-steps 1 --batch-size 2 --max-eval-rows 2"
    words = [*options.split(), "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert 'pip install "rlx[plots]"' in done.stdout + done.stderr
