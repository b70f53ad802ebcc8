"""reward: the completion with the higher reward wins; any reward, or a weighted sum of several.

Leaves out: a scale. How much higher does not count, only which one is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.core.options import build, opt
from rlx.core.settings import Settings


class RewardJudge:
    """The higher reward wins; equal rewards, or a reward that does not apply, give no verdict.

    Columns of the data, such as ``answer``, reach the rewards as they do in a run.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of reward."""

        rewards: list[Any] = opt(
            doc="what scores: references, or in YAML {name: length, weight: 0.2, target: 12}"
        )
        margin: float = opt(0.0, "a difference that is not larger gives no verdict", ge=0)

    def __init__(self, config: Config) -> None:
        from rlx.core.components import check_spec, read_specs
        from rlx.core.scoring import NamedReward, RewardRunner

        self.config = config
        specs, problems = read_specs("reward", config.rewards, "rewards", {})
        if problems:
            raise problems[0]
        weights = [1.0 if spec.weight is None else spec.weight for spec in specs]
        listed = {"reward": [spec.name for spec in specs], "reward_weight": weights}
        weights = build(Settings, listed, owner="judge reward").reward_weight
        parts = [check_spec(spec) for spec in specs]
        self._runner = RewardRunner([
            NamedReward(part.name, part.make(), weight) for part, weight in zip(parts, weights, strict=True)
        ])  # fmt: skip
        needed = self._runner.columns_needed.values()
        self.columns = tuple(dict.fromkeys(column for columns in needed for column in columns))
        self.needs_policy = bool(self._runner.waiting)

    def attach(self, policy: Any) -> None:
        """Give the policy, loaded, to the rewards that score with its weights."""
        self._runner.attach(policy)

    def judge(
        self,
        prompts: list[Any],
        pairs: list[tuple[str, str]],
        *,
        prompt_texts: list[str],
        pair_ids: list[tuple[list[int], list[int]]],
        rows: list[int],
        **columns: list[Any],
    ) -> list[int | None]:
        """One verdict a pair.

        Args:
            prompts: N message lists, or N texts.
            pairs: N pairs of completions.
            prompt_texts: N prompts as the model sees them.
            pair_ids: the token ids of the completions.
            rows: N row numbers of the data set, for messages.
            columns: the data's other columns, N values each.

        Raises:
            RewardError: a reward failed.
        """
        from rlx.core.batch import Prompts

        messages = [prompt if isinstance(prompt, list) else None for prompt in prompts]
        once = Prompts([[] for _ in prompts], prompt_texts, messages, columns, rows)
        twice = once.take([i for i in range(len(pairs)) for _ in range(2)])
        texts = [text for pair in pairs for text in pair]
        ids = [ids for pair in pair_ids for ids in pair]
        scores = _totals(self._runner.score(twice, texts, ids), [len(one) for one in ids])
        return [self._better(*scores[i : i + 2]) for i in range(0, len(scores), 2)]

    def _better(self, one: float, other: float) -> int | None:
        """0 or 1 for the higher one; a NaN is never higher."""
        if one - other > self.config.margin:
            return 0
        return 1 if other - one > self.config.margin else None

    def close(self) -> None:
        """Let the rewards give back what they hold."""
        self._runner.close()

    def state_dict(self) -> dict[str, Any]:
        """What the rewards remember."""
        return self._runner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._runner.load_state_dict(state)


def _totals(scored: Any, lengths: list[int]) -> list[float]:
    """Scores with the rewards of single tokens added."""
    totals: list[float] = scored.score.tolist()
    if scored.token_scores is None:
        return totals
    parts = scored.token_scores.split(lengths)
    return [total + float(part.sum()) for total, part in zip(totals, parts, strict=True)]
