"""Whole runs whose rewards are asked while completions are sampled: they end as runs end without that."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

import rlx
from rlx.core.decoding import Run as Decoding
from rlx.core.errors import Interrupted, MemoryExhausted, RewardError
from rlx.core.evaluate import evaluate
from rlx.core.run import prepare, train
from rlx.testing.runs import Left, killed_and_resumed, train_in_two_processes

PIECEWISE = """
import asyncio

import rlx

CALLS = []


class Piecewise(rlx.Reward):
    independent = True
    chunk_size = 2

    def __init__(self, config):
        pass

    def __call__(self, *, completions, completion_ids, answer, run_step=None, **columns):
        CALLS.append(len(completions))
        right = [str(number) in text for text, number in zip(completions, answer)]
        return rlx.Rewarded(
            [len(text) / 40 + one for text, one in zip(completions, right)],
            metrics={"asked": float(len(completions)), "tokens": [len(ids) / 3 for ids in completion_ids]},
            columns={"right": right, "step": [run_step or 0] * len(right)},
        )


class Later(Piecewise):
    async def __call__(self, *, completion_ids, **columns):
        await asyncio.sleep(0.001)
        return [[token / 1000 for token in ids] for ids in completion_ids]


class Failing(Piecewise):
    def __call__(self, *, run_step=None, completions, **columns):
        if run_step == 3:
            raise ConnectionError("the line is down")
        return [0.1] * len(completions)


def ranked(completions):
    order = sorted(completions)
    return [order.index(text) / 10 for text in completions]
"""
REWARDS = [f"./piecewise.py:{name}" for name in ("ranked", "Piecewise", "Later")]


@pytest.fixture
def piecewise(small, tmp_path):
    (tmp_path / "piecewise.py").write_text(PIECEWISE)

    def options(name="run", **changes):
        given = {
            "reward": REWARDS, "log_completions": -1, "max_steps": 3, "num_generations": 2, "eval_steps": 2,
            "max_completion_length": 24,
        }  # fmt: skip
        return small(**{**given, "output_dir": str(tmp_path / name), **changes})

    return options


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "rlx-overlap"]


def calls(run):
    """Lengths of the calls of Piecewise since they were last asked for."""
    (fn,) = [reward.fn for reward in run.studio.rewards.rewards if reward.name == "Piecewise"]
    made = type(fn).__call__.__globals__["CALLS"]
    found = list(made)
    made.clear()
    return found


@pytest.mark.parametrize("generator", ["native", "transformers"])
def test_a_run_ends_as_without_it_bit_for_bit(piecewise, generator):
    left, made = [], []
    for overlap_rewards in (True, False):
        run = prepare(**piecewise(str(overlap_rewards), overlap_rewards=overlap_rewards, generator=generator))
        calls(run)
        train(run)
        made.append(calls(run))
        left.append(Left.by(run.path))
    assert left[0].same(left[1])
    assert sum(made[0]) == sum(made[1]) == 3 * 16 + 3 * 4
    assert len(made[1]) == 6 and len(made[0]) > 12
    assert {line["reward/Piecewise/asked"] for line in left[0].lines if "reward" in line} == {16.0}
    assert not threads()


def test_a_run_that_was_killed_and_resumed_ends_as_one_that_was_not(piecewise):
    options = {"save_steps": 1, "max_steps": 4}
    whole = prepare(**piecewise("whole", **options))
    train(whole)
    again = killed_and_resumed(piecewise("again", **options), after=2)
    assert Left.by(again).same(Left.by(whole.path))


@pytest.mark.slow
def test_two_processes_end_as_without_it(piecewise):
    changes = {"batch_size": 4, "max_rows": 7, "max_steps": ..., "num_train_epochs": 1.0}
    train_in_two_processes(
        [piecewise(name, overlap_rewards=name == "with", **changes) for name in ("with", "without")]
    )
    assert Left.by(Path("with")).same(Left.by(Path("without")))


def test_the_first_call_begins_before_the_last_token_is_drawn(piecewise, monkeypatch):
    begun, seen, draw = threading.Event(), [], Decoding.draw

    def noting(self, *given):
        if int(self.stopped.sum()) >= 2 and not seen:  # two are complete: they were handed over
            seen.append(begun.wait(20))
        return draw(self, *given)

    def asked(completions):
        begun.set()
        return [0.0 for _ in completions]

    asked.independent, asked.chunk_size = True, 2
    run = prepare(**piecewise(reward=[asked]))
    begun.clear()  # it was tried already
    monkeypatch.setattr(Decoding, "draw", noting)
    run.roll_out()
    assert seen == [True]
    begun.clear()
    seen.clear()
    run.global_step = run.total_steps
    evaluate(run)
    assert seen == [True]
    run.close()


def test_when_memory_runs_out_what_was_told_before_counts_for_nothing(piecewise, monkeypatch):
    draw, tried = Decoding.draw, []

    def small(self, *given):
        if int(self.stopped.sum()) >= 5 and not tried:
            tried.append(True)
            raise torch.OutOfMemoryError("planted")
        return draw(self, *given)

    monkeypatch.setattr(Decoding, "draw", small)
    found = []
    for overlap_rewards in (True, False):
        tried.clear()
        run = prepare(**piecewise(str(overlap_rewards), overlap_rewards=overlap_rewards))
        calls(run)
        found.append(run.roll_out())
        assert tried and run.studio.sampling.batch_size == 8
        run.close()
    one, other = found
    assert one.texts == other.texts and one.reward_columns == other.reward_columns
    assert torch.equal(one.score, other.score) and torch.equal(one.token_scores, other.token_scores)
    assert one.metrics["reward/Piecewise/asked"].tolist() == [16.0]

    def never(self, *given):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Decoding, "draw", never)
    run = prepare(**piecewise("never"))
    with pytest.raises(MemoryExhausted, match="sampling one completion"):
        run.roll_out()
    run.close()
    assert not threads()


def test_a_reward_that_raises_stops_the_run_as_it_did(piecewise):
    errors = []
    for overlap_rewards in (True, False):
        reward = "./piecewise.py:Failing"
        run = prepare(
            **piecewise(str(overlap_rewards), reward=reward, max_steps=4, overlap_rewards=overlap_rewards)
        )
        with pytest.raises(RewardError, match="reward 'Failing' raised ConnectionError") as caught:
            train(run)
        errors.append(caught.value)
        assert isinstance(caught.value.__cause__, ConnectionError)
        assert run.global_step == 2 and (run.path / "checkpoint-2").exists()
        assert json.loads((run.path / "manifest.json").read_text())["exit"] == 6
        assert not threads()
    assert [(e.what, e.code, e.got, e.hint) for e in errors[:1]] == [
        (e.what, e.code, e.got, e.hint) for e in errors[1:]
    ]


def test_where_memory_ran_out_it_is_not_asked_how_much_there_is(piecewise, monkeypatch):
    """On a GPU what had filled it is still held there, and next to nothing would seem to fit."""
    draw, tried = Decoding.draw, []

    def small(self, *given):
        if not tried:
            tried.append(True)
            raise torch.OutOfMemoryError("planted")
        return draw(self, *given)

    monkeypatch.setattr(Decoding, "draw", small)
    monkeypatch.setattr("rlx.core.rollout.rows_that_fit", lambda *given: 1 if tried else 1000)
    run = prepare(**piecewise())
    run.roll_out()
    assert tried and run.studio.sampling.batch_size == 8  # half of 16
    run.close()


def test_ctrl_c_while_sampling_leaves_no_thread(piecewise, monkeypatch):
    draw = Decoding.draw

    def interrupted(self, *given):
        if int(self.stopped.sum()) >= 5 and run.global_step == 1:
            raise KeyboardInterrupt
        return draw(self, *given)

    run = prepare(**piecewise())
    monkeypatch.setattr(Decoding, "draw", interrupted)
    with pytest.raises(Interrupted):
        train(run)
    assert json.loads((run.path / "manifest.json").read_text())["status"] == "interrupted"
    assert not threads()


def test_the_plan_says_which_rewards_are_asked_while_sampling_goes_on(piecewise):
    said = "asked while completions are still sampled, 2 at a time: Piecewise, Later"
    for changes, expected in (
        ({}, True),
        ({"overlap_rewards": False}, False),
        ({"reward": REWARDS[:1]}, False),
        ({"batch_size": 1, "num_generations": 2, "num_mini_batches": 1}, False),  # one call has them all
    ):
        run = prepare(**piecewise(**changes, overwrite_output_dir=True))
        assert (said in run.plan) == expected
        run.close()


@pytest.mark.parametrize(("processes", "expected"), [(1, True), (2, False)])
def test_the_plan_counts_the_completions_of_one_process(piecewise, monkeypatch, processes, expected):
    monkeypatch.setenv("WORLD_SIZE", str(processes))  # each of two has one prompt, and asks once
    options = piecewise(batch_size=2, num_generations=2, num_mini_batches=1)
    plan = rlx.run(**options, dry_run=True).plan
    assert any("2 at a time: Piecewise, Later" in line for line in plan) == expected
