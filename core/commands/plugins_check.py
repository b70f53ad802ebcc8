"""``rlx plugins check``: the conformance cases of a component, in a table.

The component is loaded in another process first, so that an import that hangs, exits or crashes is told.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlx.core.commands.reward import pairs
from rlx.core.errors import PluginError, RlxError
from rlx.core.plain import Plain
from rlx.core.text import safe_text
from rlx.plugins.contract import KINDS
from rlx.testing import kit
from rlx.testing.kit import Outcome, cases, check, find
from rlx.testing.probe import SECONDS, load_elsewhere

FAILED = PluginError.exit_code


def check_plugin(
    ref: Annotated[
        str, typer.Argument(help="a registered name, plugin/name, module:Attribute, ./file.py:Attribute")
    ],
    kind: Annotated[str | None, typer.Option("--kind", help=", ".join(KINDS))] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="an option of it, may be repeated")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="CASE", help="run this case only, may be repeated")
    ] = None,
    slow: Annotated[bool, typer.Option("--slow", help="run the slow cases too")] = False,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="sample rows with the columns that it reads")
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="a core option of the runs that it is tried in, may be repeated"
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="seconds that importing it may take")] = SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check that a component keeps the contract of its kind: one line a case, exit code 4 if one failed."""
    from rlx.plugins.kinds import kind_of
    from rlx.plugins.references import spelt_out

    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # the models are small: threads would only wait for each other
    error, shown = load_elsewhere(ref, kind, timeout)
    if error is not None:
        if shown:
            print(safe_text(shown.rstrip(), 20_000, keep_newlines=True))
        raise error
    ref, held = spelt_out(kind or "reward", ref)  # the URL of a reward server, lora:DIR
    kind = kind or kind_of(ref)
    chosen = [find(kind, name) for name in only or ()] or cases(kind)
    given = _typed(ref, kind, held | dict(pairs("--option", option))) if option else held
    rows = _rows(data) if data else None
    width = max(len(one.name) for one in chosen)

    def told(outcome: Outcome) -> None:
        if not as_json:
            print(_line(outcome, width), flush=True)

    if not as_json:
        print(f"{kind} {safe_text(ref, 100)}\n")
    core = {name.replace("-", "_"): Plain(value) for name, value in pairs("--run", run).items()}
    outcomes = check(ref, kind, given, rows=rows, run=core, only=only or (), slow=slow, told=told)
    if as_json:
        print(json.dumps([_data(outcome) for outcome in outcomes], indent=2))
    else:
        print(_summary(outcomes))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(FAILED)


def _typed(ref: str, kind: str, given: Mapping[str, str]) -> dict[str, Any]:
    """The options with the types that the component's Config declares.

    Raises:
        ConfigError: an option that it does not have, or a value that is not allowed.
    """
    from rlx.core.components import check_spec, read_specs

    named = {"name": ref, **{name: Plain(value) for name, value in given.items()}}
    specs, _ = read_specs(kind, named, kind, {kind: "--option"})
    checked = check_spec(specs[0]).options
    return {name: value for name, value in checked.items() if name.replace("-", "_") in specs[0].given}


def _rows(source: str) -> Sequence[Mapping[str, Any]]:
    from rlx.core.rows import read_rows

    return read_rows(source, limit=64).rows


def _line(outcome: Outcome, width: int) -> str:
    note = f"  {safe_text(outcome.note, 160)}" if outcome.note else ""
    return f"{outcome.case:<{width}}  {outcome.status:<14}  {outcome.seconds:6.2f} s{note}".rstrip()


def _data(outcome: Outcome) -> dict[str, Any]:
    told = {name: getattr(outcome, name) for name in ("case", "status", "note")}
    return {**told, "seconds": round(outcome.seconds, 3), "traceback": _traceback(outcome)}


def _traceback(outcome: Outcome) -> str:
    """What a failed case says, and where the component raised, without the frames of the cases."""
    error = outcome.error
    if error is None:
        return ""
    if isinstance(error, RlxError):
        return str(error)
    own = isinstance(error, AssertionError)
    if own and error.__cause__ is None:
        return str(error)
    told = traceback.TracebackException.from_exception(error.__cause__ or error if own else error)
    cases_folder = str(Path(kit.__file__).parent)
    told.stack = traceback.StackSummary.from_list(
        [frame for frame in told.stack if not frame.filename.startswith(cases_folder)]
    )
    return "".join([f"{error}\n" if own else "", *told.format(chain=not own)])


def _summary(outcomes: Sequence[Outcome]) -> str:
    """What failed, in full, and how many cases ended in which way."""
    lines = []
    for outcome in outcomes:
        if outcome.status == "failed":
            text = safe_text(_traceback(outcome).rstrip(), 8_000, keep_newlines=True)
            lines += ["", f"{outcome.case}:", *(f"  {line}" for line in text.splitlines())]
    counts = {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in ("ok", "failed", "not applicable", "not run")
    }
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return "\n".join([*lines, "", f"{told}, in {sum(outcome.seconds for outcome in outcomes):.1f} s"])
