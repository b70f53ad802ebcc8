"""Choose rows by what is in a column, and cut long texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.core.text import safe_text
from rlx.plugins.contract import Transform
from rlx.plugins.transforms import BadRow

Row = dict[str, Any]

BROKEN = "\ufffd"  # what bytes decode to that are no whole character


def text_of(value: Any, column: str) -> str:
    """A column as text: text as it is, messages by their contents a line each, numbers as they are written.

    Raises:
        BadRow: for anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return "\n".join(str(turn.get("content") or "") for turn in value)
    raise BadRow(f"{column} is {type(value).__name__}, not text, messages or a number")


class Filter(Transform):
    """Keeps the rows whose column meets every condition that is set."""

    @dataclass(frozen=True)
    class Config:
        """The column, and the conditions on it."""

        column: str = opt("prompt", "column that is looked at")
        min_characters: int = opt(0, "shortest text kept", ge=0, unit="characters")
        max_characters: int | None = opt(None, "longest text kept", ge=0, unit="characters")
        matches: str | None = opt(None, "regular expression that occurs in the text")
        lacks: str | None = opt(None, "regular expression that does not occur in the text")
        equals: list[str] = opt([], "the text is one of these", commas=True)
        at_least: float | None = opt(None, "smallest number kept")
        at_most: float | None = opt(None, "largest number kept")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = frozenset({config.column})  # type: ignore[misc]  # known only with the options
        self.matches, self.lacks = (_compiled(pattern) for pattern in (config.matches, config.lacks))

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """The rows that meet the conditions."""
        return [row for row in rows if self._kept(row.get(self.config.column))]

    def _kept(self, value: Any) -> bool:
        config = self.config
        text = text_of(value, config.column)
        if len(text) < config.min_characters:
            return False
        if config.max_characters is not None and len(text) > config.max_characters:
            return False
        if (self.matches and not self.matches.search(text)) or (self.lacks and self.lacks.search(text)):
            return False
        if config.equals and text not in config.equals:
            return False
        if config.at_least is None and config.at_most is None:
            return True
        try:
            number = float(text)
        except ValueError as error:
            raise BadRow(f"{config.column} is no number") from error
        low = config.at_least is None or number >= config.at_least
        return low and (config.at_most is None or number <= config.at_most)


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            "a condition of transform filter is no regular expression",
            code="E-CONFIG-TYPE",
            got=f"{safe_text(pattern, 80)} ({safe_text(error, 80)})",
        ) from error


class Truncate(Transform):
    """Cuts a column of text to a number of tokens, before anything is rendered."""

    @dataclass(frozen=True)
    class Config:
        """What is cut, and where."""

        column: str = opt("prompt", "column of text")
        max_tokens: int = opt(512, "tokens left", gt=0, unit="tokens")
        side: str = opt(
            "right",
            "where a longer text is cut: at its end, at its start, or the row is left out",
            choices=("right", "left", "drop"),
        )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = frozenset({config.column})  # type: ignore[misc]  # known only with the options

    def __call__(self, rows: list[Row], tokenizer: Any) -> list[Row]:
        """The rows, none with more tokens in the column."""
        column, out = self.config.column, []
        for row in rows:
            if not isinstance(row.get(column), str):
                raise BadRow(f"{column} is {type(row.get(column)).__name__}, not text")
            ids = tokenizer(row[column], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) <= self.config.max_tokens:
                out.append(row)
            elif self.config.side != "drop":
                # A token may be a piece of a character: it decodes to a mark at the cut, and is left out.
                if self.config.side == "right":
                    kept = tokenizer.decode(ids[: self.config.max_tokens]).rstrip(BROKEN)
                else:
                    kept = tokenizer.decode(ids[-self.config.max_tokens :]).lstrip(BROKEN)
                out.append({**row, column: kept})
        return out
