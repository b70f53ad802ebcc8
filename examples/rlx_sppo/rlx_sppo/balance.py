"""As many rows of each value of a column, so that no sort of prompt outweighs the others."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import rlx


class Balance(rlx.Transform):
    """Keeps the first rows of each value, as many as the rarest one has, in the order of the data."""

    @dataclass(frozen=True)
    class Config:
        """Options of balance."""

        column: str = rlx.opt(doc="the column whose values are balanced")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = frozenset({config.column})

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
        """The rows that stay."""
        sizes = Counter(str(row[self.config.column]) for row in rows)
        kept, seen = [], Counter()
        for row in rows:
            value = str(row[self.config.column])
            seen[value] += 1
            if seen[value] <= min(sizes.values()):
                kept.append(row)
        return kept
