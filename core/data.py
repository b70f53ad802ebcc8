"""The way of the data: rows → transforms → token ids, every fault found before a weight is loaded.

What becomes of the rows depends on what the algorithm eats: ``rlx.core.prompt_data``,
``rlx.core.preference_data`` and ``rlx.core.demonstration_data`` hold the four kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlx.core.demonstration_data import DemonstrationData, load_demonstrations
from rlx.core.errors import ErrorGroup, RlxError
from rlx.core.preference_data import LabeledData, PairData, load_labeled, load_pairs
from rlx.core.prompt_data import PromptData, load_prompts
from rlx.core.row_source import raise_all, source_of
from rlx.core.settings import Settings
from rlx.core.text import safe_text

__all__ = ["Data", "PromptData", "check_data", "load_prompts", "overlap"]

Data = PromptData | PairData | LabeledData | DemonstrationData

LOADERS: dict[str, Any] = {
    "prompts": load_prompts,
    "pairs": load_pairs,
    "labeled": load_labeled,
    "demonstrations": load_demonstrations,
}


def check_data(
    settings: Settings,
    tokenizer: Any,
    transforms: Sequence[Any] = (),
    *,
    eats: str = "prompts",
    columns_needed: Mapping[str, Iterable[str]] | None = None,
    max_positions: int | None = None,
) -> tuple[Any, Any]:
    """Training data and, where there is any, evaluation data; the problems of both are told at once.

    Args:
        settings: the data options.
        tokenizer: of the policy.
        transforms: built transforms, in order.
        eats: what the algorithm eats: ``prompts``, ``pairs``, ``labeled`` or ``demonstrations``.
        columns_needed: reward name → data-set columns that it needs.
        max_positions: the longest sequence the model can take, in tokens; by default the tokenizer's own
            limit.

    Returns:
        Two ``Data`` of the kind asked for, the second one None without evaluation data. Rows that are in both
        are counted in its report.

    Raises:
        DataError: missing or unfit data.
        ConfigError: options that cannot be kept.
        PluginError: a transform that fails or breaks its contract.
    """
    loaded: list[Data] = []
    problems: list[RlxError] = []
    for evaluation in (False, True):
        if source_of(settings, evaluation)[0] is None:
            continue
        try:
            loaded.append(
                LOADERS[eats](
                    settings,
                    tokenizer,
                    transforms,
                    columns_needed=columns_needed,
                    evaluation=evaluation,
                    max_positions=max_positions,
                )
            )
        except RlxError as error:
            for problem in error.problems if isinstance(error, ErrorGroup) else [error]:
                if str(problem) not in map(str, problems):
                    problems.append(problem)
    raise_all(problems)
    train, test = loaded[0], loaded[1] if len(loaded) > 1 else None
    if test is not None:
        test.report.extend(overlap(train, test))
    return train, test


def overlap(train: Data, evaluation: Data) -> list[str]:
    """A warning with a count and an example if evaluation prompts are also training prompts, else no line."""
    seen = set(train.texts)
    both = [text for text in evaluation.texts if text in seen]
    if not both:
        return []
    return [
        f"warning: {len(both)} of {len(evaluation.texts)} evaluation prompts are training prompts too, for "
        f"example {safe_text(both[0], 80)!r}"
    ]
