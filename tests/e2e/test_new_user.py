"""What goes wrong for a new user at the shell: what they read, and with which code the command ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlx.core.commands.main import main

ROWS = [{"prompt": f"What is {i} plus 2?", "answer": str(i + 2)} for i in range(12)]
REWARDS = '''
import itertools, math

def later(bad):
    """Sane in the first four calls: two tries before the run, two steps; the next is step 3."""
    calls = itertools.count()
    def reward(completions, **columns):
        return bad(completions) if next(calls) >= 4 else [float(len(text)) for text in completions]
    return reward

def down(completions, **columns):
    raise RuntimeError("remote 503")

def short(completions, **columns):
    return [1.0]

def nan(completions, **columns):
    return [math.nan] * len(completions)

def strings(completions, **columns):
    return ["1"] * len(completions)

def scalar(completions, **columns):
    return 1.0

down_later, nan_later, short_later = later(down), later(nan), later(lambda texts: [1.0])
'''
PLUGIN = """
import rlx

class Critical(rlx.Callback):
    observer = False

    @rlx.hookimpl
    def on_step_end(self, run, metrics):
        raise ValueError("no disk for my table")

class Observer(Critical):
    observer = True
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder with a few rows and files of rewards and callbacks."""
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", ROWS)
    Path("mine.py").write_text(REWARDS)
    Path("plugin.py").write_text(PLUGIN)
    return tmp_path


def write(name: str, rows: list[object]) -> None:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path(name).write_text(text + "\n", encoding="utf-8")


def job(*words: str, **changes: str) -> list[str]:
    """The words of a short run: flags in pairs, which replace those given here, as keywords do."""
    flags = {
        "--algo": "ppo", "--reward": "exact_match", "--dataset": "rows.jsonl", "--batch-size": "4",
        "--max-steps": "4", "--num-ppo-epochs": "1", "--max-completion-length": "4", "--logging-steps": "1",
        "--plots": "false", "--output-dir": "out",
    }  # fmt: skip
    flags |= dict(zip(words[::2], words[1::2], strict=True))
    flags |= {f"--{name}": value for name, value in changes.items()}
    return ["run", *(word for pair in flags.items() for word in pair)]


def told(capsys, words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a command, which must be short and no traceback."""
    code = main(words)
    err = "\n".join(line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line)
    assert len(err.splitlines()) <= 12 and "Traceback" not in err, err
    return code, err


BEFORE_WEIGHTS = [
    pytest.param(["--lerning-rate", "1"], {}, 2, "did you mean 'learning_rate'", id="fault[C1]-flag"),
    pytest.param(["--algo", "pppo"], {}, 2, "did you mean 'ppo'", id="fault[C11]-algorithm"),
    pytest.param(["--max-steps", "ten"], {}, 2, "whole number", id="fault[C2]-type"),
    pytest.param(["--num-mini-batches", "3"], {}, 2, "batch_size 3", id="fault[C5]-divisibility"),
    pytest.param(["--model", "./no-model"], {}, 2, "does not exist", id="model missing"),
    pytest.param([], {"dataset": "no.jsonl"}, 3, "no such file: no.jsonl", id="data missing"),
    pytest.param([], {"dataset": "columns.jsonl"}, 3, "--columns prompt=q", id="fault[D1]-column"),
    pytest.param([], {"dataset": "reward.jsonl"}, 3, "--columns answer=ans", id="reward's column"),
    pytest.param(["--columns", "answer=anwser"], {}, 3, "did you mean 'answer'", id="unknown column"),
    pytest.param([], {"dataset": "null.jsonl"}, 3, "null.jsonl:2", id="fault[D2]-null"),
    pytest.param([], {"dataset": "empty.jsonl"}, 3, "prompt is empty", id="fault[D3]-empty"),
    pytest.param([], {"dataset": "none.jsonl"}, 3, "none.jsonl", id="fault[D6]-no rows"),
    pytest.param(["--max-prompt-length", "3"], {}, 3, "--prompt-overflow", id="fault[D7]-long"),
    pytest.param([], {"dataset": "cut.jsonl"}, 3, "cut.jsonl:2", id="fault[D8]-cut line"),
    pytest.param([], {"reward": "./mine.py:nothing"}, 4, "nothing", id="reward misspelt"),
    pytest.param([], {"reward": "./broken.py:f"}, 4, "broken.py", id="fault[P1]-import"),
    pytest.param([], {"reward": "./mine.py:down"}, 6, "remote 503", id="fault[W1]-raises"),
    pytest.param([], {"reward": "./mine.py:nan"}, 6, "returned nan for item 0", id="fault[W2]-nan"),
    pytest.param([], {"reward": "./mine.py:short"}, 6, "returned 1 rewards, but 2", id="fault[W6]-length"),
    pytest.param([], {"reward": "./mine.py:scalar"}, 6, "scalar", id="fault[W7]-scalar"),
    pytest.param([], {"reward": "./mine.py:strings"}, 6, "returned str for item 0", id="fault[W8]-strings"),
]


@pytest.mark.parametrize(("words", "changes", "code", "text"), BEFORE_WEIGHTS)
def test_what_can_be_known_is_told_before_anything_is_loaded(words, changes, code, text, here, capsys):
    write("columns.jsonl", [{"q": "a", "answer": "1"}])
    write("reward.jsonl", [{"prompt": "a", "ans": "1"}])
    write("null.jsonl", [ROWS[0], {"prompt": None, "answer": "1"}])
    write("empty.jsonl", [ROWS[0], {"prompt": " ", "answer": "1"}])
    write("none.jsonl", [])
    write("cut.jsonl", [ROWS[0], '{"prompt": "a", "ans'])
    Path("broken.py").write_text("import no_such_module_anywhere\n")
    got, err = told(capsys, job(*words, **changes))
    assert (got, text in err) == (code, True), (got, err)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("reward", "text"),
    [("down_later", "remote 503"), ("nan_later", "returned nan"), ("short_later", "returned 1 rewards")],
    ids=["fault[W1]", "fault[W2]", "fault[W6]"],
)
def test_a_reward_that_fails_later_loses_nothing(reward, text, here, capsys):
    code, err = told(capsys, job(reward=f"./mine.py:{reward}"))
    assert code == 6 and text in err and "mine.py" in err
    assert Path("out/checkpoint-2").is_dir()
    assert json.loads(Path("out/manifest.json").read_text())["status"] == "failed"


def test_a_second_run_does_not_touch_the_first(here, capsys):  # fault[C8]
    assert main(job("--max-steps", "1")) == 0
    assert capsys.readouterr().out.splitlines()[0] == "plan"
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    code, err = told(capsys, job("--max-steps", "1"))
    assert code == 2 and "out already contains a run" in err and "--overwrite-output-dir" in err
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


def test_a_critical_callback_stops_the_run_and_is_named(here, capsys):  # fault[P7]
    code, err = told(capsys, job("--callback", "./plugin.py:Critical"))
    assert code != 0 and "Critical" in err and "on_step_end" in err and "no disk for my table" in err
    assert Path("out/checkpoint-1").is_dir()


def test_an_observer_that_fails_is_switched_off(here, capsys):  # fault[P8]
    assert main(job("--max-steps", "2", "--callback", "./plugin.py:Observer")) == 0
    done = capsys.readouterr()
    assert "held-out" in done.out or "done: out" in done.out


def test_hostile_prompts_are_only_text(here, capsys):
    nasty = [
        "\x1b[2J\x1b]0;owned\x07",
        "[red]markup[/red]",
        "\u202egnp.exe",
        "<|end|>\u0000",
        "💥" * 20,
        "{{ 7*7 }}",
    ]
    write("nasty.jsonl", [{"prompt": f"{text} and 1 plus 1?", "answer": "2"} for text in nasty])
    code = main(job("--max-steps", "1", "--log-completions", "-1", dataset="nasty.jsonl"))
    out, err = capsys.readouterr()
    assert code in (0, 3), err
    assert "\x1b" not in out + err and "\u202e" not in out + err and "\x00" not in out + err


def shell(here: Path, words: list[str], *, limit: int | None = None, **env: str) -> subprocess.Popen[str]:
    def before() -> None:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "rlx", *words], cwd=here, env={**os.environ, **env},
        text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before,
    )  # fmt: skip


def test_a_dumb_terminal_without_unicode(here):  # fault[C14]
    run = shell(here, job("--max-steps", "1"), TERM="dumb", COLUMNS="1", LC_ALL="C", PYTHONIOENCODING="ascii")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "step 1/1" in out and out.isascii()


def test_whoever_reads_the_output_may_leave(here):  # fault[C13]
    run = shell(here, job())
    assert run.stdout.readline() == "plan\n"
    run.stdout.close()
    err = run.stderr.read()
    assert run.wait(timeout=120) == 0, err
    assert "Traceback" not in err and Path("out/value_head.safetensors").exists()


def test_a_full_disk_is_told(here):
    run = shell(here, job("--max-steps", "1"), limit=200_000)  # the policy takes more than a megabyte
    _, err = run.communicate(timeout=120)
    assert run.returncode == 9, err
    assert "Traceback" not in err and len(err.splitlines()) <= 14
    assert not Path("out/model.safetensors").exists()


def test_ctrl_c_while_loading_leaves_nothing(here):
    run = shell(here, job())
    time.sleep(1.5)  # torch is being imported
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130 and "Traceback" not in err, err
    assert "interrupted" in err
