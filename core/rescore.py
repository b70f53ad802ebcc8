"""The completions that a run kept, scored anew: what another reward, or a changed one, says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, DataError
from rlx.core.folder import COMPLETIONS
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from rlx.core.components import Component

DIFFERENT = 1e-6  # scores are kept as float32


@dataclass(frozen=True)
class Rescored:
    """A completion with both scores.

    Attributes:
        step: of the run.
        held_out: it was sampled by an evaluation.
        completion: its text.
        old: from the run, by the reward of the same name, else the weighted sum; None where none applied.
        new: None where the reward does not apply.
    """

    step: int
    held_out: bool
    completion: str
    old: float | None
    new: float | None

    @property
    def changed(self) -> bool:
        """The reward says something else than the run did."""
        if self.old is None or self.new is None:
            return self.old is not self.new
        return abs(self.new - self.old) > DIFFERENT * max(1.0, abs(self.old))


def rescore(component: Component, folder: Path, columns: Mapping[str, str]) -> list[Rescored]:
    """Score the completions in a run folder.

    Args:
        component: the reward.
        folder: of a run, which may still be going on.
        columns: data-set column → value for every completion, in the place of the run's.

    Returns:
        One a completion, in the order of the file.

    Raises:
        RlxError: no completions, lines that are none, a column that is missing, a reward that fails.
    """
    samples = read_samples(folder)
    runner = RewardRunner([NamedReward(component.name, component.make())])
    try:
        name = runner.rewards[0].name
        data = _columns(samples, runner.columns_needed.get(name, ()), columns)
        count = len(samples)
        prompts = Prompts(
            [[0]] * count,  # rewards do not see the prompts' token ids
            [sample["prompt"] for sample in samples],
            [sample.get("messages") for sample in samples],
            data,
            [sample.get("row", i) for i, sample in enumerate(samples)],
        )
        texts, ids = ([sample[key] for sample in samples] for key in ("completion", "completion_ids"))
        scored = runner.score(prompts, texts, ids).rewards[name].tolist()
    finally:
        runner.close()
    return [
        Rescored(
            int(sample["step"]),
            bool(sample.get("eval")),
            sample["completion"],
            sample["rewards"].get(name, sample["score"]),
            None if math.isnan(new) else new,
        )
        for sample, new in zip(samples, scored, strict=True)
    ]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's completions.jsonl; the file stays untouched, the run may be writing it.

    Raises:
        ConfigError: the folder has none.
        DataError: a line that no run wrote.
    """
    path = folder / COMPLETIONS
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    if not lines:
        raise ConfigError(
            "there are no completions to score",
            code="E-CONFIG-FILE",
            where=safe_text(path, 200),
            hint="give the folder of a run with --reward and without --log-completions 0",
        )
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            sample = None
        if not isinstance(sample, dict) or not _is_sample(sample):
            raise DataError(
                "this is no line of a run's completions",
                code="E-DATA-ROW",
                where=f"{safe_text(path, 200)}:{number}",
                expected="step, prompt, completion, completion_ids, score, rewards",
            )
        samples.append(sample)
    return samples


def _is_sample(line: Mapping[str, Any]) -> bool:
    numbers = [
        line.get("score"),
        *(line["rewards"].values() if isinstance(line.get("rewards"), dict) else ()),
    ]
    return (
        isinstance(line.get("step"), int)
        and all(isinstance(line.get(name), str) for name in ("prompt", "completion"))
        and isinstance(line.get("completion_ids"), list)
        and isinstance(line.get("data"), dict)
        and isinstance(line.get("rewards"), dict)
        and all(isinstance(number, int | float | None) for number in numbers)
    )


def _columns(
    samples: list[dict[str, Any]], needed: tuple[str, ...], given: Mapping[str, str]
) -> dict[str, list[Any]]:
    """The data-set columns that every sample has, those that are given among them."""
    names = [name for name in samples[0]["data"] if all(name in sample["data"] for sample in samples)]
    lacking = [name for name in needed if name not in names and name not in given]
    if lacking:
        raise DataError(
            f"the run's completions have no column {lacking[0]!r}, which the reward needs",
            code="E-DATA-COLUMN",
            where=COMPLETIONS,
            got=", ".join(map(safe_text, names)) or "no columns",
            hint=f"give one value for all: --columns {safe_text(lacking[0], 60)}=…",
        )
    columns = {name: [sample["data"][name] for sample in samples] for name in names}
    return columns | {name: [value] * len(samples) for name, value in given.items()}
