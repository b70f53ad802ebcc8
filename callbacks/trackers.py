"""Metrics to experiment trackers, through accelerate: ``report_to: tensorboard, wandb, trackio, …``.

Numbers and options go out, nothing else: prompts and completions stay in the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from rlx.core.errors import ConfigError
from rlx.core.options import close
from rlx.core.text import redact
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl


class Trackers(Callback):
    """Sends each log line to the trackers of ``report_to``; does nothing without any."""

    observer: ClassVar[bool] = True

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        """Open the trackers with the run's options, secrets taken out."""
        names = run.config.settings.report_to
        if not names:
            return
        check_trackers(names)
        from accelerate.tracking import filter_trackers

        folder = str(run.folder.path / "trackers")
        run.accelerator.project_configuration.logging_dir = folder
        run.accelerator.log_with = filter_trackers(names, folder)
        values = redact(run.config.to_mapping())
        plain = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in values.items()
        }
        run.accelerator.init_trackers("rlx", config=plain)

    @hookimpl
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """Send one log line; a value that is not finite is left out."""
        if run.config.settings.report_to:
            finite = {
                name: value for name, value in metrics.items() if name != "step" and math.isfinite(value)
            }
            run.accelerator.log(finite, step=int(metrics["step"]))

    @hookimpl
    def on_run_end(self, run: Any) -> None:
        """Close the trackers."""
        if run.config.settings.report_to and run.is_main:
            for tracker in run.accelerator.trackers:
                tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know or that are not installed.

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
