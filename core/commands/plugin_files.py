"""``rlx plugins new`` and ``rlx plugins schema``: what the plugins verb writes into files."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlx.core.errors import SaveError
from rlx.core.files import write_text
from rlx.core.text import safe_text
from rlx.plugins.contract import KINDS
from rlx.plugins.registry import registry


def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=", ".join(KINDS))],
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the component; the package is rlx-NAME")],
    path: Annotated[Path, typer.Option(help="folder that the package goes into")] = Path("."),
) -> None:
    """Write a package with one component that works, its tests and a README.

    Args:
        kind: of the component.
        name: its name.
        path: the folder that the package's folder goes into.

    Raises:
        ConfigError: an unknown kind, a name that does not fit or is taken, a folder that exists.
        SaveError: it cannot be written.
    """
    from rlx.core import scaffold

    names = scaffold.check_names(kind, name, registry())
    folder = scaffold.write(names, path)
    shown = safe_text(folder)
    print(f"{shown}: {len(scaffold.files(names))} files. Now type")
    lines = [f"cd {shlex.quote(shown)}", 'pip install --editable ".[test]"', "python -m pytest"]
    for line in (*lines, f"rlx plugins check {name} --kind {kind}", names.fill(scaffold.TRY[kind][0])):
        print(f"  {line}")
    print(f"The {kind} is in {names.module}/{kind}.py.")


def schema(
    output: Annotated[Path | None, typer.Option(help="file to write (default: print it)")] = None,
) -> None:
    """Print the JSON schema of run files: core options and those of every plugin that is installed.

    Args:
        output: the file to write.

    Raises:
        SaveError: it cannot be written.
    """
    from rlx.core.schema import run_schema

    def say(line: str) -> None:
        print(safe_text(line), file=sys.stderr)

    text = json.dumps(run_schema(registry(), say), indent=1)
    if output is None:
        print(text)
        return
    try:
        write_text(output, text + "\n")
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise SaveError(
            "the schema cannot be written", code="E-SAVE-FILE", where=safe_text(output), got=safe_text(error)
        ) from error
    print(f"{output}: name it in the first line of a run file:")
    print(f"  # yaml-language-server: $schema={output}")
