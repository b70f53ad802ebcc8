"""The best completion of each log line, in a file of the run folder: what a policy is pulled towards."""

import json
from dataclasses import dataclass
from typing import Any

import rlx


class Winners(rlx.Callback):
    """Appends the completion with the highest score to a file, one JSON object a log line.

    A batch without any score has no best one. A resumed run writes lines after its checkpoint once more.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of winners."""

        file: str = rlx.opt("winners.jsonl", "name of the file in the run folder")

    observer = True  # a failure here switches it off; the run goes on

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.best: dict[str, Any] | None = None

    @rlx.hookimpl
    def on_rollouts(self, rollouts: rlx.Rollouts) -> None:
        """Remember the best of the newest batch."""
        scores = rollouts.total_score if rollouts.wins is None else rollouts.wins
        if scores.isnan().all():
            self.best = None
            return
        place = int(scores.nan_to_num(nan=float("-inf")).argmax())
        found = {"prompt": rollouts.prompts.texts[place], "completion": rollouts.texts[place]}
        self.best = {**found, "score": float(scores[place])}

    @rlx.hookimpl
    def on_log(self, run: Any) -> None:
        """Write it down."""
        if run.is_main and self.best is not None:
            with open(run.folder.path / self.config.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": run.global_step, **self.best}) + "\n")
