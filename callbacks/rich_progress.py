"""Progress of a run: a live panel on a terminal, plain lines elsewhere.

Prompts, completions and names are shown as text that was made harmless, never as markup.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from rlx.core.text import safe_text
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from rlx.core.batch import Rollouts

# What the panel and the plain lines show, where the run has it, in this order.
KEY_METRICS = (
    "reward", "eval/reward", "loss", "eval/loss", "rewards/accuracies", "eval/rewards/accuracies",
    "rewards/margins", "kl", "entropy", "completion/length", "completion/eos_rate", "grad_norm",
    "tokens_per_second",
)  # fmt: skip
SAMPLES = 3
HISTORY = 20  # log lines in a sparkline; fits a terminal of 80 columns
REFRESH = 2  # panels a second: each costs a few milliseconds of the processor that trains


class RichProgress(Callback):
    """Shows progress as ``progress: auto, rich, plain, none`` asks."""

    observer: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._mode = "none"
        self._live: Live | None = None
        self._restore: Any = None  # our handler of SIGTERM
        self._began, self._first_step = time.monotonic(), 0
        self._samples: list[tuple[str, str, float | None]] = []

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        """Choose how to show progress, and open the panel."""
        self._began, self._first_step = time.monotonic(), run.global_step
        self._mode = choose_mode(run.config.settings.progress) if run.is_main else "none"
        if self._mode == "rich":
            from rich.console import Console

            self.open(run, Console(force_terminal=True, markup=False, highlight=False, emoji=False))

    def open(self, run: Any, console: Console) -> None:
        """Open the panel on a console and let the run's lines go above it."""
        from rich.live import Live

        self._live = Live(
            get_renderable=lambda: self.panel(run, console),
            console=console,
            refresh_per_second=REFRESH,
            vertical_overflow="crop",
        )
        # First of all: a run that is left without on_run_end must not leave a broken terminal, nor one that
        # is interrupted just while the panel opens.
        run.printers.append(self._print)
        atexit.register(self.shut, run)
        self._close_on_sigterm(run)
        self._live.start()

    def _close_on_sigterm(self, run: Any) -> None:
        """A process that nobody taught to catch SIGTERM dies of it without running what atexit holds."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return

        def restore(signum: int, frame: FrameType | None) -> None:
            self.shut(run)
            signal.raise_signal(signum)

        signal.signal(signal.SIGTERM, restore)
        self._restore = restore

    def shut(self, run: Any) -> None:
        """Draw the panel a last time and give the terminal back; a second call does nothing."""
        live, self._live = self._live, None
        if live is None:
            return
        run.printers.remove(self._print)
        atexit.unregister(self.shut)
        restore, self._restore = self._restore, None
        if restore is not None and signal.getsignal(signal.SIGTERM) is restore:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            live.stop()
        except IndexError:  # rich had hidden the cursor, and was interrupted before it had done the rest
            pass
        finally:
            live.console.show_cursor(True)

    @hookimpl
    def on_rollouts(self, run: Any, rollouts: Rollouts) -> None:
        """Keep a few samples to show."""
        if self._mode == "rich":
            with self._closed_on_error(run):
                self._samples = pick_samples(rollouts)

    @hookimpl
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """Show a log line."""
        if self._mode == "plain":
            run.say(plain_line(run, metrics, time.monotonic() - self._began, self._first_step))
        elif self._mode == "rich" and not self._samples and run.evaluated is not None:
            with self._closed_on_error(run):
                self._samples = pick_samples(run.evaluated)

    @hookimpl
    def on_run_end(self, run: Any) -> None:
        """Close the panel, after success or failure alike."""
        self.shut(run)

    def panel(self, run: Any, console: Console) -> RenderableType:
        """What the live panel shows now."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        settings = run.config.settings
        parts: list[RenderableType] = [self._bar(run)]
        metrics = metric_table(run.metrics_history, unicode=console.encoding.startswith("utf"))
        parts += [metrics] if metrics is not None else [Text("no log line yet", style="dim")]
        if self._samples:
            parts.append(sample_table(self._samples))
        title = f"{settings.algo} · {settings.model} · {settings.dataset}"
        return Panel(
            Group(*parts),
            title=Text(safe_text(title, 100), style="bold"),
            subtitle=Text(safe_text(run.folder.path, 100), style="dim"),
            border_style="cyan",
        )

    def _bar(self, run: Any) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        elapsed = time.monotonic() - self._began
        row = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None):
            row.add_column(ratio=ratio, no_wrap=True)
        row.add_row(
            Text(f"step {run.global_step}/{run.total_steps}", style="bold"),
            ProgressBar(
                total=max(run.total_steps, 1),
                completed=run.global_step,
                complete_style="cyan",
                finished_style="green",
            ),
            Text(timing(run, elapsed, self._first_step), style="dim"),
        )
        return row

    def _print(self, line: str) -> None:
        from rich.text import Text

        if self._live is not None:
            self._live.console.print(Text(safe_text(line, 4000, keep_newlines=True)))

    @contextmanager
    def _closed_on_error(self, run: Any) -> Iterator[None]:
        """An observer that fails is switched off and hears of nothing more, so it must tidy up at once."""
        try:
            yield
        except BaseException:
            self.shut(run)
            raise


def choose_mode(progress: str) -> str:
    """``rich``, ``plain`` or ``none``: as asked, and for ``auto`` what stdout can show."""
    if progress != "auto":
        return progress
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
    return "rich" if sys.stdout.isatty() and not dumb else "plain"


def plain_line(run: Any, metrics: Mapping[str, float], elapsed: float, first_step: int) -> str:
    """A log line as plain text: ``step 10/45  reward 0.71  kl 0.02  …  [0:12<0:40]``."""
    step = f"step {int(metrics['step']):>{len(str(run.total_steps))}}/{run.total_steps}"
    shown = [f"{name} {number(metrics[name])}" for name in KEY_METRICS if name in metrics]
    return "  ".join([step, *shown, f"[{timing(run, elapsed, first_step)}]"])


def timing(run: Any, elapsed: float, first_step: int) -> str:
    """Time gone and time left, as ``0:12<0:40``; the second is unknown before the first step.

    Args:
        run: the run.
        elapsed: seconds since this process began to train.
        first_step: where it began.
    """
    done = run.global_step - first_step
    left = clock(elapsed / done * (run.total_steps - run.global_step)) if done else "?"
    return f"{clock(elapsed)}<{left}"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float) -> str:
    """A metric's value, short: four digits, thousands without a point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def sparkline(values: Sequence[float], *, unicode: bool) -> str:
    """Values as a row of bars between the least and the greatest of them."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    bars = "▁▂▃▄▅▆▇█" if unicode else "_.-=+*#"
    low, span = min(finite), max(finite) - min(finite)
    if span <= 1e-12 * max(abs(low), 1e-300):
        return bars[0] * len(finite)
    return "".join(bars[int((value - low) / span * (len(bars) - 1) + 0.5)] for value in finite)


def metric_table(history: Sequence[Mapping[str, float]], *, unicode: bool) -> RenderableType | None:
    """The key metrics in two columns: name, last value, change since the line before, sparkline.

    Args:
        history: log lines.
        unicode: whether the terminal can show block characters.

    Returns:
        A rich table, or None if no line has a key metric.
    """
    from rich.table import Table
    from rich.text import Text

    cells: list[tuple[Text, Text, Text]] = []
    for name in KEY_METRICS:
        values = [line[name] for line in history if name in line][-HISTORY:]
        if values:
            shape = Text(sparkline(values, unicode=unicode), style="cyan")
            cells.append((Text(name, style="dim"), Text(number(values[-1]), style="bold"), shape))
    if not cells:
        return None
    table = Table.grid(padding=(0, 2), expand=True)
    for ratio in (None, None, 1, None, None, 1):
        table.add_column(ratio=ratio, no_wrap=True, justify="left")
    half = (len(cells) + 1) // 2
    blank = (Text(""), Text(""), Text(""))
    for left, right in zip(cells[:half], [*cells[half:], blank][:half], strict=True):
        table.add_row(*left, *right)
    return table


def sample_table(samples: Sequence[tuple[str, str, float | None]]) -> RenderableType:
    """A table of prompts, completions and scores; all of it text from outside."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False, header_style="dim")
    table.add_column("prompt", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column("completion", ratio=3, no_wrap=True, overflow="ellipsis")
    table.add_column("score", justify="right", no_wrap=True, min_width=6)
    for prompt, completion, score in samples:
        good = "" if score is None else "green" if score > 0 else "red"
        table.add_row(
            Text(safe_text(prompt.strip(), 200)),
            Text(safe_text(completion.strip(), 300)),
            Text("–" if score is None else number(score), style=good),
        )
    return table


def pick_samples(rollouts: Rollouts) -> list[tuple[str, str, float | None]]:
    """Prompt, completion and score of a few completions, each of another prompt where there are enough."""
    groups = rollouts.sequences.groups.tolist()
    firsts = {group: place for place, group in reversed(list(enumerate(groups)))}
    chosen = sorted(firsts.values())[:SAMPLES]
    chosen += [place for place in range(len(groups)) if place not in chosen][: SAMPLES - len(chosen)]
    out = []
    for place in chosen:
        score = None if rollouts.score is None else float(rollouts.total_score[place])
        prompt = last_message(rollouts.prompts.messages[place]) or rollouts.prompts.texts[place]
        out.append((prompt, rollouts.texts[place], None if score is None or score != score else score))
    return out


def last_message(messages: Sequence[Mapping[str, Any]] | None) -> str:
    """The content of the last message of a conversation; empty for plain text."""
    content = messages[-1].get("content") if messages else None
    return content if isinstance(content, str) else ""
