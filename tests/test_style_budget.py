"""Budgets that keep the code readable in one sitting."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    file
    for room in ("core", "plugins", "algorithms", "rewards", "callbacks")
    for file in (ROOT / room).rglob("*.py")
)
FILE, FUNCTION, ALGORITHM, LOOP = 400, 60, 200, 200
WINDOW, REPEATED = 8, 0.05


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def functions(file: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_files_stay_short():
    assert {str(f.relative_to(ROOT)): len(lines(f)) for f in FILES if len(lines(f)) > FILE} == {}


def test_functions_stay_short():
    long = {
        f"{file.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for file in FILES
        for node in functions(file)
        if node.end_lineno - node.lineno + 1 > FUNCTION
    }
    assert long == {}


@pytest.mark.parametrize("file", sorted((ROOT / "algorithms").glob("[a-z]*.py")), ids=lambda f: f.stem)
def test_an_algorithm_is_one_short_file(file):
    assert len(lines(file)) <= ALGORITHM


def test_the_loop_is_read_in_one_go():
    assert len(lines(ROOT / "core/loop.py")) <= LOOP


def test_an_algorithm_is_understood_from_three_files():
    way = [ROOT / "algorithms/ppo.py", ROOT / "core/loop.py", ROOT / "core/functional.py"]
    assert sum(len(lines(file)) for file in way) <= 700


def test_little_is_written_twice():
    seen: dict[tuple[str, ...], set[Path]] = defaultdict(set)
    code = {}
    for file in FILES:
        code[file] = [
            line.strip() for line in lines(file) if line.strip() and not line.strip().startswith("#")
        ]
        for start in range(len(code[file]) - WINDOW + 1):
            seen[tuple(code[file][start : start + WINDOW])].add(file)
    repeated = 0
    for rows in code.values():
        marked = set()
        for start in range(len(rows) - WINDOW + 1):
            if len(seen[tuple(rows[start : start + WINDOW])]) > 1:
                marked.update(range(start, start + WINDOW))
        repeated += len(marked)
    assert repeated / sum(map(len, code.values())) <= REPEATED


def public(file: Path) -> list[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and public methods of public classes."""
    found = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                found += [
                    (f"{node.name}.{inner.name}", inner)
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name[0] != "_"
                ]
    return found


def test_public_names_are_documented_and_annotated():
    bare = []
    for file in FILES:
        for name, node in public(file):
            if not ast.get_docstring(node) and not any(
                isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list
            ):
                bare.append(f"{file.relative_to(ROOT)}:{name} has no docstring")
            if isinstance(node, ast.ClassDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            unannotated = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if unannotated or node.returns is None:
                bare.append(f"{file.relative_to(ROOT)}:{name} lacks annotations: {unannotated or 'return'}")
    assert bare == []


def test_the_project_says_nothing_of_pending_work():
    marks = ("TODO", "FIXME", "XXX", "HACK")
    found = [f"{f.relative_to(ROOT)}: {m}" for f in FILES for m in marks if m in f.read_text()]
    assert found == []


def test_untrusted_code_is_never_switched_on_in_the_code():
    consent = "trust_remote_code" + "=True"
    assert [str(f.relative_to(ROOT)) for f in FILES if consent in f.read_text()] == []
