"""Every Python, bash and YAML snippet of the pages runs, in order, in an empty folder a page.

What a fence's info string may say, beside the language:

* ``file=NAME``: the snippet is written to that file, for the snippets after it.
* ``short``: each ``rlx run`` line gets the options of SHORT; larger numbers of its own are lowered to those.
* ``fails=N``: the last command exits with N; every other command exits with 0.
* ``skip="reason"``: not run; only for commands that install, need a GPU or a network.
* ``excerpt="…"``: a piece of the code itself, kept the same by docs/generate.py.
* ``text output``: lines that the snippet before printed, in that order; ``…`` stands for anything.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# They go through conformance cases that take whole runs, or make a dozen runs themselves.
SLOW = (
    "adapters.md", "plugin-algorithm.md", "plugin-callback.md", "plugin-generator.md", "rewards.md",
    "run-folder.md", "tour.md",
)  # fmt: skip
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SHORT = {
    "--max-steps": "2", "--batch-size": "8", "--max-rows": "64", "--max-eval-rows": "8",
    "--max-completion-length": "16", "--plots": "false",
}  # fmt: skip
LANGUAGES = ("python", "bash", "yaml", "text", "toml")


@dataclass(frozen=True)
class Snippet:
    """One fenced block of a page."""

    place: str
    language: str
    words: dict[str, str]
    text: str


def snippets(page: Path) -> list[Snippet]:
    content = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(content):
        words = {name: value for name, _, value in (w.partition("=") for w in shlex.split(match[3]))}
        line = content[: match.start()].count("\n") + 1
        lines = [text.removeprefix(match[1]) for text in match[4].splitlines()]
        found.append(Snippet(f"{page.name}:{line}", match[2], words, "\n".join(lines) + "\n"))
    return found


def commands(snippet: Snippet) -> list[list[str]]:
    """The command lines of a bash snippet, comments left out, as words."""
    joined = snippet.text.replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in lines if words]


def shortened(words: list[str]) -> list[str]:
    if words[:1] != ["run"] or set(words) & {"--help", "--print-config"}:
        return words
    words = list(words)
    for name, most in SHORT.items():
        if name not in words:
            words += [name, most]
        elif most.isdigit():
            place = words.index(name) + 1
            words[place] = str(min(int(words[place]), int(most)))
    return words


def run_bash(snippet: Snippet) -> None:
    from rlx.core.commands.main import main

    lines = commands(snippet)
    for number, words in enumerate(lines):
        assert words[0] == "rlx", f"{snippet.place}: only rlx is run here; mark {words[0]} with skip"
        expected = int(snippet.words.get("fails", 0)) if number == len(lines) - 1 else 0
        code = main(shortened(words[1:]) if "short" in snippet.words else words[1:])
        assert code == expected, f"{snippet.place}: {shlex.join(words)} exited with {code}, not {expected}"


def check_yaml(snippet: Snippet) -> None:
    from rlx.core.config import from_mapping
    from rlx.core.yaml_file import parse_config

    from_mapping(*parse_config(snippet.text, snippet.place))


def check_output(snippet: Snippet, printed: str) -> None:
    """Each line occurs, one after another, blanks counted alike."""
    rest = " ".join(printed.split())
    for line in filter(None, (" ".join(line.split()) for line in snippet.text.splitlines())):
        pattern = ".*?".join(map(re.escape, line.split("…")))
        match = re.search(pattern, rest)
        assert match, f"{snippet.place}: not printed: {line}\n--- printed:\n{printed}"
        rest = rest[match.end() :]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in PAGES
    ],
)
def test_every_snippet_of_the_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLX_NO_PLUGINS", "*")
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, threads = "", torch.get_num_threads()
    runners: dict[str, Callable[[Snippet], None]] = {"bash": run_bash, "yaml": check_yaml}
    for snippet in snippets(page):
        words = snippet.words
        assert snippet.language in LANGUAGES, f"{snippet.place}: {snippet.language}"
        if snippet.language == "text" and "output" in words:
            check_output(snippet, printed)
        if snippet.language in ("text", "toml") or "excerpt" in words:
            continue
        if "skip" in words:
            assert words["skip"], f"{snippet.place}: skip needs a reason"
            continue
        if "file" in words:
            (tmp_path / words["file"]).write_text(snippet.text, encoding="utf-8")
            if snippet.language == "python":
                continue
        capfd.readouterr()
        if snippet.language == "python":
            exec(compile(snippet.text, snippet.place, "exec"), names)
        else:
            runners[snippet.language](snippet)
        out, err = capfd.readouterr()
        printed = out + err
    torch.set_num_threads(threads)


def test_a_wrong_output_and_a_wrong_exit_code_are_seen() -> None:
    told = Snippet("page:1", "text", {"output": ""}, "one … three\n")
    check_output(told, "zero\none and two and three\n")
    with pytest.raises(AssertionError, match="not printed"):
        check_output(told, "three\none\n")
    with pytest.raises(AssertionError, match="exited with 2, not 0"):
        run_bash(Snippet("page:2", "bash", {}, "rlx run --no-such-flag 1\n"))
    with pytest.raises(AssertionError, match="mark make with skip"):
        run_bash(Snippet("page:3", "bash", {}, "make demo\n"))


def test_short_makes_runs_small_and_leaves_other_commands_alone() -> None:
    words = shortened(["run", "--max-steps", "60", "--batch-size", "4"])
    assert words[:5] == ["run", "--max-steps", "2", "--batch-size", "4"]
    assert words[words.index("--max-eval-rows") + 1] == "8"
    assert shortened(["show", "runs/first"]) == ["show", "runs/first"]
