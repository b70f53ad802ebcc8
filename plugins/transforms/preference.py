"""Preference data: cut whole dialogues into prompt and answers, and pairs into single answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlx.core.options import opt
from rlx.plugins.contract import Transform
from rlx.plugins.transforms import PLAIN, BadRow
from rlx.plugins.transforms.chat import shared_start, standard_messages

Row = dict[str, Any]
Messages = list[dict[str, Any]]


class ExtractPrompt(Transform):
    """The prompt of pairs that come as two whole dialogues: what both begin with.

    Nothing is lost or shifted: prompt + chosen is the chosen dialogue, prompt + rejected the rejected one.
    Where text is cut:

    * after the last ``marker`` that both have in common, where there is one;
    * else at the last place of the common part at which both go on with white space, or end: words stay
      whole, and a space stays with the word after it, as byte-level tokenizers have it.

    Messages are cut before the last turn at which both go on with an assistant's, the same one or not.
    Text that was cut this way is not put through a chat template: it has its own marks.
    """

    takes = frozenset({"chosen", "rejected"})
    gives = frozenset({"prompt", "chosen", "rejected"})

    @dataclass(frozen=True)
    class Config:
        """Where the prompt ends."""

        marker: str = opt("\n\nAssistant:", "text after which an answer begins; empty for none")

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Rows with ``prompt``, and ``chosen`` and ``rejected`` without it."""
        return [{**row, **self._extracted(row)} for row in rows]

    def _extracted(self, row: Row) -> Row:
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if isinstance(chosen, str) and isinstance(rejected, str):
            cut = text_cut(chosen, rejected, self.config.marker)
            return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:], PLAIN: True}
        chosen, rejected = standard_messages(row, "chosen"), standard_messages(row, "rejected")
        cut = message_cut(chosen, rejected)
        return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def text_cut(one: str, other: str, marker: str) -> int:
    """The length of the prompt that two dialogues share, by the rules of ``ExtractPrompt``."""
    shared = len(shared_start(one, other))
    if marker and (found := one.rfind(marker, 0, shared)) >= 0:
        return found + len(marker)

    def safe(place: int) -> bool:
        goes_on = [text[place] for text in (one, other) if place < len(text)]
        return not goes_on or (all(c.isspace() for c in goes_on) and not one[place - 1].isspace())

    return next((place for place in range(shared, 0, -1) if safe(place)), 0)


def message_cut(one: Messages, other: Messages) -> int:
    """How many turns two dialogues share as their prompt, by the rules of ``ExtractPrompt``."""
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    for place in range(min(shared, len(one) - 1, len(other) - 1), 0, -1):
        if one[place].get("role") == other[place].get("role") == "assistant":
            return place
    return shared


class Unpair(Transform):
    """Each pair as two rows: the chosen completion with label true, the rejected one with label false."""

    takes = frozenset({"chosen", "rejected"})
    gives = frozenset({"completion", "label"})

    def __call__(self, rows: list[Row], tokenizer: Any = None) -> list[Row]:
        """Twice the rows, with ``completion`` and ``label`` in the place of ``chosen`` and ``rejected``."""
        out = []
        for row in rows:
            rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
            for column, label in (("chosen", True), ("rejected", False)):
                if row.get(column) is None:
                    raise BadRow(f"{column} is missing")
                out.append({**rest, "completion": row[column], "label": label})
        return out
