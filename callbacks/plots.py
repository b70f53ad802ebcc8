"""Curves of a run as PNG files: one a family of metrics, and an overview."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from rlx.core.text import safe_text
from rlx.plugins.contract import Callback
from rlx.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# File name → title, unit of the y axis, metrics. What a run does not have is left out.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "reward": ("Reward", "", ("reward", "eval/reward", "rewards/margins", "eval/rewards/margins")),
    "accuracy": ("Preference accuracy", "", ("rewards/accuracies", "eval/rewards/accuracies")),
    "win_rate": ("Win rate", "", ("eval/win_rate", "eval/win_rate/low", "eval/win_rate/high")),
    "loss": ("Loss", "", ("loss", "eval/loss", "loss/policy", "loss/value")),
    "kl": ("KL to the reference", "nats", ("kl", "kl/sequence", "policy/approx_kl")),
    "entropy": ("Entropy", "nats a token", ("entropy",)),
    "lengths": ("Completion length", "tokens", ("completion/length", "eval/completion/length")),
    "speed": ("Throughput", "tokens a second", ("tokens_per_second",)),
}
COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#64748b", "#db2777")
History = Sequence[Mapping[str, float]]


class Plots(Callback):
    """Writes ``plots/*.png`` when the run ends, well or not; needs matplotlib."""

    observer: ClassVar[bool] = True

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        """Say at once if there will be no plots."""
        if run.is_main and run.config.settings.plots and find_spec("matplotlib") is None:
            run.say('no plots: matplotlib is not installed; pip install "rlx[plots]"')

    @hookimpl
    def on_run_end(self, run: Any) -> None:
        """Draw all log lines, those before a resume included."""
        if not (run.is_main and run.config.settings.plots) or find_spec("matplotlib") is None:
            return
        if not any(_families(run.metrics_history)):
            return
        folder = run.folder.plots
        title = f"{run.config.settings.algo}, {run.config.settings.model}, {run.config.settings.dataset}"
        draw(run.metrics_history, folder, safe_text(title, 120))
        run.say(f"plots: {folder / 'overview.png'}")


def draw(history: History, folder: Any, title: str) -> list[str]:
    """Write one PNG a family of metrics, and ``overview.png`` with all of them.

    Args:
        history: log lines, each with ``step``.
        folder: existing folder.
        title: of the overview.

    Returns:
        The files' names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = _families(history)
    written = []
    for name in families:
        figure = Figure(figsize=(7, 4), layout="constrained")
        _family(figure.subplots(), name, history)
        written.append(_write(FigureCanvasAgg(figure), folder / f"{name}.png"))
    columns = min(3, len(families))
    rows = math.ceil(len(families) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, name in zip(axes, families, strict=False):
        _family(ax, name, history)
    for ax in axes[len(families) :]:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=12, parse_math=False)
    written.append(_write(FigureCanvasAgg(figure), folder / "overview.png"))
    return written


def _families(history: History) -> list[str]:
    """The families of which the run has at least one number."""
    return [
        name for name, (_, _, metrics) in FAMILIES.items() if any(_series(history, m)[0] for m in metrics)
    ]


def _series(history: History, metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric; lines without it, or where it is not finite, are left out."""
    points = [(line["step"], line[metric]) for line in history if math.isfinite(line.get(metric, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _family(ax: Axes, name: str, history: History) -> None:
    title, unit, metrics = FAMILIES[name]
    if name == "reward":
        metrics = (*metrics, *_single_rewards(history))
    drawn = 0
    for place, metric in enumerate(metrics):
        steps, values = _series(history, metric)
        if not steps:
            continue
        held_out = metric.startswith("eval/")
        label = safe_text(metric, 40).replace("$", r"\$")  # matplotlib reads $…$ as mathematics
        marker = "o" if held_out else "." if len(steps) == 1 else ""
        width, color = 2.2 if held_out else 1.6, COLORS[place % len(COLORS)]
        ax.plot(steps, values, color=color, label=label, linewidth=width, marker=marker, markersize=5)
        drawn += 1
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.set_xlabel("step", fontsize=9)
    ax.set_ylabel(unit, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.locator_params(axis="x", integer=True)
    if drawn > 1 or name == "reward":
        ax.legend(fontsize=8, frameon=False)


def _single_rewards(history: History) -> list[str]:
    """``reward/<name>`` of each reward, where there is more than one."""
    other = {"reward/std", "reward/unscorable"}
    names = {
        name
        for line in history
        for name in line
        if name.startswith("reward/") and name.count("/") == 1  # more: what a reward tells of itself
    } - other
    return sorted(names) if len(names) > 1 else []


def _write(canvas: Any, path: Any) -> str:
    canvas.print_png(path)
    return str(path.name)
