"""Signals to a real run, its resume, and what a failing reward leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlx.core.checkpoint import verify
from rlx.core.config import from_mapping
from rlx.core.errors import ConfigError, RewardError
from rlx.core.signals import Signals

JOB = {"max_steps": 6, "save_steps": 2, "save_total_limit": None, "progress": "plain", "eval_steps": 100}


class One:
    num_processes = 1


def test_the_first_signal_asks_and_the_second_one_stops(capfd):
    signals = Signals()
    old = signal.getsignal(signal.SIGTERM)
    with signals.caught():
        assert signals.agreed(One()) == (None, False)
        signal.raise_signal(signal.SIGTERM)
        assert signals.agreed(One()) == (signal.SIGTERM, False)
        assert "SIGTERM: saving after this step; once more stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is old


def test_fault_r6_a_closed_terminal_counts_as_sigterm():
    signals = Signals()
    with signals.caught():
        signal.raise_signal(signal.SIGHUP)
    assert signals.agreed(One()) == (signal.SIGTERM, False)


def test_fault_r5_sigusr1_asks_for_a_checkpoint_and_the_run_goes_on(small):
    from rlx import hookimpl
    from rlx.core.run import prepare, train

    class Ask:
        @hookimpl
        def on_step_end(self, run):
            if run.global_step == 2:
                signal.raise_signal(signal.SIGUSR1)

    run = prepare(**small(max_steps=3, callback=Ask()))
    train(run)
    assert [path.name for path in run.path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert run.global_step == 3


def test_fault_r3_a_signal_inside_a_step_ends_the_run_after_it(small):
    from rlx import hookimpl
    from rlx.core.errors import Interrupted
    from rlx.core.run import prepare, reopen, train

    class Stop:
        def __init__(self, times):
            self.times = times

        @hookimpl
        def on_loss(self, run):
            if run.global_step == 3 and self.times:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGTERM)
                self.times = 0

    options = small(**{**JOB, "progress": "none"})
    with pytest.raises(Interrupted) as caught:
        train(prepare(**options, callback=Stop(1)))
    folder = Path(options["output_dir"])
    assert caught.value.exit_code == 143 and caught.value.hint == f"rlx resume {folder}"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(
        Interrupted, match="stopped at once in step 4 of 6; checkpoint-2 is the last"
    ) as caught:
        train(prepare(**{**options, "output_dir": "twice", "callback": Stop(2)}))
    assert caught.value.exit_code == 143
    assert [p.name for p in Path("twice").glob("*checkpoint*")] == [
        "checkpoint-2"
    ]  # old one intact, no leftovers
    assert verify(Path("twice/checkpoint-2")) is None
    with pytest.raises(ConfigError, match="another process") as locked:
        first = reopen("twice", {"callback": []})
        try:
            reopen("twice", {"callback": []})
        finally:
            first.close()
    assert locked.value.exit_code == 2


# Real processes


@pytest.fixture
def spawn(small, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    (tmp_path / "job.yaml").write_text(from_mapping(small(**JOB)).to_yaml())
    running = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlx", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PAUSE": "0.4"},
        )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"{text!r} never came: {process.stderr.read()}")


def log(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time/" not in k and "second" not in k} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_fault_r1_r3_an_interrupted_run_resumes_to_the_same_end(signum, spawn, tmp_path):
    process = spawn("run", "job.yaml", "--output-dir", "cut")
    wait_for(process, "step 3/6")
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert "everything is saved" in err and "rlx resume cut" in err and "Traceback" not in err
    assert sorted(tmp_path.glob("cut/checkpoint-*"))[-1].name in (
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-5",
    )
    resumed = spawn("resume", "cut")
    whole = spawn("run", "job.yaml", "--output-dir", "whole")
    for process in (resumed, whole):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    again = spawn("resume", "cut")
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and "is finished" in out
    more = spawn("resume", "cut", "--override", "max_steps=7")
    out, err = more.communicate(timeout=120)
    assert more.returncode == 0 and "step 7/7" in out, err


def test_a_reward_that_fails_costs_no_step(small, tmp_path):
    """fault[W1]: the checkpoint of the last whole step is there; a mended reward goes on from it."""
    from rlx.core.run import prepare, reopen, train

    mended = (tmp_path / "graded.py").read_text()
    broken = mended + (
        "\n\nclass Breaks(Remembering):\n    def __call__(self, completions, answer, **_):\n"
        "        if self.count == AT:\n            raise RuntimeError('remote 503')\n"
        "        return super().__call__(completions, answer)\n"
    )
    (tmp_path / "graded.py").write_text(broken.replace("AT", "-1"))
    options = small(max_steps=4, reward="./graded.py:Breaks", logging_steps=3)
    whole = prepare(**{**options, "output_dir": "whole"})
    train(whole)
    (tmp_path / "graded.py").write_text(broken.replace("AT", "16"))
    with pytest.raises(RewardError) as caught:
        train(prepare(**options))
    assert caught.value.exit_code == 6
    folder = Path(options["output_dir"])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    (tmp_path / "graded.py").write_text(broken.replace("AT", "-1"))
    run = reopen(folder, {"reward": True})
    train(run)
    assert (folder / "model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert log(folder) == log(Path("whole"))


def test_an_evaluation_that_fails_is_done_again_after_the_resume(small):
    from rlx import hookimpl
    from rlx.core.run import prepare, reopen, train

    class Fails:
        @hookimpl
        def on_evaluate(self, run):
            if run.global_step == 2:
                raise RewardError("the judge is away")

    options = small(max_steps=2, logging_steps=5)
    whole = prepare(**{**options, "output_dir": "whole"})
    train(whole)
    with pytest.raises(RewardError):
        train(prepare(**options, callback=Fails()))
    run = reopen(options["output_dir"], {"callback": []})
    train(run)
    assert log(run.path) == log(Path("whole")) and "eval/reward" in log(run.path)[-1]
