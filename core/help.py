"""``rlx run --help``: every option in panels, for the algorithm and the components that were chosen.

All of it comes from the declarations (``rlx.core.options``); the defaults shown are those that the run
would have, with their source. Nothing here imports torch.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from rlx.core.arguments import switch_words
from rlx.core.components import REFERENCE_OFF, short_name
from rlx.core.config import Draft
from rlx.core.options import MISSING, Option, is_list, options, type_name
from rlx.core.settings import READ_BY, Settings
from rlx.core.text import safe_text

USAGE = """\
rlx run [CONFIG.yaml] [--option value …]

Train. Options come from the file, then from flags; --algo NAME --help shows the options of an algorithm.

  rlx run --algo ppo --reward exact_match
  rlx run config.yaml --learning-rate 1e-5 --output-dir runs/second
"""
SWITCHES = (
    ("--dry-run", "check everything that can be checked without weights, print the plan, train nothing"),
    ("--print-config", "print the resolved config as YAML, train nothing"),
    ("--traceback", "show Python's traceback of an error"),
    ("--help", "this page; with --algo, --reward … also their options"),
)
# Core options that mean something only for some algorithms.
SAMPLED = frozenset(
    "reward reward_weight reward_on_error reward_error_value judge generator generation_dtype".split()
)
VALUED = frozenset(("value_model", "value_learning_rate"))
REFERRED = frozenset(
    "reference_model reference_adapter sync_ref_model ref_model_mixup_alpha ref_model_sync_steps "
    "precompute_ref_log_probs".split()
)


@dataclass(frozen=True)
class Row:
    """One option as the page shows it.

    Attributes:
        flag: ``--learning-rate NUMBER``.
        doc: what it does.
        facts: default and its source, bounds, choices, unit, paper.
    """

    flag: str
    doc: str
    facts: str


@dataclass(frozen=True)
class Panel:
    """Options under one heading."""

    title: str
    rows: list[Row]


def run_help(values: Mapping[str, Any], where: Mapping[str, str]) -> list[Panel]:
    """The panels for what was chosen so far.

    Args:
        values: options that were given beside ``--help``.
        where: where they were given.

    Returns:
        Core panels, then the algorithm's, then one for each chosen component with options.

    Raises:
        ConfigError: an algorithm or component that does not exist.
        PluginError: one that does not load.
    """
    draft = Draft(values, where)
    draft.load_plugins()
    _, algorithm = draft.find_algorithm()
    specs = draft.find_components()
    draft.stop_if_wrong()
    hidden = _hidden(algorithm) if "algo" in draft.given else frozenset()
    core = [option for name, option in options(Settings).items() if name not in hidden]
    panels = [
        Panel(title, [_row(option, draft) for option in core if option.panel == title])
        for title in dict.fromkeys(option.panel for option in core)
    ]
    name = short_name("algorithm", draft.given.get("algo", draft.core["algo"].default))
    title = f"Algorithm {safe_text(name, 60)}" + (
        "" if "algo" in draft.given else " (the default; choose with --algo)"
    )
    panels.append(Panel(title, [_row(option, draft) for option in draft.own.values()]))
    for spec in specs:
        config = draft.config_of(spec)
        if config is not None and options(config):
            prefix = f"{safe_text(spec.name, 60)}."
            rows = [_row(option, None, prefix) for option in options(config).values()]
            panels.append(Panel(f"{spec.kind.capitalize()} {prefix[:-1]}", rows))
    return [panel for panel in panels if panel.rows]


def _hidden(algorithm: Any) -> frozenset[str]:
    """Core options that do nothing for this algorithm, whatever its own options are."""
    hidden = frozenset(name for name, eaters in READ_BY.items() if algorithm.eats not in eaters)
    if algorithm.eats != "prompts":
        hidden |= SAMPLED | {name for name, option in options(Settings).items() if option.panel == "Sampling"}
    own = options(algorithm.Config)
    if any(option.default is MISSING for option in own.values()):
        return hidden  # what it needs is known only with its options
    needs = algorithm(algorithm.Config()).needs
    refers = needs & {"reference", "kl"} or any(
        name in own and own[name].default == off for name, off in REFERENCE_OFF.items()
    )
    return hidden | (frozenset() if "values" in needs else VALUED) | (frozenset() if refers else REFERRED)


def _row(option: Option, draft: Draft | None, prefix: str = "") -> Row:
    switch = "[no-]" if switch_words(option) and not prefix else ""
    flag = f"--{switch}{prefix}{option.name}".replace("_", "-")
    kind = _metavar(option)
    default, source = option.default, ""
    if draft is not None and option.name in draft.defaults:
        default, source = draft.defaults[option.name]
    facts = []
    if default is MISSING:
        facts.append("required")
    elif default is not False and default not in (None, "", [], {}):
        facts.append(f"default {_shown(default)}{f' ({source})' if source else ''}")
    if option.choices:
        facts.append(f"one of {', '.join(map(str, option.choices))}")
    facts += [fact for fact in (option.bounds, option.unit) if fact]
    if is_list(option) and "repeated" not in option.doc:
        facts.append("may be repeated")
    facts += [option.source] if option.source else []
    return Row(f"{flag} {kind}".rstrip(), option.doc, "; ".join(facts))


def _metavar(option: Option) -> str:
    words = {
        "true or false": "",
        "whole number": "INT",
        "number": "FLOAT",
        "text": "TEXT",
        "mapping": "WANTED=FOUND",
    }
    if typing.get_origin(option.type) is typing.Literal:
        values = type_name(option.type).replace(" ", "")
        return f"[{values}]" if switch_words(option) else values
    name = type_name(option.type).removesuffix(" or none").removeprefix("list of ")
    return words.get(name, "VALUE")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else safe_text(value, 60)


def print_panels(panels: list[Panel], stream: TextIO) -> None:
    """The page: panels with rules and colour on a terminal, plain text elsewhere.

    Args:
        panels: from ``run_help``.
        stream: where to.
    """
    if stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        _print_rich(panels, stream)
        return
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    lines = [USAGE]
    lines += [f"  {flag:<24}  {doc}" for flag, doc in SWITCHES]
    for panel in panels:
        lines += ["", panel.title]
        for row in panel.rows:
            lines.append(f"  {row.flag}")
            for text in filter(None, (row.doc, row.facts)):
                lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    stream.write("\n".join(lines) + "\n")


def _print_rich(panels: list[Panel], stream: TextIO) -> None:
    from rich.console import Console
    from rich.panel import Panel as Box
    from rich.table import Table
    from rich.text import Text

    columns = shutil.get_terminal_size((100, 24)).columns
    console = Console(file=stream, highlight=False, markup=False, emoji=False, width=max(60, columns))
    console.print(USAGE)
    switches = Panel("Switches", [Row(flag, doc, "") for flag, doc in SWITCHES])
    for panel in (switches, *panels):
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(ratio=2, overflow="fold")
        table.add_column(ratio=3, overflow="fold")
        for row in panel.rows:
            doc = Text(row.doc)
            if row.facts:
                doc.append(f"\n{row.facts}", style="dim")
            table.add_row(Text(row.flag, style="bold cyan"), doc)
        console.print(Box(table, title=Text(panel.title), title_align="left", border_style="dim"))
