"""Where every command begins and ends: an error becomes lines and an exit code, a closed pipe is none.

Nothing here imports torch, and what needs no typer does not import that either: config errors come at once.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

from rlx.core.commands.failure import failed
from rlx.core.commands.streams import unbreakable


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``rlx``; default: the process's own.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if argv is None:
        unbreakable()
    try:
        code = dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return failed(error, traceback=traceback)
    return code


def dispatch(words: list[str]) -> int:
    """Hand the words to their verb.

    Args:
        words: the words after ``rlx``.

    Returns:
        The exit code of typer for what it handles itself, 0 for what ends without an error.
    """
    if words[:1] == ["--version"]:
        print(f"rlx {version('rlx')}")
        return 0
    if words[:1] in (["run"], ["check"]):
        from rlx.core.commands.train import train_or_check

        train_or_check(words[1:], dry_run=words[0] == "check")
        return 0
    from typer import BadParameter, Exit

    from rlx.core.commands.app import app

    # Click's base of all usage errors; typer has its own copy of click, or not, depending on its version.
    usage_error: type[Any] = next(kind for kind in BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        code = app(args=words, prog_name="rlx", standalone_mode=False)
    except Exit as leaving:
        if isinstance(leaving.__cause__, KeyboardInterrupt):  # typer's wrapping
            raise leaving.__cause__ from None
        return int(leaving.exit_code)
    except usage_error as wrong:
        wrong.show()
        return int(wrong.exit_code)
    return code if isinstance(code, int) else 0
