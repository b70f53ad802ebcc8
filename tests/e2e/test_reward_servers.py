"""Whole runs whose reward is served: the numbers of the reward itself, and nothing lost when it fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import rlx
from rlx.core.errors import RewardError
from rlx.core.reward_requests import Served
from rlx.core.reward_server import RewardServer
from rlx.plugins.references import make

RUN = {
    "algo": "rloo", "batch_size": 8, "max_steps": 2, "max_rows": 64, "max_eval_rows": 8, "logging_steps": 1,
    "max_completion_length": 24, "plots": False, "progress": "none", "log_completions": -1, "seed": 3,
}  # fmt: skip
TOKEN = "S3CRET-TOKEN-OF-THE-TEST"


def numbers(result):
    """The log lines without times, the reward under one name."""
    timed = re.compile(r"time/|/seconds$|per_second|memory|/retries$|/failed$")
    lines = [
        {name: value for name, value in line.items() if not timed.search(name)} for line in result.metrics
    ]
    return [{name.replace("/http", "/exact_match"): value for name, value in line.items()} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize([], [pytest.param(id="fault[S10] fault[S17]")])
def test_a_served_reward_trains_as_the_reward_itself_and_ctrl_c_ends_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("RLX_REWARD_TOKEN", TOKEN)
    server = subprocess.Popen(
        [sys.executable, "-m", "rlx", "reward", "serve", "exact_match", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ, cwd=tmp_path,
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        assert line.startswith("reward exact_match at http://127.0.0.1:") and TOKEN not in line
        url = re.search(r"http://[^;]+", line)[0]
        served = rlx.run(
            **RUN,
            reward=[{"name": "http", "url": url, "token_env": "RLX_REWARD_TOKEN", "batch_size": 5}],
            output_dir=str(tmp_path / "served"),
        )
    finally:
        server.send_signal(signal.SIGINT)
        _, log = server.communicate(timeout=30)
    local = rlx.run(**RUN, reward="exact_match", output_dir=str(tmp_path / "local"))
    assert numbers(served) == numbers(local)
    rewards = [[sample["score"] for sample in result.completions] for result in (served, local)]
    assert rewards[0] == rewards[1] and set(rewards[0]) == {0.0, 1.0}
    # fault[S10]: a clean end, and nothing of what was scored in the log
    assert server.returncode == 0 and log.splitlines()[-1].endswith("stopped")
    assert " 5 items, native" in log and "Answer" not in log and "Traceback" not in log
    # fault[S17]: the token is nowhere in the run folder
    files = [path for path in Path(tmp_path / "served").rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(TOKEN.encode() in path.read_bytes() for path in files)
    assert b"token_env: RLX_REWARD_TOKEN" in (tmp_path / "served" / "config.yaml").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize([], [pytest.param(id="fault[W22]")])
def test_a_server_that_fails_for_ever_costs_no_whole_step(tmp_path):
    fine = threading.Event()
    reward, calls = make("reward", "exact_match"), []

    def exact(completions, answer):
        calls.append(len(completions))
        if len(calls) > 4 and not fine.is_set():  # the two trials, the evaluation, the first step
            raise RuntimeError("CUDA error")
        return reward(completions=completions, answer=answer)

    server = RewardServer(("127.0.0.1", 0), Served("exact_match", exact))
    server.say = lambda line: None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    folder = tmp_path / "run"
    given = {"name": "http", "url": server.url, "batch_size": 1000, "max_wait": 0.01}
    try:
        with pytest.raises(RewardError) as caught:
            rlx.run(**RUN, reward=[given], output_dir=str(folder))
        assert caught.value.exit_code == 6
        count = calls[3]
        assert f"failed 6 times (last: answered 500) for {count}/{count} items" in caught.value.got
        assert "CUDA error" in caught.value.got and "rlx resume" in caught.value.hint
        assert (folder / "checkpoint-1").is_dir()
        fine.set()
        resumed = rlx.resume(folder)
    finally:
        server.shutdown()
        server.server_close()
    local = rlx.run(**RUN, reward="exact_match", output_dir=str(tmp_path / "local"))
    assert numbers(resumed) == numbers(local)
