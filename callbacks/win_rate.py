"""How often a judge finds the policy's answers better than a baseline's, at every evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rlx.core.errors import ConfigError, DataError, RlxError
from rlx.core.options import opt
from rlx.core.text import safe_text
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from rlx.core.answers import Answers
    from rlx.core.batch import Prompts
    from rlx.core.judging import JudgeRunner

FOLDER = "baselines"  # in the run folder
BASELINE = "baseline"  # the random stream


class WinRate(Callback):
    """Samples one answer to each prompt and compares it with the baseline's, made once.

    Reported are ``eval/win_rate``, the share of the decided pairs that the policy won (0.5 where none was
    decided), the ends ``/low`` and ``/high`` of its 95 % Wilson interval, and of all pairs the shares
    ``/ties``, equal texts, and ``/no_verdict``. The random numbers of a row and the order in which its pair
    is shown are the same at every evaluation. Drawing changes nothing else in the run.
    """

    collective: ClassVar[bool] = True  # the answers of all processes are counted

    @dataclass(frozen=True)
    class Config:
        """What is compared, on what, by whom."""

        judge: Any = opt(None, "a judge: a reference, or in YAML {name: …, option: …}")
        rewards: list[Any] = opt([], "in the place of a judge: the higher reward wins, may be repeated")
        dataset: Any = opt(None, "prompts, like the run's option (default: its evaluation data)")
        num_prompts: int = opt(128, "prompts at most, from the first", gt=0)
        baseline_column: str | None = opt(
            None, "column with the baseline's answers (default: the policy's own before its first step)"
        )
        baseline_model: str | None = opt(
            None, "run folder, model folder or hub id of the model that gives them"
        )
        greedy: bool = opt(False, "take the most likely token, instead of sampling as the run does")
        metric: str = opt("win_rate", "name behind eval/, for a second judge")

        def __post_init__(self) -> None:
            from rlx.core.components import choose_judge

            if self.baseline_column and self.baseline_model:
                raise ValueError("baseline_column and baseline_model are both set; keep one of the two")
            if not re.fullmatch(r"\w[\w.-]*", self.metric):
                named = safe_text(self.metric, 60)
                raise ValueError(f"metric {named!r} is no name of letters, digits, _, - and .")
            try:
                choose_judge(self.judge, self.rewards)
            except RlxError as error:
                error.where = error.where or "callback win_rate, judge and rewards"
                error.hint = error.hint or "for example --callback win_rate --win_rate.rewards exact_match"
                raise

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        from rlx.core.components import choose_judge

        chosen = choose_judge(config.judge, config.rewards)
        self._judge = chosen.make()
        self._judge_name = chosen.name
        self._runner: JudgeRunner | None = None
        self._prompts: Prompts | None = None  # of this process
        self._places: list[tuple[int, int, int]] = []  # where another model's data have them
        self._baseline: dict[str, Any] = {}  # texts and ids, over all processes, and of which prompts
        self._judge_state: Mapping[str, Any] = {}

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        """Read the prompts, and make the baseline, while the policy is as it was at the start."""
        self._prepare(run)

    @hookimpl
    def on_evaluate(self, run: Any) -> dict[str, float]:
        """Compare."""
        import torch

        from rlx.core.answers import answer
        from rlx.core.judging import Tally
        from rlx.core.peers import agreed

        self._prepare(run)
        assert self._runner is not None and self._prompts is not None
        with agreed(run, "comparing answers"):
            now = answer(run.studio, self._prompts, "win_rate", greedy=self.config.greedy)
            mine = _share(run, len(self._baseline["texts"]))
            texts, ids = ([self._baseline[name][i] for i in mine] for name in ("texts", "ids"))
            pairs = list(zip(now.texts, texts, strict=True))
            rows = [(row,) for row in self._prompts.rows]
            verdicts = self._runner.verdicts(self._prompts, pairs, list(zip(now.ids, ids, strict=True)), rows)
        part = Tally.of(verdicts, pairs)
        counts = torch.tensor([part.wins, part.losses, part.ties, part.no_verdict])
        tally = Tally(*run.score.total(counts.to(run.accelerator.device)).tolist())
        low, high = tally.interval
        name = f"eval/{self.config.metric}"
        return {
            name: tally.rate,
            f"{name}/low": low,
            f"{name}/high": high,
            f"{name}/ties": tally.ties / tally.total,
            f"{name}/no_verdict": tally.no_verdict / tally.total,
        }

    @hookimpl
    def on_run_end(self, run: Any) -> None:
        """Let the judge give back what it holds."""
        self.close()

    def close(self) -> None:
        """Let the judge give back what it holds; also called where no run comes of it."""
        if hasattr(self._judge, "close"):
            self._judge.close()

    def state_dict(self) -> dict[str, Any]:
        """The baseline, and what the judge remembers."""
        judge = self._judge_state if self._runner is None else self._runner.state_dict()
        return {"baseline": dict(self._baseline), "judge": dict(judge)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._baseline, self._judge_state = dict(state["baseline"]), state["judge"]

    def _prepare(self, run: Any) -> None:
        """Prompts, judge and baseline, once a run.

        Raises:
            ConfigError: there are no prompts, or the policy is no longer what the baseline is to be made of.
            DataError: unfit data, or a column that is not there.
        """
        if self._runner is not None:
            return
        from rlx.core.answers import held_out, places_of
        from rlx.core.judging import JudgeRunner
        from rlx.core.peers import agreed

        with agreed(run, "the preparation of win_rate"):
            settings, transforms = self._data(run)
            data = held_out(settings, run.tokenizer, transforms, run.policy.base.config)
            runner = JudgeRunner(self._judge_name, self._judge, run.settings.seed)
            runner.check_columns(data.prompts.columns)
            runner.load_state_dict(self._judge_state)
            runner.attach(run.policy)
        mine, places = list(_share(run, len(data))), places_of(data.prompts.rows)
        self._prompts, self._places = data.take(mine), [places[i] for i in mine]
        fingerprint = hashlib.sha256(
            json.dumps([data.texts, self.config.baseline_model]).encode()
        ).hexdigest()
        if self.config.baseline_column is not None:
            self._baseline = self._of_column(run, data.prompts, self.config.baseline_column)
        elif self._baseline.get("of") != fingerprint:
            self._baseline = {**self._drawn(run, settings, transforms), "of": fingerprint}
        self._runner = runner
        with agreed(run, "writing the baseline"):
            _keep(run, self.config.metric, data.prompts, self._baseline["texts"])

    def _data(self, run: Any) -> tuple[Any, list[Any]]:
        """Options that say which prompts there are, and the transforms, built."""
        from rlx.core.row_source import source_of

        settings = replace(run.settings, max_eval_rows=self.config.num_prompts)
        if self.config.dataset is not None:
            return replace(settings, eval_dataset=self.config.dataset, columns={}), []
        if source_of(settings, True)[0] is None:
            raise ConfigError(
                "win_rate has no prompts: the run has no evaluation data",
                code="E-CONFIG-MISSING",
                hint="--eval-dataset PATH, or the option dataset of win_rate",
            )
        return settings, [component.make() for component in run.config.transforms]

    def _drawn(self, run: Any, settings: Any, transforms: list[Any]) -> dict[str, Any]:
        """The baseline's texts and ids, sampled; every process gets all of them."""
        from rlx.core.peers import agreed

        with agreed(run, "making the baseline"):
            found = self._answers_of_baseline(run, settings, transforms)
        texts, ids = found.texts, found.ids
        if run.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            texts, ids = gather_object(texts), gather_object(ids)
        return {"texts": texts, "ids": ids}

    def _answers_of_baseline(self, run: Any, settings: Any, transforms: list[Any]) -> Answers:
        """The baseline's answers to the prompts of this process."""
        from rlx.core.answers import answer, places_of, sampled
        from rlx.core.contest import find_side

        assert self._prompts is not None
        if self.config.baseline_model is None:
            if run.global_step > 0:
                raise ConfigError(
                    "the baseline of win_rate is the policy before its first step, which is over",
                    code="E-CONFIG-CONFLICT",
                    got=f"step {run.global_step}",
                    hint="give it a baseline_model, for example the model that the run began with",
                )
            return answer(run.studio, self._prompts, BASELINE, greedy=self.config.greedy)
        side = find_side(self.config.baseline_model).model
        if side is None:
            raise ConfigError(
                "baseline_model of win_rate is a file",
                got=safe_text(self.config.baseline_model, 120),
                expected="a run folder, a model's folder or a hub id",
                hint="for answers of a file: the options dataset and baseline_column",
            )
        found = sampled(
            replace(settings, **{"adapter": None, "lora_r": 0, "tokenizer": None, **side}),
            transforms,
            run.accelerator,
            stream=BASELINE,
            rows=self._prompts.rows,
            greedy=self.config.greedy,
        )
        theirs = {place: i for i, place in enumerate(places_of(found.prompts.rows))}
        both = [theirs[place] for place in self._places if place in theirs]
        if len(both) < len(self._places):
            raise DataError(
                "the baseline's model cannot take all prompts of win_rate",
                got=f"{len(both)} of {len(self._places)}",
                hint="use a data set whose prompts fit both models",
            )
        return found.take(both)

    def _of_column(self, run: Any, prompts: Prompts, column: str) -> dict[str, Any]:
        """The baseline's texts and ids, out of the data."""
        if column not in prompts.columns:
            raise DataError(
                f"win_rate needs the column {safe_text(column, 80)!r}, which the data do not have",
                code="E-DATA-COLUMN",
                got=safe_text(", ".join(prompts.columns)),
            )
        texts = []
        for row, value in zip(prompts.rows, prompts.columns[column], strict=True):
            text = value[-1].get("content") if isinstance(value, list) and value else value
            if not isinstance(text, str):
                raise DataError(
                    f"column {safe_text(column, 80)!r} of win_rate holds no answer",
                    code="E-DATA-COLUMN",
                    where=f"row {row}",
                    got=type(value).__name__,
                    expected="text, or messages of which the last one counts",
                )
            texts.append(text)
        ids = [run.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return {"texts": texts, "ids": ids}


def _share(run: Any, count: int) -> range:
    """The prompts of this process."""
    from rlx.core.order import share

    return share(count, run.accelerator.process_index, run.accelerator.num_processes)


def _keep(run: Any, metric: str, prompts: Prompts, texts: list[str]) -> None:
    """Write the baseline into the run folder, as a file that ``rlx compare`` reads."""
    if run.folder is None:
        return
    from rlx.core.files import saving

    folder = run.folder.path / FOLDER
    with saving(folder):
        folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n"
        for prompt, text in zip(prompts.texts, texts, strict=True)
    ]
    run.folder.write_text(f"{FOLDER}/{metric}.jsonl", "".join(lines))
