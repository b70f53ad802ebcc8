"""Read a YAML config: safely, strictly, and with the line and column of everything.

No object is ever constructed from a tag, aliases cannot blow up, a key stands once, and the file has a size
limit. Scalars without quotes stay text (``rlx.core.plain.Plain``) until the option that takes them says
what they are, so that ``1e-5`` is a number, a revision ``1e10`` stays text, and ``no`` is no accident.
Nothing is interpolated: a secret belongs into the environment variable that its reader names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlx.core.errors import ConfigError, RlxError
from rlx.core.plain import Plain
from rlx.core.text import safe_text

MAX_BYTES = 1 << 20
MAX_VALUES = 10_000  # after aliases are expanded
MAX_DEPTH = 32
_TAG = "tag:yaml.org,2002:"
_Loader = yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader


def read_config(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file and where each of its keys stands.

    Args:
        path: the file; messages show it as it was given.

    Returns:
        Values (mappings, lists, text, ``Plain`` when unquoted, True, False, None), and the place of each key
        and item: path (``reward[0].target``) → ``file:line:column``.

    Raises:
        ConfigError: missing, unreadable, too large, not UTF-8, not YAML, no mapping, a duplicate key, a tag.
    """
    return parse_config(_read_text(Path(path)), safe_text(path))


def parse_config(text: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Like ``read_config``, of text that was read already.

    Args:
        text: the YAML.
        name: what messages call it.

    Returns:
        Values and places; an empty text has none.

    Raises:
        ConfigError: as ``read_config``.
    """
    builder = _Builder(name)
    try:
        builder.check_size(text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _syntax_error(error, name) from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise builder.problem(node, "a config is a mapping", got=_kind(node), expected="key: value lines")
    values = builder.build(node, "", 0)
    return values, builder.where


def _read_text(path: Path) -> str:
    name = safe_text(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no config file {name!r}", code="E-CONFIG-FILE", hint="check the path"
        ) from None
    except IsADirectoryError:
        hint = (
            f"rlx resume {name}" if any(path.glob("checkpoint-*")) else f"give a file, as {name}/config.yaml"
        )
        raise ConfigError(
            f"{name!r} is a folder, not a config file", code="E-CONFIG-FILE", hint=hint
        ) from None
    except (OSError, ValueError) as error:  # no permission; a NUL byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"the config file {name!r} cannot be read: {reason}", code="E-CONFIG-FILE"
        ) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            "the config file is too large", code="E-CONFIG-FILE", where=name, expected="at most 1 MiB"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            "the config file is not UTF-8",
            code="E-CONFIG-FILE",
            where=f"{name}:{line}",
            got=f"byte 0x{raw[error.start]:02x}",
            hint="save it as UTF-8",
        ) from None


def _syntax_error(error: yaml.YAMLError, name: str) -> RlxError:
    """One line: where, and what is wrong there."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        where = f"{name}:{error.problem_mark.line + 1}:{error.problem_mark.column + 1}"
        problem = error.problem or "not YAML"
        if (
            problem.startswith("but ") and error.context
        ):  # "expected a single document", "but found another one"
            problem = f"{error.context}, {problem}"
        hint = ""
        if "cannot start any token" in problem:
            hint = "a tab or a special character: indent with spaces, put the value in quotes"
        return ConfigError(f"{where}: {safe_text(problem)}", code="E-CONFIG-YAML", hint=hint)
    if isinstance(error, yaml.reader.ReaderError):
        return ConfigError(
            f"{name}: a character that YAML does not allow", code="E-CONFIG-YAML", got=f"U+{_code(error):04X}"
        )
    return ConfigError(f"{name}: {safe_text(error)}", code="E-CONFIG-YAML")


def _code(error: yaml.reader.ReaderError) -> int:
    return error.character if isinstance(error.character, int) else ord(error.character)


def _kind(node: yaml.Node) -> str:
    names = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}
    return names[type(node)]


class _Builder:
    """Turns nodes into values, noting where each one stands and how many there are."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.where: dict[str, str] = {}
        self.count = 0

    def check_size(self, text: str) -> None:
        """Refuse deep nesting before composing: the composer recurses in C and would end the process."""
        depth = 0
        for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or count > 4 * MAX_VALUES:
                raise self.problem(event, "too many or too deeply nested values")

    def place(self, node: yaml.Node | yaml.Event) -> str:
        mark = node.start_mark
        assert mark is not None  # only nodes that were built by hand have none
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"

    def problem(
        self, node: yaml.Node | yaml.Event, what: str, *, got: str = "", expected: str = "", hint: str = ""
    ) -> ConfigError:
        return ConfigError(
            f"{self.place(node)}: {what}", code="E-CONFIG-YAML", got=got, expected=expected, hint=hint
        )

    def build(self, node: yaml.Node, path: str, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            # Also what an alias to itself ends in.
            raise self.problem(node, "too many or too deeply nested values", hint="aliases count expanded")
        if node.tag not in (f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map"):
            raise self.problem(
                node, f"tags are not allowed: {safe_text(node.tag, 80)}", hint="write a plain value"
            )
        if isinstance(node, yaml.ScalarNode):
            return _value(node)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, f"{path}[{i}]", depth) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)  # there is no fourth kind
        return self._mapping(node, path, depth)

    def _item(self, node: yaml.Node, path: str, depth: int) -> Any:
        self.where[path] = self.place(node)
        return self.build(node, path, depth + 1)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        first: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.problem(key_node, "a key is a single word", got=_kind(key_node))
            if key_node.value == "<<":
                raise self.problem(
                    key_node, "merge keys (<<) are not supported", hint="write the options out"
                )
            # learning-rate is the flag; the key is learning_rate, and both are the same option.
            key = key_node.value.replace("-", "_") if not path else key_node.value
            if key in first:
                line = first[key].start_mark.line + 1
                raise self.problem(key_node, f"duplicate key {safe_text(key, 80)!r}, first in line {line}")
            first[key] = key_node
            inner = f"{path}.{key}" if path else key
            self.where[inner] = self.place(key_node)
            out[key] = self.build(value_node, inner, depth + 1)
        return out


def _value(node: yaml.ScalarNode) -> Any:
    plain = node.style in (None, "")
    if not plain:
        return node.value
    text = node.value
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    return Plain(text)
