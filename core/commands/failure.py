"""How a command fails: at most twelve lines on stderr, an exit code, a crash report in the run folder."""

from __future__ import annotations

import sys
import traceback as tracebacks
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlx.core.errors import ErrorGroup, RlxError
from rlx.core.text import redact, safe_text

MOST_LINES = 12
LONGEST_LINE = 600
CRASH_FILE = "crash.txt"


def failed(error: BaseException, *, traceback: bool = False) -> int:
    """Tell an error and say with which code to exit.

    Args:
        error: what ended the command.
        traceback: print Python's traceback as well.

    Returns:
        The exit code.
    """
    if traceback:
        sys.stderr.write(clean("".join(tracebacks.format_exception(error))) + "\n")
    lines, code = told(error)
    _print(lines)
    return code


def told(error: BaseException) -> tuple[list[str], int]:
    """An error in words, and its exit code.

    Args:
        error: any.

    Returns:
        At most twelve lines, safe to print and without secrets; the code.
    """
    notes = [f"  note:     {note}" for note in getattr(error, "__notes__", ())]
    if isinstance(error, ErrorGroup) and len(error.problems) > 2:
        return _fit(_compact(error)), error.exit_code
    if isinstance(error, RlxError):
        return _fit(error.lines()), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ["[E-INTERRUPTED] interrupted; nothing was saved"], 130
    if out_of_memory(error):
        hint = (
            "lower --max-tokens-per-micro-batch or --max-completion-length, or train an adapter: --lora-r 8"
        )
        return _fit([f"[E-MEMORY] out of memory: {_first_line(error)}", f"  do this:  {hint}", *notes]), 5
    frames = tracebacks.extract_tb(error.__traceback__)
    lines = [f"[E-INTERNAL] {type(error).__name__}: {_first_line(error)}"]
    if frames:
        lines.append(f"  where:    {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}")
    hint = "run it again with --traceback; report it with that and the output of rlx doctor"
    return _fit([*lines, *notes, f"  do this:  {hint}"]), 1


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was exhausted, on the device or the host; known by name, so torch is not imported."""
    return isinstance(error, MemoryError) or any(
        kind.__name__ == "OutOfMemoryError" and kind.__module__.partition(".")[0] == "torch"
        for kind in type(error).__mro__
    )


@contextmanager
def crash_report(folder: Path) -> Iterator[None]:
    """Within the block, an unexpected error is written to ``crash.txt`` in the run folder, if there is one.

    Args:
        folder: the run folder.
    """
    try:
        yield
    except RlxError:
        raise
    except Exception as error:
        if folder.is_dir():
            report = folder / CRASH_FILE
            try:
                report.write_text(clean("".join(tracebacks.format_exception(error))) + "\n", encoding="utf-8")
            except OSError as failure:
                error.add_note(f"{CRASH_FILE} could not be written: {failure.strerror}")
            else:
                error.add_note(f"the traceback is in {report}")
            steps = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            if steps:
                error.add_note(f"the last checkpoint is {steps[-1]}; go on with: rlx resume {folder}")
        raise


def clean(text: str) -> str:
    """Text of several lines, safe to print and without secrets."""
    return str(redact(safe_text(text, 200_000, keep_newlines=True)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _compact(group: ErrorGroup) -> list[str]:
    """Many problems, one line each; what does not fit is named by its place."""
    shown = group.problems if len(group.problems) < MOST_LINES else group.problems[: MOST_LINES - 2]
    lines = [f"[{group.code}] {len(group.problems)} problems"]
    for problem in shown:
        more = problem.hint or (f"expected {problem.expected}" if problem.expected else "")
        lines.append(
            f"  {f'{problem.where}: ' if problem.where else ''}{problem.what}{f' ({more})' if more else ''}"
        )
    rest = group.problems[len(shown) :]
    if rest:
        lines.append(
            f"  and {len(rest)} more: {', '.join(problem.where or problem.what for problem in rest)}"
        )
    return lines


def _fit(lines: list[str]) -> list[str]:
    shown = (
        lines
        if len(lines) <= MOST_LINES
        else [*lines[: MOST_LINES - 1], f"  … and {len(lines) - MOST_LINES + 1} lines"]
    )
    return [redact(safe_text(line, LONGEST_LINE)) for line in shown]


def _print(lines: list[str]) -> None:
    if not sys.stderr.isatty():
        sys.stderr.write("\n".join(lines) + "\n")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    for i, line in enumerate(lines):
        console.print(Text(line, style="bold red" if i == 0 else ""))
