"""The command line: which verb is which module, and how a command ends.

A verb's module is imported when the verb is used; none of them imports torch before it must. Every way out
goes through ``main``: errors become lines on stderr and an exit code, a closed pipe is no error.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlx.core.commands.failure import failed
from rlx.core.commands.streams import unbreakable

VERBS = {
    "run": "train: rlx run --algo ppo --reward exact_match, or rlx run config.yaml",
    "resume": "go on with a run from its newest checkpoint that verifies",
    "check": "check a config, its data and rewards, and print the plan; train nothing",
    "show": "what a run folder holds: last metrics, evaluation, checkpoints, plots",
    "plugins": "what is installed: components, their options, broken plugins",
    "reward": "try a reward on a text",
    "doctor": "versions, devices, memory, disk and plugins, for a report",
}


class Verbs(TyperGroup):
    """The verbs, imported one at a time."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All verbs, in the order of use."""
        return list(VERBS)

    def get_command(self, ctx: Any, name: str) -> Any:
        """The command behind a verb; None for an unknown one."""
        if name not in VERBS:
            return None
        command = typer.main.get_command(importlib.import_module(f"rlx.core.commands.{name}").app)
        command.name, command.short_help = name, VERBS[name]
        return command


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rlx {version('rlx')}")
        raise typer.Exit


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback(
    epilog="--traceback, anywhere, shows Python's traceback of an error. Exit codes: docs/exit-codes.md."
)
def rlx(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Reinforcement learning and preference optimisation of language models."""


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
        code = app(args=words, prog_name="rlx", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return failed(error, traceback=traceback)
    return code if isinstance(code, int) else 0
