"""Whole runs on terminals good and bad: the panel, plain lines, closed pipes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REWARD = """
def words(completions):
    return [float(len(text.split())) for text in completions]


def broken(completions, calls=[]):
    calls.append(1)
    if len(calls) > 4:  # tried on two rows, the evaluation, a step
        raise RuntimeError("broken")
    return words(completions)
"""
SMALL = (
    "--max-rows 8 --max-eval-rows 2 --batch-size 2 --num-generations 1 --num-ppo-epochs 1 "
    "--num-mini-batches 1 --max-completion-length 4 --logging-steps 1 --plots false --output-dir run"
).split()

pytestmark = pytest.mark.slow


def job(folder: Path, steps: int, reward: str = "words") -> list[str]:
    (folder / "reward.py").write_text(REWARD)
    words = ["run", "--reward", f"./reward.py:{reward}", "--max-steps", str(steps), *SMALL]
    return [sys.executable, "-m", "rlx", *words]


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("steps", "reward", "sent", "code"),
    [
        (3, "words", None, 0),
        (9999, "words", signal.SIGINT, 130),
        (9999, "words", signal.SIGTERM, 143),
        (9999, "broken", None, 6),
    ],
    ids=["end", "SIGINT", "SIGTERM", "error"],
)
def test_the_panel_begins_with_an_evaluation_and_gives_the_terminal_back(
    on_a_terminal, tmp_path, steps, reward, sent, code
):
    shown, left = on_a_terminal(job(tmp_path, steps, reward), b"\x1b[?25l", sent)
    assert left.code == code, shown
    assert "eval/reward" in shown and "ppo · tiny · wordmath" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "\x1b[?1049h" not in shown and left.attributes[0] == left.attributes[1]
    if sent is not None:
        assert list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("fault", [pytest.param("C13", id="fault[C13]")])
def test_a_run_goes_on_after_its_reader_left(tmp_path, fault):
    command = f"{' '.join(job(tmp_path, 3))} | head -1; echo codes ${{PIPESTATUS[@]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.splitlines() == ["plan", "codes 0 0"] and done.stderr == ""
    assert logged(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("terminal", "env"),
    [
        pytest.param(False, {}, id="fault[C14]-no terminal"),
        pytest.param(True, {"TERM": "dumb", "COLUMNS": "1"}, id="fault[C14]-dumb, one column"),
        pytest.param(
            False,
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            id="fault[C14]-another encoding",
        ),
    ],
)
def test_poor_surroundings_get_plain_lines(on_a_terminal, tmp_path, terminal, env):
    if terminal:
        shown, left = on_a_terminal(job(tmp_path, 2), **env)
        code = left.code
    else:
        done = subprocess.run(
            job(tmp_path, 2),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            env={**os.environ, **env},
        )
        shown, code = done.stdout, done.returncode
        assert done.stderr == ""
    assert code == 0 and "\x1b" not in shown and "Traceback" not in shown
    steps = [line for line in shown.replace("\r\n", "\n").split("\n") if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["0/2", "1/2", "2/2"] and "eval/reward" in steps[0]
