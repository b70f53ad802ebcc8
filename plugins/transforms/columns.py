"""Columns: find the one that holds the prompt, rename, join, drop duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlx.core.options import opt
from rlx.plugins.contract import Transform
from rlx.plugins.transforms import BadRow
from rlx.plugins.transforms.chat import standard_messages

Row = dict[str, Any]

# Where a prompt is looked for, the first that is there; the same order whatever order the columns come in.
TEXT_COLUMNS = ("prompt", "question", "instruction", "query", "problem", "input")
CHAT_COLUMNS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Format:
    """What kind of rows these are.

    Attributes:
        name: ``prompt`` (text or messages in one column), ``instruction`` (Alpaca's two columns) or
            ``conversation`` (whole dialogues).
        columns: wanted column → column that holds it.
    """

    name: str
    columns: dict[str, str]


def detect(columns: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> Format | None:
    """The format of rows, from the names of their columns and the types in the first of them.

    Args:
        columns: names of the columns.
        rows: rows; only the first eight are looked at, and only to pass over columns of numbers and the like.

    Returns:
        The format, or None where no column looks like a prompt.
    """
    usable = {column for column in columns if _holds_text(column, rows)}
    if "prompt" not in usable and {"instruction", "input"} <= usable:
        return Format("instruction", {"instruction": "instruction", "input": "input"})
    for column in TEXT_COLUMNS:
        if column in usable:
            return Format("prompt", {"prompt": column})
    for column in CHAT_COLUMNS:
        if column in usable:
            return Format("conversation", {"messages": column})
    return None


def _holds_text(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    values = [row.get(column) for row in islice(rows, 8)]
    return all(value is None or isinstance(value, str | list) for value in values) or any(
        isinstance(value, str | list) for value in values
    )


class ColumnMap(Transform):
    """Copies columns under the names that are wanted; the old names stay."""

    @dataclass(frozen=True)
    class Config:
        """Which columns."""

        columns: dict[str, str] = opt({}, "wanted=found, the new name and the old")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = frozenset(config.columns.values())  # type: ignore[misc]  # known only with the options
        self.gives = frozenset(config.columns)  # type: ignore[misc]

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Rows with the new columns; a row without the old one gets None."""
        pairs = self.config.columns.items()
        return [{**row, **{wanted: row.get(found) for wanted, found in pairs}} for row in rows]


class InstructionPrompt(Transform):
    """Alpaca's ``instruction`` and ``input`` as one prompt, a blank line between them."""

    takes = frozenset({"instruction", "input"})
    gives = frozenset({"prompt"})

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Rows with ``prompt``."""
        return [{**row, "prompt": self._joined(row)} for row in rows]

    def _joined(self, row: Row) -> str:
        for column in ("instruction", "input"):
            if not isinstance(row.get(column), str) and (
                column == "instruction" or row.get(column) is not None
            ):
                raise BadRow(f"{column} is {type(row.get(column)).__name__}, not text")
        return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])


class AlpacaMessages(Transform):
    """Alpaca's ``instruction``, ``input`` and ``output`` as ``messages`` of a user and an assistant turn.

    Text in a column ``system`` is the first message.
    """

    takes = frozenset({"instruction", "output"})
    gives = frozenset({"messages"})

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Rows with ``messages``."""
        prompts = InstructionPrompt(InstructionPrompt.Config())(rows)
        out = []
        for row in prompts:
            if not isinstance(row.get("output"), str):
                raise BadRow(f"output is {type(row.get('output')).__name__}, not text")
            turns = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["output"]},
            ]
            rest = {name: value for name, value in row.items() if name != "prompt"}
            out.append({**rest, "messages": standard_messages({**row, "messages": turns}, "messages")})
        return out


class DropDuplicates(Transform):
    """Keeps the first row of each prompt, or of what other columns hold together."""

    @dataclass(frozen=True)
    class Config:
        """What makes two rows the same."""

        columns: list[str] = opt(["prompt"], "rows that are equal in all of these are copies", commas=True)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = frozenset(config.columns)  # type: ignore[misc]  # known only with the options

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Rows that did not occur before."""
        first: dict[str, Row] = {}
        for row in rows:
            first.setdefault(repr([row.get(column) for column in self.config.columns]), row)
        return list(first.values())
