"""json_valid: 1 where a completion is JSON, of a given form if one is asked for, else 0."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Reward

LONGEST = 100_000  # characters; a longer text is taken for no JSON, so that a hostile one costs little

_TYPES: dict[str, tuple[type, ...]] = {
    "any": (object,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_FENCED = re.compile(r"\A\s*```(?:json)?[ \t]*\n(.*)\n[ \t]*```\s*\Z", re.DOTALL)


class JsonValid(Reward):
    """1.0 where the whole completion is one JSON value (RFC 8259), 0.0 where it is not.

    ``NaN`` and ``Infinity`` are no JSON; neither is a text of more than 100,000 characters or of arrays and
    objects deeper in each other than ``depth``. With ``keys`` it must be an object that has them.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of json_valid."""

        keys: list[str] = opt(
            [],
            "keys that the object must have: name, or name:type with a type of JSON Schema (string, number, "
            "integer, boolean, array, object, null); repeat the flag",
        )
        only: bool = opt(False, "other keys make it wrong")
        fenced: bool = opt(False, "the JSON may stand in a ```json block that is all of the completion")
        depth: int = opt(64, "most arrays and objects in each other", ge=1, le=200)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._keys: dict[str, str] = {}
        for key in config.keys:
            name, colon, kind = key.rpartition(":")
            name, kind = (name, kind) if colon else (key, "any")
            if not name or kind not in _TYPES:
                raise ConfigError(
                    "an unfit key of reward 'json_valid'",
                    code="E-CONFIG-VALUE",
                    got=repr(key)[:80],
                    expected=f"name or name:type, the type one of {', '.join(_TYPES)}",
                )
            self._keys[name] = kind

    def __call__(self, *, completions: list[str], **columns: list[Any]) -> list[float]:
        """One score a completion."""
        return [float(self._fits(text)) for text in completions]

    def _fits(self, text: str) -> bool:
        block = _FENCED.match(text) if self.config.fenced and len(text) <= LONGEST else None
        text = block[1] if block else text
        if len(text) > LONGEST or nesting(text) > self.config.depth:
            return False
        try:
            # Only the form of numbers counts: a million digits need not become an int.
            value = json.loads(text, parse_constant=_refuse, parse_int=lambda _: 0, parse_float=lambda _: 0.0)
        except ValueError:
            return False
        if not self._keys and not self.config.only:
            return True
        return (
            isinstance(value, dict)
            and all(name in value and _is(value[name], kind) for name, kind in self._keys.items())
            and not (self.config.only and set(value) - set(self._keys))
        )


def nesting(text: str) -> int:
    """How many arrays and objects of a JSON text are open at once, at most; found without recursion."""
    depth = deepest = 0
    inside = escaped = False
    for char in text:
        if inside:
            inside = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            inside = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def _is(value: Any, kind: str) -> bool:
    # True is an int in Python, and is no number in JSON.
    return isinstance(value, _TYPES[kind]) and (not isinstance(value, bool) or kind in ("any", "boolean"))


def _refuse(literal: str) -> float:
    raise ValueError(f"{literal} is no JSON")
