from __future__ import annotations

import math

import pytest

from rlx.callbacks.completions import LogCompletions
from rlx.core.samples import samples


@pytest.mark.parametrize("limit,written", [(0, 0), (2, 2), (-1, 3), (8, 3)])
def test_as_many_samples_are_written_as_asked(make_run, rollouts, limit, written):
    run = make_run(log_completions=limit)
    run.rollouts = rollouts(["a", "b", "c"], scores=[1.0, math.nan, 0.5])
    LogCompletions(None).on_log(run, {"step": 3, "reward": 1.0})
    lines = run.folder.read_completions()
    assert len(lines) == written
    if written == 3:
        assert [line["score"] for line in lines] == [1.0, None, 0.5]
        assert lines[0] == {
            "step": 3, "prompt": "What is 3 + 4?", "completion": "a", "score": 1.0,
            "rewards": {"exact_match": 1.0}, "finished": True, "row": 0, "data": {}, "completion_ids": [3],
        }  # fmt: skip


def test_an_evaluation_writes_its_own_samples_and_not_the_last_rollouts_again(make_run, rollouts):
    run = make_run()
    run.rollouts, run.evaluated = rollouts(["train"]), rollouts(["held out"])
    LogCompletions(None).on_log(run, {"step": 0, "eval/reward": 0.5})
    assert [(line["completion"], line["eval"]) for line in run.folder.read_completions()] == [
        ("held out", True)
    ]
    LogCompletions(None).on_log(run, {"step": 1, "reward": 0.5})
    assert [line["completion"] for line in run.folder.read_completions()] == ["held out", "train"]


def test_samples_are_of_different_prompts_where_possible(rollouts):
    import dataclasses

    import torch

    several = rollouts(["a", "b", "c", "d"])
    sequences = dataclasses.replace(several.sequences, groups=torch.tensor([0, 0, 1, 1]))
    several = dataclasses.replace(several, sequences=sequences)
    assert [sample["completion"] for sample in samples(several, 3)] == ["a", "c", "b"]
