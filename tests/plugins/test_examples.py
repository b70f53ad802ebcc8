"""The example packages: public names only, installed by pip, found, and good at what they say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rlx

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PACKAGES = ("my_pkg", "rlx_sppo")
PUBLIC = ("rlx", "rlx.testing")
FILES = [
    file
    for package in PACKAGES
    for folder in (package, "tests")
    for file in sorted((EXAMPLES / package / folder).glob("*.py"))
]


def names_of_rlx(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Modules of rlx that a file imports, and names that it takes from ``rlx`` itself."""
    modules, names = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "rlx"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rlx":
            modules.add(node.module or "")
            names |= {alias.name for alias in node.names if node.module == "rlx"}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rlx":
            names.add(node.attr)
    return modules, names


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_they_use_public_names_only(file):
    modules, names = names_of_rlx(ast.parse(file.read_text(encoding="utf-8")))
    assert modules <= set(PUBLIC) and names <= set(rlx.__all__)


def test_a_name_that_is_not_public_is_seen():
    modules, names = names_of_rlx(ast.parse("from rlx.core import loop\nimport rlx\nrlx.hidden"))
    assert modules - set(PUBLIC) == {"rlx.core"} and names - set(rlx.__all__) == {"hidden"}


def test_the_algorithm_is_one_file_of_less_than_sixty_lines():
    assert len((EXAMPLES / "rlx_sppo/rlx_sppo/sppo.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.fixture(scope="module")
def installed(install):
    return install(*(EXAMPLES / package for package in PACKAGES))


SHORT = "--max-steps 2 --batch-size 4 --max-eval-rows 4 --max-completion-length 8 --plots false".split()


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_its_own_tests_pass(package, installed):
    passed = installed.run("pytest", "-q", "-p", "no:cacheprovider", f"{package}/tests")
    assert "passed" in passed and "failed" not in passed


@pytest.mark.slow
def test_rlx_finds_them(installed):
    listed = installed.run("rlx", "plugins", "list")
    for name in ("sppo", "balance", "winners", "closeness", "closer", "rlx-sppo 0.1.0", "my-pkg 0.1.0"):
        assert name in listed
    assert "failed to load" not in listed
    shown = installed.run("rlx", "plugins", "info", "algorithm", "sppo")
    assert "log-ratio between a sure win and a sure loss" in shown and "rlx-sppo" in shown


@pytest.mark.slow
def test_a_judge_of_ones_own_teaches(installed):
    """The judge of one package, the algorithm of the other, and one that is built in."""
    for algo in ("sppo", "online_dpo"):
        printed = installed.run("rlx", "run", "--algo", algo, "--judge", "closer", *SHORT)
        assert "step 2/2" in printed
    installed.run("rlx", "run", "--algo", "sppo", "--reward", "closeness", *SHORT)


@pytest.mark.slow
def test_sppo_learns_as_its_readme_says(installed):
    """The command line of the README, with the transform and the callback: from 0.40 to over 0.9."""
    text = (EXAMPLES / "rlx_sppo/README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = re.search(r"^rlx (run --algo sppo .*)$", text, re.MULTILINE)
    assert line is not None
    words = [*line[1].split(), "--plots", "false", "--output-dir", "runs/sppo"]
    printed = installed.run("rlx", *words)
    found = re.search(r"held-out reward (\S+) → (\S+)", printed)
    assert found is not None and float(found[1]) < 0.45 and float(found[2]) > 0.9
    lines = (installed.sources / "runs/sppo/winners.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5  # log lines at steps 10, 20, 30, 40 and the last
