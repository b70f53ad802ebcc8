"""Sample completions into completions.jsonl, a few at each log line. They stay on this machine."""

from __future__ import annotations

from typing import Any, ClassVar

from rlx.core.samples import lines
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl


class LogCompletions(Callback):
    """Writes ``log_completions`` completions at each log line, and as many at each evaluation."""

    observer: ClassVar[bool] = True

    @hookimpl
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """Write samples of the last rollouts, and of the evaluation that this line reports."""
        if run.is_main:
            for line in lines(run, metrics):
                run.folder.log_completions(line)
