"""regex and format: does a completion have a given form.

Patterns come from the configuration, which is trusted; texts come from the model, which is not. The search
time of a pattern with nested repetition, as in ``(a+)+b``, can grow exponentially with the text: avoid it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Reward

LONGEST = (
    10_000  # characters of a completion that a pattern sees; bounds the time that a hostile text can cost
)


class Regex(Reward):
    """One score where a pattern is found in a text's first 10,000 characters, another where it is not."""

    @dataclass(frozen=True)
    class Config:
        """Options of regex."""

        pattern: str = opt(
            doc="regular expression, Python syntax; (?i) in front ignores case, (?s) lets . match lines"
        )
        full: bool = opt(False, "the pattern must match the whole completion; one that was cut never does")
        match_score: float = opt(1.0, "score where the pattern is found")
        miss_score: float = opt(0.0, "score where it is not")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._pattern = compiled(config.pattern, "regex")

    def __call__(self, *, completions: list[str], **columns: list[Any]) -> list[float]:
        """One score a completion."""
        return [
            self.config.match_score if self._found(text) else self.config.miss_score for text in completions
        ]

    def _found(self, text: str) -> bool:
        if self.config.full:
            return len(text) <= LONGEST and self._pattern.fullmatch(text) is not None
        return self._pattern.search(text[:LONGEST]) is not None


class Format(Reward):
    """1.0 for ``<think>reasoning</think> answer`` with each tag once and neither part blank, else 0.0.

    White space around the parts does not count. With ``answer_tag`` the answer must stand in tags of its own.

    Source: DeepSeek-R1 (arXiv:2501.12948), section 2.2.2, format rewards; there ``answer_tag`` is ``answer``.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of format."""

        think_tag: str = opt("think", "name of the tag around the reasoning")
        answer_tag: str | None = opt(
            None, "name of a tag around the answer, which must then be all that follows"
        )
        opened: bool = opt(
            False, "the prompt already ends with the opening tag, so the completion starts inside it"
        )

    def __call__(self, *, completions: list[str], **columns: list[Any]) -> list[float]:
        """One score a completion."""
        return [float(self._is_well_formed(text)) for text in completions]

    def _is_well_formed(self, text: str) -> bool:
        # Searched without patterns, in time linear in the text, so that no limit on its length is needed.
        tag = self.config.think_tag
        if self.config.opened:
            text = f"<{tag}>{text}"
        rest = _inside(text, tag)
        if rest is None:
            return False
        if self.config.answer_tag is None:
            return bool(rest.strip())
        return _inside(rest, self.config.answer_tag) == ""


def _inside(text: str, tag: str) -> str | None:
    """What follows ``<tag>…</tag>`` at its start; None unless both tags occur once, around something."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    text = text.strip()
    if not text.startswith(opening) or text.count(opening) != 1 or text.count(closing) != 1:
        return None
    content, _, rest = text.removeprefix(opening).partition(closing)
    return rest.strip() if content.strip() else None


def compiled(pattern: str, reward: str) -> re.Pattern[str]:
    """A pattern out of the configuration.

    Args:
        pattern: the regular expression.
        reward: name of the reward, for the message.

    Raises:
        ConfigError: it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"the pattern of reward {reward!r} is no regular expression: {error}",
            code="E-CONFIG-VALUE",
            got=pattern[:80],
        ) from None
