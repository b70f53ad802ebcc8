"""What ``rlx run`` and ``rlx check`` do: flags and a config file become a run. No typer here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.core.arguments import parse_arguments
from rlx.core.commands.failure import crash_report
from rlx.core.errors import ConfigError

if TYPE_CHECKING:
    from rlx.core.config import RunConfig
    from rlx.core.loop import Run

SWITCHES = ("--dry-run", "--print-config", "--help", "-h")


def train_or_check(words: list[str], *, dry_run: bool = False) -> None:
    """Read the words, check the config, and train unless something else is asked for.

    Args:
        words: everything after the verb.
        dry_run: check only.

    Raises:
        RlxError: whatever is wrong or stops the run.
    """
    switches = {word for word in words if word in SWITCHES}
    values, where, positional = parse_arguments([word for word in words if word not in SWITCHES])
    values, where = with_file(values, where, positional)
    if switches & {"--help", "-h"}:
        from rlx.core.help import print_panels, run_help

        print_panels(run_help(values, where), sys.stdout)
        return
    from rlx.core.config import from_mapping

    config = from_mapping(values, where)
    if "--print-config" in switches:
        print(config.to_yaml(), end="")
        return
    start(config, dry_run=dry_run or "--dry-run" in switches)


def with_file(
    values: dict[str, Any], where: dict[str, str], positional: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Flags over the config file, if one is named.

    Raises:
        ConfigError: more than one file is named, or the one that is cannot be read.
    """
    if not positional:
        return values, where
    if len(positional) > 1:
        raise ConfigError(
            "there is one config file",
            code="E-CONFIG-FLAG",
            got=" ".join(positional[:4]),
            hint="flags are written --name value; a value with spaces needs quotes",
        )
    from rlx.core.yaml_file import read_config

    from_file, places = read_config(positional[0])
    replaced = tuple(f"{name}{sign}" for name in values for sign in ".[")
    places = {path: place for path, place in places.items() if not path.startswith(replaced)}
    return {**from_file, **values}, {**places, **where}


def start(config: RunConfig, *, dry_run: bool) -> None:
    """Hand a checked config to the training stack, and say at the end what there is and what to do next.

    Args:
        config: the config.
        dry_run: print the plan, train nothing.
    """
    with crash_report(Path(config.settings.output_dir)):
        from rlx.core import plan
        from rlx.core.run import prepare
        from rlx.core.run import run as whole

        if dry_run:
            print(plan.show(whole(config, dry_run=True).plan))
            print("everything that can be checked without weights is in order; nothing was trained")
            return
        drive(prepare(config))


def drive(run: Run) -> None:
    """Print the plan, train, and say what came of it and what to type next."""
    from rlx.core import plan
    from rlx.core.run import train

    run.say(plan.show(run.plan))
    result = train(run)
    folder = shlex.quote(str(run.path))
    again = f"rlx run {folder}/config.yaml --seed 1 --output-dir {shlex.quote(f'{run.path}-seed-1')}"
    for line in (
        plan.summary(result.metrics) or f"done: {run.path}",
        f"look at it:       rlx show {folder}",
        f"load the policy:  see {run.path / 'README.md'}",
        f"another seed:     {again}",
    ):
        run.say(line)
