"""The JSON schema (draft 2020-12) of a run's YAML file, plugins included, for editors and CI.

It says what ``rlx check`` says of one value or one name: what is unknown, of the wrong type, out of bounds,
of another algorithm or component. What several options decide together is left to ``rlx check``.

Read with YAML 1.2, as editors do. A name that a reference brings along (``./file.py:Attribute``) is not known
before the file is run: an algorithm given by reference leaves all names open, a component its own options.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlx.core.components import config_class, short_name
from rlx.core.config import LISTS
from rlx.core.errors import PluginError
from rlx.core.options import FALSE, MISSING, TRUE, Option, options
from rlx.core.settings import READ_BY, Settings
from rlx.plugins.contract import KINDS
from rlx.plugins.registry import Entry, Registry

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE: Schema = {"type": "string", "pattern": ".:."}  # module:Attribute, ./file.py:Attribute
WHOLE = r"[0-9](_?[0-9])*"
INT = rf"{WHOLE}(\.0*)?([eE]\+?[0-9]+)?"
FLOAT = rf"({WHOLE}\.?|{WHOLE}\.{WHOLE}|\.{WHOLE})([eE][+-]?[0-9]+)?"
NONE: Schema = {"pattern": "^([nN][oO][nN][eE]|[nN][uU][lL][lL])$", "type": ["null", "string"]}


@dataclass(frozen=True)
class Found:
    """A registered component with its options, None where they cannot be read."""

    entry: Entry
    own: dict[str, Option] | None


def run_schema(registry: Registry, say: Callable[[str], None]) -> Schema:
    """The schema of a run's file: core options, and those of every registered component.

    Args:
        registry: the components.
        say: takes a line about each component that does not load; its options are left open.

    Returns:
        The schema, plain JSON data.
    """
    return Writer(registry, say).schema()


class Writer:
    """Writes one schema; what is said in several places stands once, under ``$defs``."""

    def __init__(self, registry: Registry, say: Callable[[str], None]) -> None:
        self.registry = registry
        self.say = say
        self.core = options(Settings)
        self.found = {kind: self.components(kind) for kind in KINDS}

    def components(self, kind: str) -> dict[str, Found]:
        """What may be written → the component; of a name that several plugins offer only ``plugin/name``."""
        entries = self.registry.list(kind)
        names = [entry.name for entry in entries]
        found = {}
        for entry in entries:
            component = Found(entry, self.options_of(entry))
            if names.count(entry.name) == 1:
                found[entry.name] = component
            found[entry.qualified] = component
        return found

    def options_of(self, entry: Entry) -> dict[str, Option] | None:
        """The options of a component; None for one that does not load, and for a class without Config."""
        try:
            component = self.registry.get(entry.kind, entry.qualified)
            if isinstance(component, type) and not hasattr(component, "Config"):
                return None  # its constructor takes them
            return options(config_class(component, f"{entry.kind} {entry.name}"))
        except PluginError as error:
            self.say(f"{entry.kind} {entry.qualified} does not load, its options are left open: {error.what}")
            return None

    def schema(self) -> Schema:
        """All of it."""
        properties = {name: self.core_option(o) for name, o in self.core.items() if name not in READ_BY}
        definitions = {kind: self.component(kind) for kind in KINDS if kind != "algorithm"}
        definitions["share"] = self.component("dataset", {"fraction": number(float, gt=0, le=1)})
        return {
            "$schema": DRAFT,
            "title": "rlx run file",
            "type": "object",
            "properties": properties,
            "allOf": [*self.algorithms(), self.dotted()],
            "unevaluatedProperties": False,
            "$defs": definitions,
        }

    def core_option(self, option: Option) -> Schema:
        """A core option; one that names components takes what is registered, or a reference."""
        if option.name == "algo":
            return described(option, either({"enum": list(self.found["algorithm"])}, REFERENCE))
        if option.name in LISTS.values():
            one = {"$ref": f"#/$defs/{option.name}"}
            many: Schema = {"type": "array", "items": one}
            if not isinstance(option.default, list):  # there is one generator
                many |= {"minItems": 1, "maxItems": 1}
            return described(option, either(one, many, *([NONE] if option.default is None else [])))
        if option.name in ("dataset", "eval_dataset"):
            share = {"if": {"required": ["name", "fraction"]}, "then": {"$ref": "#/$defs/share"}}
            rows = {"type": "array", "minItems": 1, "items": {"type": "object", **share}}
            nothing = [NONE] if option.default is None else []
            return described(option, either({"$ref": "#/$defs/dataset"}, rows, *nothing))
        return option_schema(option)

    def component(self, kind: str, beside: Schema | None = None) -> Schema:
        """One component of a kind: a name, a reference, or a mapping of name and options.

        Args:
            kind: its kind.
            beside: keys of the mapping that are no options of the component.
        """
        found = self.found[kind]
        # A data set may be a file, a folder or a hub id as well.
        written = {"type": "string", "minLength": 1} if kind == "dataset" else either(names(found), REFERENCE)
        if kind == "dataset":
            beside = {"split": {"type": "string"}, "config": {"type": "string"}, **(beside or {})}
        if kind == "reward":
            beside = {"weight": {"description": "its factor in the sum", **number(float)}}
        rules: list[Schema] = [
            {
                "if": {"properties": {"name": {"const": name}}},
                "then": {"properties": {key: option_schema(option) for key, option in one.own.items()}},
            }
            for name, one in found.items()
            if one.own
        ]
        open_ = either(REFERENCE, names(name for name, one in found.items() if one.own is None))
        rules.append({"if": {"properties": {"name": open_}}, "then": {"additionalProperties": True}})
        mapping: Schema = {
            "type": "object",
            "required": ["name"],
            "properties": {"name": written, **(beside or {})},
            "allOf": rules,
            "unevaluatedProperties": False,
        }
        return either(written, mapping)

    def algorithms(self) -> list[Schema]:
        """For each algorithm, what its name brings along."""
        rules: list[Schema] = []
        for name, one in self.found["algorithm"].items():
            chosen: Schema = {"properties": {"algo": {"const": name}}}
            if name != self.core["algo"].default:
                chosen["required"] = ["algo"]
            rules.append({"if": chosen, "then": self.brought(one)})
        reference = {"required": ["algo"], "properties": {"algo": REFERENCE}}
        return [*rules, {"if": reference, "then": {"additionalProperties": True}}]

    def brought(self, one: Found) -> Schema:
        """An algorithm's options, its own defaults of core options, and the data options that it reads."""
        if one.own is None:
            return {"additionalProperties": True}
        algorithm = self.registry.get("algorithm", one.entry.qualified)
        out: Schema = {name: self.own_option(option) for name, option in one.own.items()}
        for name, eats in READ_BY.items():
            default = algorithm.defaults.get(name, self.core[name].default)
            # A config that was written out names every option: the default is no mistake.
            out[name] = option_schema(self.core[name]) if algorithm.eats in eats else {"enum": [default]}
        if not algorithm.judged:
            out["judge"] = NONE
        for name, value in algorithm.defaults.items():
            out[name] = {**out.get(name, {}), "default": jsonable(value)}
        return {"properties": out}

    def own_option(self, option: Option) -> Schema:
        """An algorithm's option; one that takes anything and is called after a kind names a component."""
        if option.name in KINDS and option.type is Any:
            nothing = [NONE] if option.default is None else []
            return described(option, either({"$ref": f"#/$defs/{option.name}"}, *nothing))
        return option_schema(option)

    def dotted(self) -> Schema:
        """Options written ``length.target: 50``; the component that they belong to has to be chosen."""
        owners: dict[str, list[tuple[str, str, dict[str, Option]]]] = {}
        for kind, option in LISTS.items():
            for name, one in self.found[kind].items():
                if one.own:
                    short = short_name(kind, name).replace("-", "_")
                    owners.setdefault(short, []).append((option, name, one.own))
        properties: dict[str, list[Schema]] = {}
        needs: Schema = {}
        for short, found in owners.items():
            chosen = either(*(self.chosen(option, {"const": name}) for option, name, _ in found))
            for *_, own in found:
                for key, declared in own.items():
                    schemas = properties.setdefault(f"{short}.{key}", [])
                    schemas += [each for each in [option_schema(declared)] if each not in schemas]
                    needs[f"{short}.{key}"] = chosen
        known = "|".join(sorted(map(re.escape, owners)))
        # A second length is called length_2; what a reference brings is called after its last part.
        others = rf"^(?!(?:{known})\.)[^.]+\..+$"
        references = either(*(self.chosen(option, REFERENCE) for option in LISTS.values()))
        unloaded = (name for kind in LISTS for name, one in self.found[kind].items() if one.own is None)
        shorts = "|".join([known, *sorted({re.escape(name.rpartition("/")[2]) for name in unloaded})])
        return {
            "properties": {key: either(*schemas) for key, schemas in properties.items()},
            "patternProperties": {others: True},
            "dependentSchemas": needs,
            "if": {"not": references},
            "then": {"propertyNames": {"pattern": rf"^(?:[^.]+|(?:{shorts})(?:_[0-9]+)?\..+)$"}},
        }

    def chosen(self, option: str, written: Schema) -> Schema:
        """A file that has a certain component under an option, or leaves it out where it is the default."""
        one = either(written, {"type": "object", "required": ["name"], "properties": {"name": written}})
        there = {
            "required": [option],
            "properties": {option: either(one, {"type": "array", "contains": one})},
        }
        absent = {"not": {"required": [option]}}
        is_default = "const" in written and written["const"] == self.core[option].default
        return either(there, absent) if is_default else there


def either(*schemas: Schema) -> Schema:
    """Any of the schemas; those of no names at all are left out."""
    left = [schema for schema in schemas if schema.get("enum") != []]
    return left[0] if len(left) == 1 else {"anyOf": left}


def names(found: Iterable[str]) -> Schema:
    """One of the names."""
    return {"enum": list(found)}


def option_schema(option: Option) -> Schema:
    """One option: its type, bounds and choices, what it means, and its default."""
    return described(option, of_type(option.type, option))


def described(option: Option, schema: Schema) -> Schema:
    """A schema with the option's doc, default, unit and source."""
    out = {**schema, "description": option.doc}
    if option.default is not MISSING:
        out["default"] = jsonable(option.default)
    return out | {f"x-{name}": text for name in ("unit", "source") if (text := getattr(option, name))}


def of_type(annotation: Any, option: Option) -> Schema:
    """What a value of a type may be in a file: what ``rlx.core.options.parse`` takes."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return NONE
    if origin in (types.UnionType, typing.Union):
        return either(*(of_type(arg, option) for arg in args))
    if origin in (list, tuple):
        one = of_type(args[0], option)
        return either(one, {"type": "array", "items": one}, *joined(args[0], option))
    if origin is dict:
        return {"type": "object", "additionalProperties": of_type(args[1], option)}
    if origin is typing.Literal:
        rest = names(value for value in args if not isinstance(value, bool))
        return rest if len(rest["enum"]) == len(args) else either(of_type(bool, option), rest)
    if annotation is bool:
        words = "|".join("".join(f"[{c}{c.upper()}]" for c in word) for word in TRUE + FALSE)
        return either({"type": "boolean"}, {"enum": [0, 1]}, {"type": "string", "pattern": f"^({words})$"})
    if annotation in (int, float):
        if option.choices:
            return names(option.choices)
        return number(annotation, gt=option.gt, ge=option.ge, lt=option.lt, le=option.le)
    if annotation is str:
        return names(option.choices) if option.choices else {"type": ["string", "number"]}
    return {"type": "object"} if annotation is dict else {}


def joined(item: Any, option: Option) -> list[Schema]:
    """Several values in one text, with commas between them, where a list may be written so."""
    body = {int: f"[+-]?{INT}", float: f"[+-]?{FLOAT}"}.get(
        item, "|".join(map(re.escape, map(str, option.choices)))
    )
    if not body or (item is str and not option.commas):
        return []
    return [{"type": "string", "pattern": f"^(({body})( *, *({body}))*)?$"}]


def number(
    kind: type,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Schema:
    """A number within bounds, or text that reads as one, as readers of YAML 1.1 make of ``1e-4``.

    Of text the sign alone can be checked.
    """
    bounds = {"exclusiveMinimum": gt, "minimum": ge, "exclusiveMaximum": lt, "maximum": le}
    sign = r"\+?" if (gt is not None and gt >= 0) or (ge is not None and ge >= 0) else "[+-]?"
    return either(
        {"type": "integer" if kind is int else "number"}
        | {word: bound for word, bound in bounds.items() if bound is not None},
        {"type": "string", "pattern": f"^{sign}({INT if kind is int else FLOAT})$"},
    )


def jsonable(value: Any) -> Any:
    """A default as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple | frozenset) else value
