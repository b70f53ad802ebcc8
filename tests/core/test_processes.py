"""Two processes train what one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAMS = Path(__file__).parent / "programs"
EVENTS = ("on_run_start", "on_loss", "on_step_end", "on_log", "on_evaluate")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors") | load_file(folder / "value_head.safetensors")


def log(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time/" not in k and "second" not in k} for line in lines]


def both(program: str, jobs: object) -> subprocess.CompletedProcess[str]:
    """What two processes of a program did and said."""
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(PROGRAMS / program), json.dumps(jobs),
        ],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_fault_x1_x15_a_callback_that_fails_on_one_process_ends_both(small):
    """At the same place, with its own error on that process and exit code 10 on the other."""
    done = both("failing_callbacks.py", small(max_steps=3, eval_steps=1, num_mini_batches=1, batch_size=4))
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:6000]
    # In the middle of a step, or before the first one, there is nothing to keep that a checkpoint could hold.
    kept = {event: "[]" if event in ("on_run_start", "on_loss") else "['checkpoint-1']" for event in EVENTS}
    after = {event: {"on_run_start": 0}.get(event, 1) for event in EVENTS}
    for event in EVENTS:
        for place, failed in (("before", 1), ("after", 0)):
            for process in (0, 1):
                error = "OSError 1" if process == failed else "PeerError 10"
                told = f"{event}-{place} ended with {error} after {after[event]}, kept {kept[event]}"
                assert f"process {process}: {told}" in said
    assert {f"process {process}: observer ended well" for process in (0, 1)} <= set(said)
    assert any(line.startswith("process 0: judge ended with PeerError 10") for line in said)
    assert any(line.startswith("process 1: judge ended with RewardError 6") for line in said)
    for name, first, second in (
        ("log", "OSError", "PeerError"), ("full-log", "SaveError", "PeerError"),
        ("prepare", "PeerError", "OSError"),
        ("swallowed", "PeerError", "OSError"), ("measure", "OSError", "PeerError"),
    ):  # fmt: skip
        assert f"process 0: {name} ended with {first}" in said
        assert f"process 1: {name} ended with {second}" in said


@pytest.mark.slow
def test_one_agreement_inside_another():
    """Whoever failed, and where: both end at the same place, and ask each other equally often."""
    done = both("agreements.py", {})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:6000]
    own, inner = "ValueError: on purpose", "PeerError: [E-PEER] another process failed in the inner"
    outer = inner.replace("inner", "outer")
    ended = {
        "well": ("nothing: ", "nothing: ", False),
        "within": (inner, own, True),
        "heard": (inner, own, True),
        "added": ("nothing: ", "nothing: ", False),
        "after": (own, outer, True),
        "late": (own, outer, True),
    }
    for name, (first, second, together) in ended.items():
        for process, said in enumerate((first, second)):
            line = f"process {process}: {name}: {said} together {together} met 200"
            assert line in done.stdout.splitlines(), done.stdout


@pytest.mark.slow
def test_fault_x5_x10_x13_two_processes_are_one(small, tmp_path):
    from rlx.core.run import prepare, train

    runs = [
        small(output_dir="even", max_steps=2),
        # The last batch has 3 rows, or one: then a process has none.
        small(output_dir="three", batch_size=4, max_rows=11, max_steps=..., num_train_epochs=1.0),
        small(output_dir="one", batch_size=4, max_rows=9, max_steps=..., num_train_epochs=1.0),
        small(
            output_dir="saved", max_steps=4, save_steps=1, save_total_limit=None, logging_steps=3,
            reward="./graded.py:Remembering",
        ),
    ]  # fmt: skip
    done = both("two_processes.py", {"runs": runs})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    for number in (0, 1):
        assert f"process {number}: refused E-CONFIG-OUTPUT" in done.stdout
        assert f"process {number}: diverged at 0, unmoved True" in done.stdout
        assert f"process {number}: folder even" in done.stdout
        assert f"process {number}: group at exit False" in done.stdout
        assert f"process {number}: recomputes True in pieces of 2048" in done.stdout
        why = ("ointing: on, as another process needs it", "more without, and 0 B are free")[number]
        planned = next(line for line in done.stdout.splitlines() if f"process {number}: planned" in line)
        assert "planned True in pieces of 1024" in planned and planned.endswith(why)
        assert f"process {number}: ended with {(10, 6)[number]} after 1, saved True" in done.stdout
        assert f"process {number}: ended with {('ZeroDivisionError', 'PeerError')[number]}" in done.stdout
    assert "process 0: alone ended with OSError after 2, [1, 2]: another process asked for it" in done.stdout
    assert "process 1: alone ended with PeerError after 2, [1, 2]: enough" in done.stdout
    for options in runs[:3]:
        alone = prepare(**{**options, "output_dir": f"{options['output_dir']}-alone"})
        start = {name: p.detach().clone() for name, p in alone.policy.model.state_dict().items()}
        train(alone)
        one, two = weights(alone.path), weights(tmp_path / options["output_dir"])
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
        assert max(float((one[name] - start[name]).abs().max()) for name in one if name in start) > 1e-5
        for mine, theirs in zip(log(alone.path), log(tmp_path / options["output_dir"]), strict=True):
            assert mine["reward"] == pytest.approx(theirs["reward"]) if "reward" in mine else True
            assert mine.get("tokens") == theirs.get("tokens")
    even, short = weights(tmp_path / "even"), weights(tmp_path / "short")
    assert all(torch.equal(even[name], short[name]) for name in even)
    whole, again = weights(tmp_path / "saved"), weights(tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert log(tmp_path / "saved") == log(tmp_path / "again")


@pytest.mark.slow
def test_reference_log_probs_that_only_one_process_has_kept_are_taken_anew_by_both(tmp_path):
    """As on two machines, each with a cache: else one would wait for the other for ever."""
    done = both("own_caches.py", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]  # the first of a machine keeps them
    assert done.stdout.count("taken once") == 4
