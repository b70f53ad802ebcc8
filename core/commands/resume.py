"""``rlx resume``: go on with a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from rlx.core.commands.failure import crash_report
from rlx.core.commands.train import drive
from rlx.core.errors import ConfigError
from rlx.core.fingerprints import ACCEPTED
from rlx.core.folder import read_manifest
from rlx.core.plain import Plain
from rlx.core.text import safe_text

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the run folder")],
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTION=VALUE",
            help="an option that may differ from before, may be repeated; data, or an option that names "
            "files, without a value: accept what is there now",
        ),
    ] = None,
) -> None:
    """Go on with a run from its newest checkpoint that verifies."""
    overrides = read_overrides(override or [])
    if not overrides and read_manifest(folder).get("status") == "finished":
        name = shlex.quote(safe_text(folder))
        print(f"{name} is finished; nothing is left to do")
        print(f"look at it:        rlx show {name}")
        if any(folder.glob("checkpoint-*")):
            print(f"train it further:  rlx resume {name} --override max_steps=N")
        else:
            flag = "--adapter" if (folder / "adapter_config.json").is_file() else "--model"
            print(f"train it further:  rlx run {flag} {name} …; it kept no checkpoint (save_steps)")
        return
    with crash_report(folder):
        from rlx.core.run import reopen

        drive(reopen(folder, overrides))


def read_overrides(words: list[str]) -> dict[str, Any]:
    """``option=value`` words as a mapping; ``data`` or ``model`` alone means True: accept what is there now.

    Args:
        words: as given to ``--override``.

    Raises:
        ConfigError: a word without a value.
    """
    out: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        name = name.replace("-", "_")
        if not sign and name not in ACCEPTED:
            raise ConfigError(
                f"--override {safe_text(word, 80)}: no value",
                code="E-CONFIG-FLAG",
                hint="--override option=value",
            )
        out[name] = Plain(value) if sign else True
    return out
