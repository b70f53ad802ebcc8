"""Two sides answer the same prompts, and a judge compares the answers: what ``rlx compare`` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.core import checkpoint
from rlx.core.answers import Answers, from_rows, places_of, read_completions, sampled
from rlx.core.components import check_spec, read_specs
from rlx.core.errors import ConfigError, DataError
from rlx.core.folder import is_run
from rlx.core.judging import Tally
from rlx.core.models import load_tokenizer
from rlx.core.options import build, options
from rlx.core.pretrained import ADAPTER_CONFIG_FILE, CONFIG_FILE, read_json
from rlx.core.prompt_data import load_prompts
from rlx.core.row_files import kind_of
from rlx.core.settings import EMBEDDED, Settings
from rlx.core.text import safe_text
from rlx.core.yaml_file import read_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.judging import JudgeRunner, Verdict

# What a run's config.yaml says about prompts and sampling holds for a comparison of its policy, too.
TAKEN_OVER = [
    *(name for name, option in options(Settings).items() if option.panel in ("Data", "Sampling")),
    "transform",
]


@dataclass(frozen=True)
class Side:
    """Where one side's completions come from.

    Attributes:
        name: as the user gave it.
        model: options of the model; None for a file.
        rows: the rows of a file; None for a model.
        run: the config.yaml of the run that it belongs to, if any.
    """

    name: str
    model: dict[str, Any] | None
    rows: list[dict[str, Any]] | None
    run: Path | None


def find_side(name: str) -> Side:
    """What a name means: a file of completions, a run folder, a checkpoint, a model's folder or a hub id.

    Args:
        name: a run folder stands for its final policy, or for its newest checkpoint while it has none.

    Raises:
        ConfigError: a folder without a model.
        DataError: a file that cannot be read, or holds no completions.
    """
    path = Path(name)
    beside = [folder / "config.yaml" for folder in (path, path.parent) if is_run(folder)]
    run = next((file for file in beside if file.is_file()), None)
    if path.is_file():
        return Side(name, None, read_completions(path), run)
    if kind_of(path) and not path.is_dir():
        raise ConfigError(
            f"there is no file {safe_text(name, 120)!r}",
            code="E-MODEL-MISSING",
            expected="a file of completions, a run folder, a checkpoint or a model",
        )
    if not path.is_dir():
        return Side(name, {"model": name}, None, None)  # a hub id, 'tiny', or an error once it is loaded
    folder = path
    if not _holds_model(path) and is_run(path):
        folder = checkpoint.newest(path)[0] or path
    if not _holds_model(folder):
        raise ConfigError(
            f"{safe_text(name, 120)} holds no model",
            code="E-MODEL-MISSING",
            expected=f"a folder with {CONFIG_FILE} or {ADAPTER_CONFIG_FILE}, or a run that has a checkpoint",
        )
    return Side(name, _model_options(folder, run), None, run)


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE))


def _model_options(folder: Path, run: Path | None) -> dict[str, Any]:
    """A whole model is its folder; an adapter needs its base, which its run or it itself names.

    Raises:
        ConfigError: neither names one.
    """
    if (folder / CONFIG_FILE).is_file():
        return {"model": str(folder)}
    base = None if run is None else _model_of(run)
    base = base or read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"nothing says which model the adapter {safe_text(folder, 120)} is of",
            code="E-MODEL-MISSING",
            hint=f"write its folder or hub id as base_model_name_or_path into its {ADAPTER_CONFIG_FILE}",
        )
    return {"model": base, "adapter": str(folder), "tokenizer": str(folder)}


def _model_of(run: Path) -> str | None:
    """The model that the config.yaml of a run names; None for an object that the run was given in Python."""
    model = str(read_config(run)[0].get("model", EMBEDDED))
    return None if model.startswith("object-") else model


def comparison_settings(sides: Iterable[Side], given: Mapping[str, Any]) -> tuple[Settings, list[Any]]:
    """Data and sampling options of a comparison, and the transforms, built.

    Args:
        sides: the first that belongs to a run gives what is not given.
        given: options that hold for both sides, for example ``eval_dataset`` and ``temperature``.

    Raises:
        ConfigError: an option that cannot be kept.
        PluginError: a transform that does not load.
    """
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    run = next((side.run for side in sides if side.run is not None), None)
    if run is not None:
        written, where = read_config(run)
        values = {name: written[name] for name in TAKEN_OVER if name in written}
    if given.get("eval_dataset"):  # columns and transforms were those of another data set
        values = {name: v for name, v in values.items() if name not in ("columns", "transform", "dataset")}
    values |= given
    specs, problems = read_specs("transform", values.pop("transform", []), "transform", where)
    if problems:
        raise problems[0]
    settings: Settings = build(Settings, values, owner="the comparison", where=where)
    return settings, [check_spec(spec).make() for spec in specs]


@dataclass(frozen=True)
class Outcome:
    """A contest that is over.

    Attributes:
        answers: those of both sides, to the same N prompts.
        verdicts: N, which side is better.
        tally: how often each side won.
    """

    answers: tuple[Answers, Answers]
    verdicts: list[Verdict]
    tally: Tally


def play(
    names: tuple[str, str],
    judge: JudgeRunner,
    given: Mapping[str, Any],
    accelerator: Accelerator,
    *,
    num_prompts: int,
    tokenizer: str | None = None,
) -> Outcome:
    """Let two sides answer the same prompts, and a judge compare the answers.

    Args:
        names: what ``find_side`` knows.
        judge: says which is better; its seed is that of the order of each pair.
        given: options for both sides, see ``comparison_settings``. Without ``eval_dataset`` the prompts are
            the held-out ones of a side's run; of two files without a run, their own.
        accelerator: device and precision.
        num_prompts: at most so many, from the first.
        tokenizer: whose tokens are counted in a file; default: that of the other side, or of its run.

    Raises:
        RlxError: a side, the data or the judge cannot be used; the two have no prompt in common.
    """
    judge.check_policy()
    sides = [find_side(name) for name in names]
    settings, transforms = comparison_settings(sides, given)
    answers: dict[int, Answers] = {}
    rows: list[int] | None = None
    if any(side.rows is not None for side in sides):
        encoder = load_tokenizer(Settings(**_tokenizer_options(sides, tokenizer)))
        prompts = None
        if given.get("eval_dataset") or any(side.model or side.run for side in sides):
            everything = replace(settings, max_eval_rows=None)
            prompts = load_prompts(everything, encoder, transforms, evaluation=True).prompts
        for place, side in enumerate(sides):
            if side.rows is not None:
                answers[place] = from_rows(side.rows, encoder, prompts)
                prompts = answers[place].prompts
        rows = [] if prompts is None else prompts.rows[:num_prompts]
        if not rows:
            raise _nothing_in_common(sides)
    else:
        settings = replace(settings, max_eval_rows=num_prompts)
    for place, side in enumerate(sides):
        if side.model is not None:
            chosen = replace(settings, **side.model)
            answers[place] = sampled(chosen, transforms, accelerator, stream=f"compare {place}", rows=rows)
    one, other = _matched(answers[0], answers[1], num_prompts)
    pairs = list(zip(one.texts, other.texts, strict=True))
    ids = list(zip(one.ids, other.ids, strict=True))
    verdicts = judge.verdicts(one.prompts, pairs, ids, [(row,) for row in one.prompts.rows])
    return Outcome((one, other), verdicts, Tally.of(verdicts, pairs))


def _tokenizer_options(sides: Sequence[Side], given: str | None) -> dict[str, Any]:
    if given is not None:
        return {"model": given}
    model = next((side.model for side in sides if side.model is not None), None)
    run = next((side.run for side in sides if side.run is not None), None)
    if model is not None:
        return {"model": model["model"], "tokenizer": model.get("tokenizer")}
    # Where the model was an object, the run folder has its tokenizer.
    return {"model": EMBEDDED if run is None else _model_of(run) or str(run.parent)}


def _matched(one: Answers, other: Answers, limit: int) -> tuple[Answers, Answers]:
    """Both in one order, without the prompts that only one of them has."""
    found = {place: i for i, place in enumerate(places_of(other.prompts.rows))}
    both = [(i, found[place]) for i, place in enumerate(places_of(one.prompts.rows)) if place in found]
    return one.take([i for i, _ in both[:limit]]), other.take([i for _, i in both[:limit]])


def _nothing_in_common(sides: Sequence[Side]) -> DataError:
    return DataError(
        "no prompt has a completion on both sides",
        code="E-DATA-EMPTY",
        where=" and ".join(safe_text(side.name, 120) for side in sides),
        hint="give the data set that they are of: --dataset PATH",
    )
