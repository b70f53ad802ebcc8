"""``rlx plugins list``, ``info`` and ``check``: what is installed, what failed to load, and every option.

Answers without torch: components are strings until one is asked about, and then its module is imported with
the heavy libraries deferred.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions, version
from typing import Annotated, Any

import typer

from rlx.core.commands.plugin_files import new, schema
from rlx.core.commands.plugins_check import check_plugin
from rlx.core.errors import ConfigError
from rlx.core.options import MISSING, Option, options, type_name
from rlx.core.text import safe_text
from rlx.plugins import loading
from rlx.plugins.contract import KINDS
from rlx.plugins.discovery import Broken
from rlx.plugins.kinds import kind_of
from rlx.plugins.references import config_of, resolve, spelt_out
from rlx.plugins.registry import Entry, Registry, registry

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="What is installed: components, their options, and plugins that failed to load.",
)
app.command("check")(check_plugin)
app.command("new")(new)
app.command("schema")(schema)

Kind = Annotated[str | None, typer.Option("--kind", help=", ".join(KINDS))]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Row = tuple[str, ...]


@app.command("list")
def list_plugins(kind: Kind = None, as_json: Json = False) -> None:
    """List every component and plugin, with the plugins that failed to load and why.

    Args:
        kind: only this kind of component.
        as_json: print JSON.

    Raises:
        ConfigError: for an unknown kind.
    """
    found = registry()
    entries = found.list(kind)
    if as_json:
        print(json.dumps(_list_data(found, entries), indent=2))
        return
    twice = {
        (e.kind, e.name) for e in entries if sum((o.kind, o.name) == (e.kind, e.name) for o in entries) > 1
    }
    rows: list[Row] = []
    for entry in entries:
        name = entry.qualified if (entry.kind, entry.name) in twice else entry.name
        rows.append((entry.kind, name, _safe(entry.summary), f"{entry.distribution} {entry.version}".strip()))
    print(_table(("kind", "name", "summary", "from"), rows))
    if twice:
        print("\nA name that several plugins offer is written plugin/name.")
    plugins = [(p.name, f"{p.distribution} {p.version}".strip(), p.value) for p in found.plugins()]
    print("\n" + _table(("plugin", "distribution", "module"), plugins))
    if found.broken:
        broken = [
            (b.plugin.name, f"{b.plugin.distribution} {b.plugin.version}", b.reason)
            for b in found.broken.values()
        ]
        print("\n" + _table(("failed to load", "distribution", "reason"), broken))
        print("\nrlx plugins info NAME shows where one failed.")
    if found.blocked:
        names = ", ".join(plugin.name for plugin in found.blocked)
        print(f"\nNot loaded, because of --no-plugin or RLX_NO_PLUGINS: {names}")


@app.command("info")
def info(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND] REF",
            help="a registered name, plugin/name, module:Attribute, ./file.py:Attribute; before it its kind",
        ),
    ],
    kind: Kind = None,
    as_json: Json = False,
) -> None:
    """Show one component with its options, or why a plugin failed to load.

    Args:
        words: a reference or the name of a broken plugin, and before it the kind, where several have the
            name.
        kind: the same as a flag.
        as_json: print JSON.

    Raises:
        ConfigError: for a name that nothing has, or that several plugins offer.
        PluginError: for a component that does not load or is not usable.
    """
    *before, ref = words
    if len(before) > 1 or (before and kind not in (None, before[0])):
        raise ConfigError(
            "info shows one component",
            code="E-CONFIG-FLAG",
            got=safe_text(" ".join(words)),
            expected="[KIND] REF",
        )
    kind = before[0] if before else kind
    found = registry()
    found.list(kind)  # refuses an unknown kind
    ref, _ = spelt_out(kind or "reward", ref)  # the URL of a reward server, lora:DIR
    if ref in found.broken:
        described = [_broken_data(found.broken[ref])]
    elif ":" in ref:
        described = [_describe_reference(ref, kind)]
    else:
        kinds = (
            [kind] if kind else [k for k in KINDS if any(ref in (e.name, e.qualified) for e in found.list(k))]
        )
        if not kinds:
            raise found.unknown("component", ref, found.list())
        described = [_describe_entry(found.find(k, ref), found.get(k, ref)) for k in kinds]
    if as_json:
        print(json.dumps(described[0] if len(described) == 1 else described, indent=2, default=str))
    else:
        print("\n\n".join(_as_text(data) for data in described))


def _list_data(found: Registry, entries: Iterable[Entry]) -> dict[str, Any]:
    keys = ("kind", "name", "plugin", "distribution", "version", "summary")
    return {
        "components": [
            {**{key: getattr(entry, key) for key in keys}, "target": entry.address} for entry in entries
        ],
        "plugins": [vars(plugin) for plugin in found.plugins()],
        "broken": [_broken_data(broken) for broken in found.broken.values()],
        "blocked": [vars(plugin) for plugin in found.blocked],
    }


def _broken_data(broken: Broken) -> dict[str, Any]:
    return {**vars(broken.plugin), "reason": broken.reason, "traceback": broken.traceback}


def _describe_reference(ref: str, kind: str | None) -> dict[str, Any]:
    component = loading.load(ref)
    kind = kind or kind_of(component)
    return _describe(kind, resolve(kind, ref), {"name": ref, "target": ref, **_home(ref)})


def _home(ref: str) -> dict[str, str]:
    """The installed distribution that a reference to code leads to, and its version; nothing for a file."""
    module = ref.rpartition(":")[0]
    if module.endswith(".py"):
        return {}
    names = packages_distributions().get(module.partition(".")[0], [])
    return {"distribution": names[0], "version": version(names[0])} if names else {}


def _describe_entry(entry: Entry, component: Any) -> dict[str, Any]:
    keys = ("name", "summary", "plugin", "distribution", "version")
    return _describe(
        entry.kind, component, {**{key: getattr(entry, key) for key in keys}, "target": entry.address}
    )


def _describe(kind: str, component: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Everything about a component that can be known without building it."""
    config = config_of(component)
    # A kind has some of these, a function none; what a property computes from the options is not known yet.
    shown = (str, bool, tuple, frozenset, Mapping)
    traits = {n: v for n in TRAITS if isinstance(v := getattr(component, n, None), shown)}
    return {
        "kind": kind,
        **known,
        "file": loading.source(component),
        "doc": inspect.getdoc(component) or "",
        **{name: sorted(value) if isinstance(value, frozenset) else value for name, value in traits.items()},
        "options": [_option_data(option) for option in options(config).values()],
    }


# Class attributes worth showing: what an algorithm eats, which core defaults it changes, which columns are
# needed.
TRAITS = ("eats", "defaults", "columns", "takes", "gives", "observer")


def _option_data(option: Option) -> dict[str, Any]:
    data = {
        "name": option.name,
        "type": type_name(option.type),
        "default": option.default,
        "required": option.default is MISSING,
        "bounds": option.bounds,
        "choices": list(option.choices),
        "unit": option.unit,
        "source": option.source,
        "doc": option.doc,
    }
    return {key: value for key, value in data.items() if value is not MISSING}


def _as_text(data: dict[str, Any]) -> str:
    """One component or broken plugin as lines of text."""
    if "reason" in data:
        fields = _fields(data, ("distribution", "version", "value", "reason"))
        lines = [f"plugin {data['name']} failed to load", *fields, "", data["traceback"]]
        return safe_text("\n".join(lines).rstrip(), 20_000, keep_newlines=True)
    fields = _fields(data, ("summary", "target", "file", "plugin", "distribution", "version", *TRAITS))
    lines = [f"{data['kind']} {data['name']}", *fields]
    if data["doc"]:
        lines += ["", *(f"  {line}".rstrip() for line in data["doc"].splitlines())]
    lines += ["", "  options" if data["options"] else "  no options"]
    width = max((len(option["name"]) for option in data["options"]), default=0)
    for option in data["options"]:
        default = "required" if option["required"] else f"default {_value(option['default'])}"
        allowed = [option["bounds"], " | ".join(map(str, option["choices"])), option["unit"]]
        lines.append(
            f"    {option['name']:<{width}}  {', '.join(filter(None, [option['type'], default, *allowed]))}"
        )
        note = f" ({option['source']})" if option["source"] else ""
        lines.append(f"    {'':<{width}}  {option['doc']}{note}")
    return safe_text("\n".join(lines), 20_000, keep_newlines=True)


def _fields(data: dict[str, Any], names: Iterable[str]) -> list[str]:
    shown = {name: data[name] for name in names if data.get(name) not in (None, "", (), [], {})}
    return [f"  {name:<12}  {_value(value)}" for name, value in shown.items()]


def _value(value: Any) -> str:
    """A value as a user would write it in YAML."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "[]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _safe(text: str) -> str:
    return safe_text(text, 100)


def _table(head: Row, rows: Iterable[Row]) -> str:
    """Rows as aligned columns."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


for command in app.registered_commands:  # --help says what a command does, not what it raises
    command.help = (inspect.getdoc(command.callback) or "").partition("\n")[0]
