"""Completions to compare: drawn from a model on a stream of their own, or read from a file.

Nothing here trains or writes. Legend: N prompts, one completion each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.core.batch import Prompts
from rlx.core.errors import DataError
from rlx.core.memory import token_budget
from rlx.core.models import load_policy, load_tokenizer
from rlx.core.prompt_data import PromptData, load_prompts
from rlx.core.rollout import Studio
from rlx.core.row_files import read_file
from rlx.core.settings import Settings
from rlx.core.streams import stream_seed
from rlx.core.text import safe_text
from rlx.plugins.references import make

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Answers:
    """One completion a prompt.

    Attributes:
        prompts: N prompts.
        texts: N completions.
        ids: their token ids.
        finished: which ended by themselves; None where nobody knows.
    """

    prompts: Prompts
    texts: list[str]
    ids: list[list[int]]
    finished: list[bool] | None = None

    def take(self, index: Sequence[int]) -> Answers:
        """Those numbered by index, in that order."""
        finished = None if self.finished is None else [self.finished[i] for i in index]
        texts, ids = [self.texts[i] for i in index], [self.ids[i] for i in index]
        return Answers(self.prompts.take(index), texts, ids, finished)


def places_of(rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """How a prompt is found among those of another model: its row, which of its prompts it is, of how many.

    A transform may make several prompts of a row. Where a model has not all of them, none has a counterpart:
    nobody could say which.

    Args:
        rows: row number of each prompt, all prompts of a row among them.
    """
    all_of, seen = Counter(rows), Counter[int]()
    places = []
    for row in rows:
        places.append((row, seen[row], all_of[row]))
        seen[row] += 1
    return places


def held_out(settings: Settings, tokenizer: Any, transforms: Sequence[Any], model_config: Any) -> PromptData:
    """The prompts of the evaluation data, whatever the run's algorithm eats.

    Args:
        settings: the data options, and max_completion_length.
        tokenizer: of the model.
        transforms: built, in order.
        model_config: of transformers.

    Raises:
        DataError: missing or unfit data.
        ConfigError: options that cannot be kept, such as completions longer than the model.
    """
    declared = model_config.get_text_config(decoder=True)
    positions = getattr(declared, "max_position_embeddings", None)  # state-space models have no limit
    return load_prompts(settings, tokenizer, transforms, evaluation=True, max_positions=positions)


def sampled(
    settings: Settings,
    transforms: Sequence[Any],
    accelerator: Accelerator,
    *,
    stream: str,
    rows: Iterable[int] | None = None,
    greedy: bool = False,
) -> Answers:
    """A model's completions of the held-out prompts, one each.

    Args:
        settings: model, data and sampling.
        transforms: built, in order.
        accelerator: device and precision.
        stream: name of the random stream; a completion depends on it, the seed and the row.
        rows: which rows of the data; None for all.
        greedy: take the most likely token.

    Raises:
        RlxError: the model, tokenizer or data cannot be used.
    """
    tokenizer = load_tokenizer(settings)
    policy = load_policy(settings, accelerator, tokenizer)
    data = held_out(settings, tokenizer, transforms, policy.base.config)
    wanted = None if rows is None else set(rows)
    prompts = data.take([i for i, row in enumerate(data.prompts.rows) if wanted is None or row in wanted])
    studio = Studio(
        policy,
        None,
        make("generator", "native"),
        None,
        settings,
        accelerator,
        policy.stop_token_ids,
        token_budget(policy.model, settings),
    )
    return answer(studio, prompts, stream, greedy=greedy)


def answer(studio: Studio, prompts: Prompts, stream: str, *, greedy: bool = False) -> Answers:
    """One completion a prompt, on a random stream of its own: nothing else changes by it.

    Args:
        studio: what samples.
        prompts: any number, none too.
        stream: name of the random stream; a completion depends on it, the seed and the row.
        greedy: take the most likely token.
    """
    if not len(prompts):
        return Answers(prompts, [], [], [])
    seconds = dict(studio.clock.seconds)
    seeds = [stream_seed(studio.settings.seed, stream, row) for row in prompts.rows]
    completions = studio.sample(prompts, 1, seeds, greedy=greedy)
    studio.clock.seconds = seconds  # the time of training is none of this
    decode = studio.policy.tokenizer.decode
    texts = [decode(ids, skip_special_tokens=True) for ids in completions.ids]
    return Answers(prompts, texts, completions.ids, completions.finished)


def from_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, prompts: Prompts | None) -> Answers:
    """The completions of a file, to the prompts given, or to its own.

    Args:
        rows: with ``prompt`` and ``completion``; a prompt may stand more than once.
        tokenizer: whose tokens are counted.
        prompts: found in the file as the model sees them, as messages, or as the data's column ``prompt``;
            those that are not there are left out. None for the file's own, with its other columns.
    """
    if prompts is None:
        prompts, found = _own_prompts(rows), list(rows)
    else:
        waiting: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            waiting.setdefault(_key(row["prompt"]), []).append(row)
        found, places = [], []
        written = prompts.columns.get("prompt", [None] * len(prompts))
        for i, forms in enumerate(zip(prompts.texts, prompts.messages, written, strict=True)):
            matches = next((waiting[_key(form)] for form in forms if waiting.get(_key(form))), None)
            if matches:
                found.append(matches.pop(0))
                places.append(i)
        prompts = prompts.take(places)
    texts = [row["completion"] for row in found]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    finished = [row.get("finished") for row in found]
    known = all(isinstance(flag, bool) for flag in finished)
    return Answers(prompts, texts, ids, [bool(flag) for flag in finished] if known else None)


def _own_prompts(rows: Sequence[Mapping[str, Any]]) -> Prompts:
    asked = [row["prompt"] for row in rows]
    names = dict.fromkeys(name for row in rows for name in row if name != "completion")
    return Prompts(
        [[] for _ in rows],
        [prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False) for prompt in asked],
        [prompt if isinstance(prompt, list) else None for prompt in asked],
        {name: [row.get(name) for row in rows] for name in names},
        list(range(len(rows))),
    )


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Rows with ``prompt`` and ``completion``; of a run's completions.jsonl, those of the last evaluation.

    Raises:
        DataError: unreadable, without rows, or a row without prompt or completion.
    """
    rows = []
    for row, place in read_file(path):
        if not isinstance(row.get("prompt"), str | list) or not isinstance(row.get("completion"), str):
            raise DataError(
                f"{safe_text(path)} holds a row that is no completion",
                code="E-DATA-COLUMN",
                where=place,
                got=safe_text(", ".join(row)),
                expected="prompt (text or messages) and completion (text)",
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{safe_text(path)} holds no completions", code="E-DATA-EMPTY", got="0 rows")
    if all(isinstance(row.get("step"), int) for row in rows):
        rows = [row for row in rows if row.get("eval")] or rows
        last = max(row["step"] for row in rows)
        rows = [row for row in rows if row["step"] == last]
    return rows
