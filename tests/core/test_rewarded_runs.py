"""Runs whose rewards tell metrics and columns, or hold worker processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import rlx
from rlx.core.commands.main import main
from rlx.core.errors import ConfigError, RlxError
from rlx.core.run import prepare, reopen, train

TELLING = """
import os
from pathlib import Path

import rlx


def double(number):
    return 2 * number


class Telling(rlx.Reward):
    def __init__(self, config):
        self.workers = rlx.Workers(double, count=1, deadline=60.0)

    def __call__(self, *, completions, completion_ids, **columns):
        numbers = self.workers.map([[len(ids)] for ids in completion_ids])
        Path(f"pids-{os.getpid()}").write_text(str(self.workers.pids[0]))
        return rlx.Rewarded(
            [float(number) for number in numbers],
            metrics={"doubled": [float(number) for number in numbers], "batch": 3.0},
            columns={"tokens": [number // 2 for number in numbers]},
        )

    def close(self):
        self.workers.close()

"""


@pytest.fixture
def telling(small, tmp_path):
    (tmp_path / "telling.py").write_text(TELLING)
    return lambda **changes: small(**{"reward": "./telling.py:Telling", "log_completions": -1, **changes})


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_what_a_reward_tells_is_logged_in_training_and_evaluation_and_its_workers_end(telling, tmp_path):
    run = prepare(**telling(max_steps=2, max_eval_rows=4))
    train(run)
    metrics, samples = lines(run.path, "metrics.jsonl"), lines(run.path, "completions.jsonl")
    trained = [line for line in metrics if "reward" in line]
    evaluated = [line for line in metrics if "eval/reward" in line]
    assert len(trained) == 2 and evaluated
    for line in trained:
        assert line["reward/Telling/doubled"] == pytest.approx(2 * line["completion/length"])
        assert line["reward/Telling"] == line["reward/Telling/doubled"]
        assert line["reward/Telling/batch"] == 3.0
        assert line["reward/Telling/seconds"] > 0
    for line in evaluated:
        assert line["eval/reward/Telling/doubled"] == pytest.approx(2 * line["eval/completion/length"])
        assert line["eval/reward/Telling/batch"] == 3.0 and "eval/reward/Telling/seconds" not in line
    assert {sample.get("eval", False) for sample in samples} == {True, False}
    assert all(sample["columns"] == {"Telling/tokens": len(sample["completion_ids"])} for sample in samples)
    assert not alive(int((tmp_path / f"pids-{os.getpid()}").read_text()))


def test_a_reward_is_told_the_step_that_stands_in_the_log(small, tmp_path):
    (tmp_path / "when.py").write_text(
        "def when(completions, run_step):\n"
        "    return [None if run_step is None else float(run_step) for _ in completions]\n"
    )
    run = prepare(**small(reward="./when.py:when", max_steps=3, eval_steps=2, max_eval_rows=4))
    train(run)
    metrics = lines(run.path, "metrics.jsonl")
    for name in ("reward/when", "eval/reward/when"):
        told = [(line["step"], line[name]) for line in metrics if name in line]
        assert len(told) >= 2 and all(step == value for step, value in told)


def test_a_run_that_is_closed_by_hand_leaves_no_worker(telling, tmp_path):
    run = prepare(**telling(max_steps=2))
    run.step()
    pid = int((tmp_path / f"pids-{os.getpid()}").read_text())
    assert alive(pid)
    run.close()
    assert not alive(pid)


def test_a_run_without_such_rewards_writes_no_columns(small):
    run = prepare(**small(max_steps=1, log_completions=-1))
    train(run)
    assert all("columns" not in sample for sample in lines(run.path, "completions.jsonl"))


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W5] always")])
def test_a_reward_that_never_applies_moves_no_weight_and_is_hinted_at(small, tmp_path, capfd, _):
    (tmp_path / "mute.py").write_text("def mute(completions):\n    return [None for _ in completions]\n")
    run = prepare(**small(reward="./mute.py:mute", max_steps=6, num_ppo_epochs=1))
    before = {name: p.detach().clone() for name, p in run.policy.trainable().items()}
    train(run)
    metrics = [line for line in lines(run.path, "metrics.jsonl") if "reward/unscorable" in line]
    assert [line["reward/unscorable"] for line in metrics] == [1.0] * 6
    assert not any("reward" in line or "reward/mute" in line for line in metrics)
    after = run.policy.trainable()
    assert all(bool((before[name] == after[name]).all()) for name in before)
    assert "More than half of the completions (100%) get no score" in "".join(capfd.readouterr())


@pytest.mark.slow
def test_metrics_of_two_processes_are_means_over_all_completions(telling, tmp_path):
    program = Path(__file__).parent / "programs" / "two_processes.py"
    # The last batch has 3 prompts: a mean of two means would weigh the one that is alone double.
    changes = {"batch_size": 4, "max_rows": 7, "max_steps": ..., "num_train_epochs": 1.0}
    options = telling(output_dir="two", **changes)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(program), json.dumps({"runs": [options], "go_on": False}),
        ],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    alone = prepare(**{**options, "output_dir": "alone"})
    train(alone)
    theirs, mine = lines(tmp_path / "two", "metrics.jsonl"), lines(alone.path, "metrics.jsonl")
    assert [line["step"] for line in mine if "reward" in line] == [1, 2]
    for one, two in zip(mine, theirs, strict=True):
        for name in ("reward/Telling/doubled", "reward/Telling/batch", "completion/length"):
            assert name not in one or two[name] == pytest.approx(one[name]), name
    pids = [int(path.read_text()) for path in tmp_path.glob("pids-*")]
    assert len(pids) >= 3 and not any(map(alive, pids))


class Held:
    """A reward, or what a judge asks, that counts how often it was closed."""

    built: ClassVar[list[Held]] = []

    def __init__(self):
        self.closed = 0
        self.built.append(self)

    def __call__(self, completions):
        return [float(len(text)) for text in completions]

    def judge(self, prompts, pairs):
        return [0] * len(pairs)

    def close(self):
        self.closed += 1


class Watching:
    closed = 0

    @rlx.hookimpl
    def on_run_end(self):
        pass

    def close(self):
        self.closed += 1


class Other(Watching):
    pass


@pytest.fixture
def held(monkeypatch):
    monkeypatch.setattr(Held, "built", [])
    module = types.ModuleType("held_rewards")
    module.Held = Held
    monkeypatch.setitem(sys.modules, "held_rewards", module)
    return lambda: [one.closed for one in Held.built]


JUDGED = {"algo": "online_dpo", "num_generations": 2, "num_ppo_epochs": ..., "num_mini_batches": ...}
ASKED = {"judge": {"name": "reward", "rewards": ["held_rewards:Held"]}}


def test_what_is_built_for_a_look_ahead_is_closed(small, held):
    rlx.run(**small(reward="held_rewards:Held"), dry_run=True)
    assert held() == [1]
    callback = {"name": "win_rate", "rewards": ["held_rewards:Held"]}
    rlx.run(**small(**JUDGED, **ASKED, reward="held_rewards:Held", callback=[callback]), dry_run=True)
    assert held() == [1, 1, 1, 1]
    mine = Watching()
    rlx.run(**small(reward="held_rewards:Held", callback=[mine]), dry_run=True)
    assert held() == [1] * 5 and mine.closed == 0  # an object of the caller's is not done with yet


def test_an_object_that_cannot_be_hashed_is_a_reward(small):
    @dataclass
    class Brevity:
        scale: float

        def __call__(self, completions):
            return [-self.scale * len(text) for text in completions]

    rlx.run(**small(reward=Brevity(0.1)), dry_run=True)


def test_every_built_in_callback_can_be_looked_ahead_at(small):
    watched = {"metric": "eval/reward"}
    needs = {"win_rate": {"rewards": ["length"]}, "early_stopping": watched, "best_checkpoint": watched}
    names = rlx.available("callback")
    rlx.run(**small(callback=[{"name": name, **needs.get(name, {})} for name in names]), dry_run=True)
    assert "rich_progress" in names


@pytest.mark.parametrize(
    "wrong",
    [{"columns": {"prompt": "nowhere"}}, {"model": "./nowhere"}, {"lora_target_modules": ["x"], "lora_r": 2}],
)
def test_a_run_that_cannot_be_prepared_closes_what_it_built(small, held, wrong):
    with pytest.raises(RlxError):
        prepare(**small(**JUDGED, **ASKED, **wrong, reward="held_rewards:Held"))
    assert held() == [1, 1]


def test_a_run_closes_its_judge_and_that_of_a_callback(small, held, capsys):
    callback = {"name": "win_rate", "rewards": ["held_rewards:Held"], "num_prompts": 2}
    rlx.run(**small(**JUDGED, judge="held_rewards:Held", reward=..., max_steps=1, callback=[callback]))
    assert held() == [1, 1]
    assert main(["compare", "tiny", "tiny", "--judge", "held_rewards:Held", "--num-prompts", "2"]) == 0
    assert held() == [1, 1, 1]


def test_one_that_cannot_be_closed_leaves_no_other_open(small, held):
    def stuck(completions):
        return [0.0 for _ in completions]

    def close():
        raise OSError("stuck")

    stuck.close = close
    run = prepare(**small(**JUDGED, reward=[stuck, "held_rewards:Held"], judge="held_rewards:Held"))
    with pytest.raises(OSError, match="stuck"):
        run.close()
    assert held() == [1, 1]


def test_a_run_that_cannot_go_on_closes_its_judge(small, held, monkeypatch):
    run = prepare(**small(**JUDGED, judge="held_rewards:Held", reward=..., max_steps=1, save_steps=1))
    train(run)
    monkeypatch.setattr("rlx.core.snapshot.restore", lambda run, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reopen(run.path)
    assert held() == [1, 1]


def test_callbacks_of_a_run_that_never_began_are_closed(small, held, monkeypatch):
    callback, mine = {"name": "win_rate", "rewards": ["held_rewards:Held"], "num_prompts": 2}, Watching()
    run = prepare(**small(callback=[callback, mine]))
    later = run.add_callback(Other())
    run.step()
    run.close()
    run.close()
    assert held() == [1] and mine.closed == later.closed == 0  # an object is its owner's
    run = prepare(**small(output_dir="again", callback=[callback], save_steps=1, max_steps=1))
    train(run)
    monkeypatch.setattr("rlx.core.snapshot.restore", lambda run, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reopen(run.path)
    assert held() == [1, 1, 1]


def test_a_callback_that_cannot_be_built_is_told_before_weights_load(small, held):
    callback = {"name": "win_rate", "rewards": ["held_rewards:Held", "lora:nowhere"]}
    with pytest.raises(ConfigError, match="'nowhere' does not exist"):
        rlx.run(**small(reward="held_rewards:Held", lora_r=2, callback=[callback]), dry_run=True)
    assert held()[0] == 1
