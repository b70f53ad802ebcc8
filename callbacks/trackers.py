"""Metrics to experiment trackers, through accelerate: ``report_to: tensorboard, wandb, trackio, …``.

Numbers and options go out, nothing else: prompts, completions and rows of data stay in the run folder, unless
``track_completions`` asks for samples. Trackers that write files write them into the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rlx.core.errors import ConfigError
from rlx.core.options import close
from rlx.core.samples import lines, without_rows
from rlx.core.text import redact, safe_text
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl

TABLES, TEXTS = ("wandb", "clearml"), ("tensorboard",)  # what takes a table of samples, and what takes text
COLUMNS = ("eval", "prompt", "completion", "score", "finished")
LONGEST = 4000  # characters of a prompt or a completion


class Trackers(Callback):
    """Sends each log line to the trackers of ``report_to``; does nothing without any."""

    observer: ClassVar[bool] = True

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        """Open the trackers with the run's options, secrets, prompts and rows of data taken out."""
        names = run.config.settings.report_to
        if not names:
            return
        check_trackers(names, completions=run.config.settings.track_completions)
        from accelerate.tracking import filter_trackers

        folder = run.folder.path / "trackers" if run.is_main else None
        run.accelerator.project_configuration.logging_dir = str(folder)
        run.accelerator.log_with = filter_trackers(names, str(folder))
        own: dict[str, dict[str, Any]] = {}
        if folder is not None and "wandb" in names:
            folder.mkdir(exist_ok=True)
            own["wandb"] = {"dir": str(folder), "name": run.folder.path.name}
        if run.global_step > 0 and "tensorboard" in names:
            # Lines that were logged after the checkpoint will be logged again.
            own["tensorboard"] = {"purge_step": run.global_step + 1}
        run.accelerator.init_trackers("rlx", config=public(run.config.to_mapping()), init_kwargs=own)

    @hookimpl
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """Send one log line; a value that is not finite is left out."""
        if not run.config.settings.report_to:
            return
        step = int(metrics["step"])
        finite = {name: value for name, value in metrics.items() if name != "step" and math.isfinite(value)}
        run.accelerator.log(finite, step=step)
        if run.config.settings.track_completions and run.is_main:
            self._send_samples(run, lines(run, metrics), step)

    def _send_samples(self, run: Any, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        rows = [[_cell(sample.get(column, False)) for column in COLUMNS] for sample in samples]
        text = "\n\n".join(
            "\n".join(f"    {name}: {cell}" for name, cell in zip(COLUMNS, row, strict=True)) for row in rows
        )
        for tracker in run.accelerator.trackers if rows else ():
            if tracker.name in TABLES:
                tracker.log_table("completions", columns=list(COLUMNS), data=rows, step=step)
            else:
                tracker.log({"completions": text}, step=step)

    @hookimpl
    def on_run_end(self, run: Any) -> None:
        """Close the trackers."""
        if run.config.settings.report_to and run.is_main:
            for tracker in run.accelerator.trackers:
                tracker.finish()


def public(options: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Options as trackers take them, without secrets, prompts and rows of data."""
    values = redact(without_rows(options, hidden=("system_prompt",)))
    return {
        name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()
    }


def _cell(value: Any) -> str:
    """A value of a sample on one line; a code block of Markdown and a table show it as it is."""
    return safe_text(value, LONGEST)


def check_trackers(names: Sequence[str], *, completions: bool = False) -> None:
    """Refuse trackers that accelerate does not know, that are not installed, or that take no samples.

    Args:
        names: as in ``report_to``.
        completions: samples are to be sent too.

    Raises:
        ConfigError: naming the first of them. Accelerate itself passes over a missing package in silence.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(name) for name in LoggerType.list() if str(name) != "all"]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no tracker {name!r}{close(name, known)}",
                where="report_to",
                expected=", ".join(known),
            )
        if name not in available:
            raise ConfigError(
                f"tracker {name!r} is not installed", where="report_to", hint=f"pip install {name}"
            )
        if completions and name not in TABLES + TEXTS:
            raise ConfigError(
                f"tracker {name!r} takes no completions",
                where="track_completions",
                expected=", ".join(TEXTS + TABLES),
                hint="leave track_completions out; completions.jsonl has them",
            )
