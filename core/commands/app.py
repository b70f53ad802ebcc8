"""The verbs as one typer application; a verb's module is imported when the verb is used."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

VERBS = {
    "run": "train: rlx run --algo ppo --reward exact_match, or rlx run config.yaml",
    "resume": "go on with a run from its newest checkpoint that verifies",
    "check": "check a config, its data and rewards, and print the plan; train nothing",
    "show": "what a run folder holds: last metrics, evaluation, checkpoints, plots",
    "compare": "which of two runs, models or files of completions answers better",
    "plugins": "what is installed, with its options; check, start or describe plugins of your own",
    "reward": "try a reward on texts or on a run's completions, or serve it over HTTP",
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


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback(
    epilog="rlx --version prints the version; --traceback, anywhere, Python's traceback of an error."
)
def rlx() -> None:
    """Reinforcement learning and preference optimisation of language models."""
