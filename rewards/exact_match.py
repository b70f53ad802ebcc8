r"""exact_match: 1 where the final answer of a completion is the one in the data, else 0.

The final answer is what ends the text: the rest of its last line after the last ``Answer:`` or ``####``, or
the content of ``\boxed{…}``. Text after the answer makes it wrong, so does a completion without any marker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Reward
from rlx.rewards.regex import compiled

# Characters at the end of a text that are searched: bounds the time that a hostile text can cost.
LONGEST = 2_000

# The greedy (?s:.*) finds the last marker; \A keeps the search from starting over at every character.
_FINAL = r"\A(?s:.*)(?:(?:Answer:|####)[ \t]*(\S[^\n]*)|\\boxed\{([^\n]*)\}[$.]*)\Z"
_NUMBER = re.compile(r"[-+]?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|[-+]?\$?\.[0-9]+")


class ExactMatch(Reward):
    r"""1.0 where the final answer equals the data's, 0.0 where it does not, None where the row has no answer.

    The last 2000 characters of a text, without white space around them, are searched for the answer. In the
    data's column the answer may stand alone (``18``, also as a number) or end a solution (``… #### 18``).
    """

    @dataclass(frozen=True)
    class Config:
        """Options of exact_match."""

        column: str = opt(
            "answer", "data-set column with the right answer, alone or at the end of a solution"
        )
        pattern: str | None = opt(
            None,
            "regular expression whose first group that took part is the answer, searched in the stripped "
            "text; by default what ends the text after the last 'Answer:' or '####', or inside \\boxed{…}",
        )
        bare: bool = opt(
            False, "take a completion in which the pattern is not found as an answer without marker"
        )
        ignore_case: bool = opt(True, "compare without regard to upper and lower case")
        numbers: bool = opt(True, "compare numbers by value: $1,000.00 equals 1000, and 5. equals 5")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.columns = (config.column,)
        self._pattern = compiled(config.pattern or _FINAL, "exact_match")
        if not self._pattern.groups:
            raise ConfigError(
                "the pattern of reward 'exact_match' has no group",
                code="E-CONFIG-VALUE",
                got=self._pattern.pattern[:80],
                expected=r"parentheses around the answer, as in 'Answer: (-?\d+)\s*$'",
            )

    def __call__(self, *, completions: list[str], **columns: list[Any]) -> list[float | None]:
        """One score a completion."""
        gold = columns[self.config.column]
        return [self._score(text, answer) for text, answer in zip(completions, gold, strict=True)]

    def _score(self, completion: str, answer: Any) -> float | None:
        right = "" if answer is None else str(answer).strip()
        if not right:
            return None
        given = self._extract(completion)
        if given is None and self.config.bare:
            given = completion.strip()
        if given is None:
            return 0.0
        return float(self._normal(given) == self._normal(self._extract(right) or right))

    def _extract(self, text: str) -> str | None:
        match = self._pattern.search(text.strip()[-LONGEST:])
        taken = [group for group in match.groups() if group is not None] if match else []
        return taken[0].strip() if taken else None

    def _normal(self, answer: str) -> str | Decimal:
        if self.config.numbers and _NUMBER.fullmatch(answer):
            return Decimal(answer.replace(",", "").replace("$", ""))
        return answer.casefold() if self.config.ignore_case else answer
