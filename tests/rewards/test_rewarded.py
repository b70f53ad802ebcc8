"""What a reward may tell beside its values: metrics, columns, and items that failed."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
import torch

import rlx
from rlx.core.batch import Prompts, Rollouts, Sequences
from rlx.core.errors import RewardError
from rlx.core.scoring import NamedReward, RewardRunner


def run(fn, count=3, **options):
    rows = Prompts([[1]] * count, ["?"] * count, [None] * count, {}, [10 + i for i in range(count)])
    runner = RewardRunner([NamedReward("mine", fn)], **options)
    return runner.score(rows, list("abc")[:count], [[1, 2]] * count)


def rewarded(**told):
    return lambda completions: rlx.Rewarded([1.0, 2.0, 3.0], **told)


def test_metrics_and_columns_stand_beside_the_values():
    def mine(completions):
        return rlx.Rewarded(
            values=[1.0, None, [0.25, 0.5]],
            metrics={
                "rate": 0.5,
                "each": [1.0, None, 4],
                "none": [None] * 3,
                "tensor": torch.tensor([1, 2, 3]),
            },
            columns={"answer": ["x", None, ""], "n": [1, 2.5, True]},
        )

    scored = run(mine)
    assert scored.rewards["mine"].tolist()[::2] == [1.0, 0.75] and scored.rewards["mine"].isnan().tolist()[1]
    seconds = scored.metrics.pop("reward/mine/seconds")
    assert len(seconds) == 1 and seconds[0] > 0
    assert scored.metrics == {
        "reward/mine/rate": [0.5], "reward/mine/each": [1.0, 4.0], "reward/mine/none": [],
        "reward/mine/tensor": [1.0, 2.0, 3.0],
    }  # fmt: skip
    assert scored.columns == {"mine/answer": ["x", None, ""], "mine/n": [1, 2.5, True]}


def test_an_async_reward_may_tell_as_much():
    async def later(completions):
        await asyncio.sleep(0)
        return rlx.Rewarded([1.0, 2.0, 3.0], {"m": 2.0}, {"c": [1, 2, 3]})

    scored = run(later)
    assert scored.metrics["reward/mine/m"] == [2.0] and scored.columns == {"mine/c": [1, 2, 3]}


def test_two_rewards_of_one_name_tell_under_names_of_their_own():
    fn = rewarded(metrics={"m": 1.0}, columns={"c": [1, 2, 3]})
    rows = Prompts([[1]] * 3, ["?"] * 3, [None] * 3, {}, [0, 1, 2])
    scored = RewardRunner([NamedReward("a", fn), NamedReward("a", fn)]).score(rows, ["x"] * 3, [[1]] * 3)
    assert {"reward/a/m", "reward/a_2/m"} <= set(scored.metrics)
    assert set(scored.columns) == {"a/c", "a_2/c"}


@pytest.mark.parametrize(
    "values", [np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)]
)
@pytest.mark.filterwarnings("ignore:reward 'mine' returned a tensor that requires grad")
def test_values_may_be_whatever_a_reward_returns_alone(values):
    assert run(lambda completions: rlx.Rewarded(values)).score.tolist() == [1.0, 2.0, 3.0]


NAN = float("nan")
WRONG = [
    ({"metrics": [1.0]}, "returned list as its metrics"),
    ({"columns": 3}, "returned int as its columns"),
    ({"metrics": {"": 1.0}}, "returned a metric under an unfit name"),
    ({"metrics": {"a b": 1.0}}, "returned a metric under an unfit name"),
    ({"metrics": {"a/b": 1.0}}, "returned a metric under an unfit name"),
    ({"metrics": {3: 1.0}}, "returned a metric under an unfit name"),
    ({"metrics": {"seconds": 1.0}}, "returned a metric under an unfit name"),
    ({"metrics": {"errors": 1.0}}, "returned a metric under an unfit name"),
    ({"columns": {"\x1b[2J": ["", "", ""]}}, "returned a column under an unfit name"),
    ({"metrics": {"m": NAN}}, "returned nan in its metric 'm'"),
    ({"metrics": {"m": [1.0, 2.0, NAN]}}, "returned nan in its metric 'm'"),
    ({"metrics": {"m": "high"}}, "returned str in its metric 'm'"),
    ({"metrics": {"m": None}}, "returned None in its metric 'm'"),
    ({"metrics": {"m": [1.0, 2.0]}}, "returned a metric 'm' that is not one value a completion"),
    ({"columns": {"c": [1, 2]}}, "returned a column 'c' that is not one value a completion"),
    ({"columns": {"c": "xyz"}}, "returned a column 'c' that is not one value a completion"),
    ({"columns": {"c": [1, 2, NAN]}}, "returned float in its column 'c'"),
    ({"columns": {"c": [1, 2, [3]]}}, "returned list in its column 'c'"),
    ({"columns": {"c": [1, 2, object()]}}, "returned object in its column 'c'"),
]


@pytest.mark.parametrize(("told", "what"), WRONG)
def test_what_cannot_be_written_down_is_an_error_that_names_it(told, what):
    with pytest.raises(RewardError) as caught:
        run(rewarded(**told))
    assert caught.value.what == f"reward 'mine' {what}"
    assert "\x1b" not in str(caught.value) and caught.value.expected


def test_under_a_policy_a_result_that_tells_nonsense_counts_as_unusable():
    with pytest.warns(UserWarning, match="unfit name"):
        scored = run(rewarded(metrics={"a b": 1.0}), on_error="value", error_value=-1.0)
    assert scored.score.tolist() == [-1.0] * 3 and scored.metrics["reward/mine/errors"] == [3.0]


def test_wrong_values_are_told_as_ever():
    with pytest.raises(RewardError, match="returned 1 rewards, but 3 were expected"):
        run(lambda completions: rlx.Rewarded([1.0]))


def failing(completions):
    return [1.0, rlx.Failed("took longer than 5 s \x1b[2J", "raise the time-out"), 3.0]


def test_an_item_that_failed_stops_the_run_and_names_its_row():
    with pytest.raises(RewardError) as caught:
        run(failing)
    error = caught.value
    assert error.what == "reward 'mine' failed for item 1" and "data row 11: 'b'" in error.where
    assert error.got == "took longer than 5 s \\x1b[2J" and "raise the time-out" in error.hint


@pytest.mark.parametrize(("policy", "score"), [("none", NAN), ("value", -2.0)])
def test_under_a_policy_only_the_item_that_failed_is_replaced_and_counted(policy, score):
    with pytest.warns(UserWarning, match="failed for item 1"):
        scored = run(failing, on_error=policy, error_value=-2.0)
    expected = torch.tensor([1.0, score, 3.0])
    assert torch.equal(scored.score.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert scored.metrics["reward/mine/errors"] == [1.0]


def test_columns_follow_their_completions_when_a_batch_is_cut():
    rows = Prompts([[1]] * 3, ["?"] * 3, [None] * 3, {}, [0, 1, 2])
    batch = Rollouts(
        Sequences.from_lists([[1]] * 3, [[2], [3, 3], [4]]),
        prompts=rows, texts=["a", "b", "c"], finished=torch.ones(3, dtype=torch.bool),
        reward_columns={"mine/c": ["x", "y", None]},
    )  # fmt: skip
    assert batch.take(torch.tensor([2, 0])).reward_columns == {"mine/c": [None, "x"]}
    assert batch.to("cpu").reward_columns == batch.reward_columns
    assert dataclasses.replace(batch, reward_columns=None).take(torch.tensor([1])).reward_columns is None


def test_close_reaches_every_reward_that_has_one():
    class Holder:
        closed = 0

        def __call__(self, *, completions):
            return [0.0] * len(completions)

        def close(self):
            self.closed += 1

    one = Holder()
    RewardRunner([NamedReward("a", one), NamedReward("b", lambda completions: [0.0])]).close()
    assert one.closed == 1
