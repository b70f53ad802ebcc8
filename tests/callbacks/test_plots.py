from __future__ import annotations

import math
import struct
import subprocess
import sys

from rlx.callbacks import plots
from rlx.callbacks.plots import Plots

HISTORY = [
    {"step": 0, "eval/reward": 0.4},
    *(
        {"step": i, "reward": 0.4 + i / 20, "loss": 1 / i, "kl": i / 100, "entropy": 1.0}
        for i in range(1, 11)
    ),
    {"step": 11, "reward": math.nan, "eval/reward": 0.9, "completion/length": 9.0},
]


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and len(data) > 5000
    return struct.unpack(">II", data[16:24])


def test_one_readable_png_a_family_and_an_overview(make_run):
    run = make_run()
    run.metrics_history = HISTORY
    Plots(None).on_run_end(run)
    files = {path.name: png_size(path) for path in (run.folder.path / "plots").iterdir()}
    assert set(files) == {"reward.png", "loss.png", "kl.png", "entropy.png", "lengths.png", "overview.png"}
    assert all(width >= 600 and height >= 300 for width, height in files.values())
    assert files["overview.png"][0] > files["reward.png"][0]
    assert run.said == [f"plots: {run.folder.path / 'plots' / 'overview.png'}"]


def test_the_reward_plot_holds_training_and_held_out_rewards_without_nan(tmp_path):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    plots._family(ax, "reward", HISTORY)
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert lines["eval/reward"] == [[0, 0.4], [11, 0.9]]
    assert [step for step, _ in lines["reward"]] == list(range(1, 11))


def test_only_scores_are_drawn_as_rewards():
    line = {"reward": 1.0, "reward/a": 1.0, "reward/std": 0.1, "reward/unscorable": 0.0}
    timed = {"reward/a/seconds": 0.01, "reward/a/errors": 0.0, "reward/a/undecided": 0.5}
    assert plots._single_rewards([line | timed]) == []
    both = plots._single_rewards([line | timed | {"reward/b": 0.5, "reward/b/seconds": 0.02}])
    assert both == ["reward/a", "reward/b"]


def test_names_from_outside_are_no_mathematics_and_no_escapes(make_run):
    run = make_run()
    run.metrics_history = [{"step": 1, "reward": 1.0, "reward/$\\frac{": 1.0, "reward/\x1b[2J": 2.0}]
    Plots(None).on_run_end(run)
    assert png_size(run.folder.path / "plots" / "reward.png")


def test_no_plots_where_there_is_nothing_to_draw_or_nobody_wants_them(make_run):
    run = make_run(plots=False)
    run.metrics_history = HISTORY
    Plots(None).on_run_end(run)
    for history in ([], [{"step": 1}], [{"step": 1, "reward": math.nan}]):
        run.metrics_history = history
        Plots(None).on_run_end(run)
    assert not (run.folder.path / "plots").exists() and run.said == []


def test_without_matplotlib_one_line_says_what_to_install(make_run, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    run = make_run()
    run.metrics_history = HISTORY
    Plots(None).on_run_start(run)
    Plots(None).on_run_end(run)
    assert len(run.said) == 1 and 'pip install "rlx[plots]"' in run.said[0]


def test_callbacks_import_neither_matplotlib_nor_torch_nor_transformers():
    code = (
        "import sys\nfrom rlx.callbacks import completions, health, model_card, plots\n"
        "from rlx.callbacks import rich_progress, trackers\n"
        "heavy = {'matplotlib', 'torch', 'transformers', 'accelerate', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
