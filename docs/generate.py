"""Writes what can be read from the code into the pages: option tables, hooks, components, excerpts.

What stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is replaced by what the block says.
``python docs/generate.py`` writes the pages; with ``--check`` it only says which of them differ.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from rlx.core import errors
from rlx.core.commands.app import VERBS
from rlx.core.foreign_names import FOREIGN_NAMES, REMARKS
from rlx.core.options import MISSING, Option, options, type_name
from rlx.core.settings import Settings
from rlx.plugins.catalogue import COMPONENTS
from rlx.plugins.contract import KINDS
from rlx.plugins.hookspecs import GlobalHooks, RunEvents
from rlx.plugins.references import config_of, resolve
from rlx.testing import cases

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- generated: (.+?) -->\n.*?<!-- end -->", re.DOTALL)
ARXIV = re.compile(r"arXiv:([0-9.]+[0-9])")
# What has no class of its own, or more than one exit code.
OTHER_CODES = {
    0: "success",
    1: "an unexpected error; the traceback is in `crash.txt` of the run folder",
    130: "SIGINT (Ctrl-C); a checkpoint was saved, unless the message says otherwise",
    143: "SIGTERM; a checkpoint was saved",
}


def pages() -> list[Path]:
    """Every page that is looked at."""
    return [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def option_rows(found: Iterable[Option]) -> list[list[str]]:
    """Name, type and bounds, default, and meaning of each option."""
    rows = []
    for option in found:
        kind = type_name(option.type)
        if option.choices:
            kind = ", ".join(f"`{choice}`" for choice in option.choices)
            kind += " or none" if option.default is None else ""
        facts = "; ".join(filter(None, (kind, option.bounds, option.unit)))
        default = "required" if option.default is MISSING else f"`{plain(option.default)}`"
        rows.append([f"`{option.name}`", facts, default, option.doc + source(option)])
    return rows


def source(option: Option) -> str:
    """The option's paper, as a link where there is an arXiv number."""
    if not option.source:
        return ""
    linked = ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", option.source)
    return f" ({linked})"


def plain(value: object) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else '""'


def options_of(kind: str, name: str) -> str:
    """The options of one component as a table."""
    found = options(config_of(resolve(kind, name)))
    if not found:
        return "No options."
    return table(("option", "type", "default", "meaning"), option_rows(found.values()))


def core_options() -> str:
    """Every core option, a table a panel."""
    found = list(options(Settings).values())
    parts = []
    for panel in dict.fromkeys(option.panel for option in found):
        rows = option_rows(option for option in found if option.panel == panel)
        parts.append(f"### {panel}\n\n" + table(("option", "type", "default", "meaning"), rows))
    return "\n\n".join(parts)


def components(*kinds: str) -> str:
    """The built-in components of some kinds, or of all."""
    rows = [
        [kind, f"`{name}`", summary]
        for kind in kinds or KINDS
        for name, (_, summary) in COMPONENTS.get(kind, {}).items()
    ]
    if len(kinds) == 1:
        return table(("name", "what it is"), [row[1:] for row in rows])
    return table(("kind", "name", "what it is"), rows)


def all_options(kind: str) -> str:
    """A section for each built-in component of a kind, with its docstring and options."""
    parts = []
    for name in COMPONENTS[kind]:
        doc = inspect.getdoc(resolve(kind, name)) or ""
        parts.append(f"### `{name}`\n\n{doc.replace('``', '`')}\n\n{options_of(kind, name)}")
    return "\n\n".join(parts)


def hooks(specs: type) -> str:
    """A section for each hook with its exact signature and its docstring."""
    parts = []
    for name, spec in vars(specs).items():
        if not inspect.isfunction(spec):
            continue
        signature = inspect.signature(spec)
        named = [p for p in signature.parameters.values() if p.name != "self"]
        text = f"{name}({', '.join(map(str, named))})".replace("'", "")
        returned = str(signature.return_annotation).replace("'", "")
        doc = (inspect.getdoc(spec) or "").replace("``", "`")
        doc = re.sub(r"\n\nArgs:\n((?:    .*\n?)+)", lambda m: "\n\n" + arguments(m[1]), doc)
        parts.append(f"### `{text} -> {returned}`\n\n{doc.strip()}")
    return "\n\n".join(parts)


def arguments(lines: str) -> str:
    """An Args section of a docstring as a list."""
    found = re.findall(r"^(\w+): (.*)$", textwrap.dedent(lines), re.MULTILINE)
    return "\n".join(f"* `{name}`: {text}" for name, text in found)


def exit_codes() -> str:
    """What each exit code means."""
    known = dict(OTHER_CODES)
    for found in vars(errors).values():
        if isinstance(found, type) and issubclass(found, errors.RlxError) and found.exit_code > 1:
            if found is errors.ErrorGroup:
                continue
            first = (inspect.getdoc(found) or "").splitlines()[0].rstrip(".")
            known[found.exit_code] = first[0].lower() + first[1:] + f" (`rlx.{found.__name__}`)"
    return table(("code", "meaning"), ([str(code), known[code]] for code in sorted(known)))


def foreign_names() -> str:
    """What other trainers call an option, and what rlx does."""
    rows = []
    for name, ours in FOREIGN_NAMES.items():
        rows.append([f"`{name}`", " or ".join(f"`{one}`" for one in ours), REMARKS.get(name, "")])
    return table(("elsewhere", "rlx", "note"), rows)


def recipe(algorithm: str) -> str:
    """The options with which an algorithm learns on the playground."""
    from rlx.plugins.datasets.wordmath import WordMath

    online = resolve("algorithm", algorithm).eats == "prompts"
    values = {"algo": algorithm, **({"reward": "exact_match"} if online else {})}
    values |= WordMath().recipe(algorithm)
    return "```yaml\n" + "\n".join(f"{name}: {plain(value)}" for name, value in values.items()) + "\n```"


def excerpt(place: str) -> str:
    """The source of a function or class without docstrings: ``core/loop.py:Run.step``."""
    file, _, names = place.partition(":")
    text = (ROOT / file).read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for name in names.split("."):
        node = next(child for child in ast.walk(node) if getattr(child, "name", None) == name)
    lines = text.splitlines()
    drop = {number for doc in ast.walk(node) for number in docstring_lines(doc)}
    kept = [lines[i - 1] for i in range(node.lineno, node.end_lineno + 1) if i not in drop]
    body = textwrap.dedent("\n".join(kept))
    return f'```python excerpt="{place}"\n{body}\n```'


def docstring_lines(node: ast.AST) -> range:
    """The lines of a node's docstring."""
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, node.body[0].end_lineno + 1)


def docstring(file: str) -> str:
    """What a module says of itself: its docstring, papers linked, without the line that runs it."""
    doc = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
    parts = [part for part in doc.split("\n\n") if not part.startswith("Run it:")]
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", "\n\n".join(parts)).replace("``", "`")


def functions(file: str) -> str:
    """The public functions of a module: what each takes, and the first sentence of what it gives."""
    tree, rows = ast.parse((ROOT / file).read_text(encoding="utf-8")), []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            taken = [one.arg for one in (*node.args.args, *node.args.kwonlyargs)]
            what = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            rows.append([f"`{node.name}({', '.join(taken)})`", what.replace("``", "`")])
    return table(("function", "what it gives"), rows)


def verbs() -> str:
    """The commands."""
    return table(("command", "what it does"), ([f"`rlx {name}`", doc] for name, doc in VERBS.items()))


def conformance_cases() -> str:
    """A table of the cases of each kind of component."""
    parts = []
    for kind in KINDS:
        rows = [
            [f"`{case.name}`", case.doc.replace("``", "`") + (" *Slow.*" if case.slow else "")]
            for case in cases(kind)
        ]
        parts.append(f"### {kind.capitalize()}\n\n" + table(("case", "what holds"), rows))
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[..., str]] = {
    "core options": core_options,
    "options": options_of,
    "all options": all_options,
    "components": components,
    "global hooks": lambda: hooks(GlobalHooks),
    "run events": lambda: hooks(RunEvents),
    "exit codes": exit_codes,
    "foreign names": foreign_names,
    "recipe": recipe,
    "excerpt": excerpt,
    "docstring": docstring,
    "functions": functions,
    "verbs": verbs,
    "cases": conformance_cases,
}


def block(name: str) -> str:
    """What stands in the block called name: the longest known name, then its arguments.

    Raises:
        KeyError: there is no such block.
    """
    for known in sorted(BLOCKS, key=len, reverse=True):
        if name == known or name.startswith(known + " "):
            return BLOCKS[known](*name.removeprefix(known).split())
    raise KeyError(f"there is no generated block {name!r}; known are {', '.join(BLOCKS)}")


def generated(text: str) -> str:
    """A page with all its blocks brought up to date."""
    return BLOCK.sub(lambda match: f"<!-- generated: {match[1]} -->\n{block(match[1])}\n<!-- end -->", text)


def stale() -> dict[Path, str]:
    """The pages that differ from the code, with what they should be."""
    found = {}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = generated(text)
        if new != text:
            found[page] = new
    return found


def main(words: list[str]) -> int:
    """Write the pages, or with ``--check`` say which would change."""
    found = stale()
    for page, text in found.items():
        print(f"{'differs from the code' if '--check' in words else 'written'}: {page.relative_to(ROOT)}")
        if "--check" not in words:
            page.write_text(text, encoding="utf-8")
    return 1 if found and "--check" in words else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
