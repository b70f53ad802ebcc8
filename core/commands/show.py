"""``rlx show``: what a run folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rlx.core.errors import ConfigError
from rlx.core.text import safe_text

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# The numbers that tell most about a run, in the order in which they are shown, where it has them.
HEADLINE = (
    "loss",
    "reward",
    "reward/std",
    "kl",
    "entropy",
    "completion/length",
    "completion/eos_rate",
    "grad_norm",
)
LONGEST_FILE_LIST = 12


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the run folder")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What a run folder holds: last metrics, evaluation, checkpoints, plots."""
    found = summary(folder)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"run {safe_text(found['folder'])}")
    for name, value in found["config"].items():
        print(f"  {name:<14} {safe_text(value, 100)}")
    for title, numbers in (("first", found["first"]), ("last", found["last"])):
        if numbers:
            shown = "  ".join(f"{safe_text(name, 40)} {_number(value)}" for name, value in numbers.items())
            print(f"  {title:<14} {shown}")
    print(f"  checkpoint     {found['checkpoint'] or 'none'}")
    for problem in found["broken"]:
        print(f"  unusable       {problem}")
    print(f"  files          {', '.join(safe_text(name, 60) for name in found['files']) or 'none'}")


def summary(folder: Path) -> dict[str, Any]:
    """What there is to say about a run.

    Args:
        folder: the run folder.

    Returns:
        JSON values: folder, config (algo, model, dataset, reward), first and last metrics, checkpoint, broken
        checkpoints, files.

    Raises:
        ConfigError: it is no run folder.
    """
    from rlx.core.checkpoint import newest

    metrics = folder / "metrics.jsonl"
    if not folder.is_dir() or not (metrics.is_file() or (folder / "config.yaml").is_file()):
        raise ConfigError(
            f"{safe_text(folder)!r} is no run folder",
            code="E-CONFIG-FILE",
            expected="a folder with metrics.jsonl or config.yaml",
            hint="rlx show RUN_DIR",
        )
    lines = _lines(metrics)
    best, broken = newest(folder)
    files = sorted(
        path
        for path in folder.iterdir()
        if path.name != "plots" and not path.name.startswith(("checkpoint-", "."))
    )
    plots = sorted(path for path in (folder / "plots").glob("*.png"))
    return {
        "folder": str(folder),
        "config": _config(folder / "config.yaml"),
        "first": _headline(lines[0]) if lines else {},
        "last": _headline(_merged(lines)) if lines else {},
        "checkpoint": best.name if best else None,
        "broken": [f"{path.name}: {safe_text(reason)}" for path, reason in broken],
        "files": [path.name for path in files][:LONGEST_FILE_LIST] + [f"plots/{path.name}" for path in plots],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that a crash cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def _merged(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every metric: an evaluation may stand on a line of its own."""
    return {name: value for line in lines for name, value in line.items()}


def _headline(line: Mapping[str, Any]) -> dict[str, Any]:
    named = [name for name in HEADLINE if name in line]
    evaluated = [name for name in line if name in ("eval/reward", "eval/loss", "eval/rewards/accuracies")]
    return {name: line[name] for name in ("step", *evaluated, *named) if name in line}


def _config(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    from rlx.core.yaml_file import read_config

    values, _ = read_config(path)
    shown = {name: values[name] for name in ("algo", "model", "dataset", "reward") if values.get(name)}
    names = [item.get("name") if isinstance(item, Mapping) else item for item in shown.get("reward", [])]
    return {name: str(value) for name, value in shown.items() if name != "reward"} | (
        {"reward": ", ".join(map(str, names))} if names else {}
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else safe_text(value, 40)
