"""Keeps the checkpoint at which a metric was best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.folder import BEST
from rlx.core.monitor import MODES, Monitor, check_mode
from rlx.core.options import opt
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl


class BestCheckpoint(Callback):
    """Writes a checkpoint at each new best value, and keeps it whatever ``save_total_limit`` says.

    ``best.json`` in the run folder names it, with step and value. The policy before the first step is no
    candidate. A value that is not finite is never the best one; of equal ones the first stays.
    """

    @dataclass(frozen=True)
    class Config:
        """What to watch, and what to do with the best policy."""

        metric: str = opt(doc="name of a metric in metrics.jsonl, such as eval/reward or loss")
        mode: str = opt("auto", "which way is better; auto is what the name says", choices=MODES)
        load_best_at_end: bool = opt(
            False, "the run ends with the best policy, in its folder and in Python, instead of the last one"
        )

        def __post_init__(self) -> None:
            check_mode(self.metric, self.mode)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._monitor = Monitor(config.metric, config.mode, "best_checkpoint")
        self._best: dict[str, Any] = {}  # step and value; empty before there is one
        self._earlier: dict[str, Any] = {}  # the best before that

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        """In a resumed run, make the run folder say what the checkpoint knows.

        Raises:
            ConfigError: the run has two such callbacks; it has one best checkpoint.
        """
        if sum(isinstance(other, BestCheckpoint) for other in run.callbacks.values()) > 1:
            raise ConfigError(
                "best_checkpoint is there twice; a run has one best checkpoint", hint="keep one of them"
            )
        self._fall_back(run)
        if self._best:
            self._keep(run)
        elif run.is_main:
            (run.folder.path / BEST).unlink(missing_ok=True)

    @hookimpl
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """Look at one log line, and ask for a checkpoint if it is the best one."""
        if self._best.get("step", metrics["step"]) < metrics["step"]:
            self._fall_back(run)
        value = self._monitor.read(run, metrics)
        if value is None or metrics["step"] == 0:
            return
        if self._monitor.better(value, self._best.get("value")):
            self._earlier, self._best = self._best, {"step": int(metrics["step"]), "value": float(value)}
            if run.saved == run.global_step:  # a resumed run evaluates the step that it begins with
                self._keep(run)
            run.saving = True
            if self.config.load_best_at_end:
                run.final_checkpoint = self._folder(run)

    @hookimpl
    def on_save(self, run: Any, path: Path) -> None:
        """Once the best checkpoint is on the disk, protect it and name it; the older best may go."""
        if self._best and path == self._folder(run):
            self._keep(run)

    @hookimpl
    def on_error(self, run: Any) -> None:
        """A run that fails ends with no policy."""
        run.final_checkpoint = None

    @hookimpl
    def on_run_end(self, run: Any) -> None:
        """Say which one it is, and let go of it."""
        if self._best and self._folder(run).is_dir():
            used = run.final_checkpoint == self._folder(run)
            run.say(
                f"best {self.config.metric} {self._best['value']:.4g} after step {self._best['step']}: "
                f"{self._folder(run)}" + ", whose policy the run ends with" * used
            )
        run.protected, run.final_checkpoint = set(), None

    def _folder(self, run: Any) -> Path:
        folder: Path = run.path / f"checkpoint-{self._best['step']}"
        return folder

    def _fall_back(self, run: Any) -> None:
        """A best whose checkpoint could not be written, or was deleted, is none; the one before it may be."""
        if self._best and not self._folder(run).is_dir():
            self._best, self._earlier = self._earlier, {}
            self._fall_back(run)
        if self.config.load_best_at_end:
            run.final_checkpoint = self._folder(run) if self._best else None

    def _keep(self, run: Any) -> None:
        run.protected = {self._best["step"]}
        if self.config.load_best_at_end:
            run.final_checkpoint = self._folder(run)
        if run.is_main:
            run.folder.write_json(
                BEST, {**self._monitor.watched, **self._best, "checkpoint": self._folder(run).name}
            )

    def state_dict(self) -> dict[str, Any]:
        """The best value so far and its step."""
        names = sorted(self._monitor.names)
        return {**self._monitor.watched, "best": self._best, "earlier": self._earlier, "names": names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, unless it is of another metric: ``callback`` may change."""
        self._monitor.names = set(state["names"])
        if all(state[name] == value for name, value in self._monitor.watched.items()):
            self._best, self._earlier = dict(state["best"]), dict(state["earlier"])
