"""contains: 1 where a completion contains the keywords, else 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Reward


class Contains(Reward):
    """1.0 where a completion contains any (or all) of the keywords, 0.0 where it does not."""

    @dataclass(frozen=True)
    class Config:
        """Options of contains."""

        keywords: list[str] = opt(
            doc="pieces of text to look for; 'cat' is found in 'concatenate' too; repeat the flag"
        )
        mode: str = opt("any", "how many of them must be there", choices=("any", "all"))
        ignore_case: bool = opt(True, "look for them without regard to upper and lower case")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.keywords or "" in config.keywords:
            raise ConfigError(
                "reward 'contains' needs keywords that are not empty",
                code="E-CONFIG-VALUE",
                got=repr(config.keywords)[:80],
                hint="repeat the flag: --contains.keywords yes --contains.keywords certainly",
            )
        self._keywords = [self._normal(keyword) for keyword in config.keywords]
        self._enough = all if config.mode == "all" else any

    def __call__(self, *, completions: list[str], **columns: list[Any]) -> list[float]:
        """One score a completion."""
        texts = (self._normal(text) for text in completions)
        return [float(self._enough(keyword in text for keyword in self._keywords)) for text in texts]

    def _normal(self, text: str) -> str:
        return text.casefold() if self.config.ignore_case else text
