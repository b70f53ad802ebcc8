"""The reward runner: arguments, combination, async, state. Faults are in test_scoring_faults.py."""

import asyncio
import functools
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.batch import Prompts
from rlx.core.errors import CheckpointError, DataError, PluginError
from rlx.core.scoring import NamedReward, RewardRunner


def make_prompts(count, **columns):
    return Prompts(
        ids=[[1]] * count,
        texts=[f"prompt {i}" for i in range(count)],
        messages=[None] * count,
        columns=columns,
        rows=[100 + i for i in range(count)],
    )


def run(fn, completions, *, ids=None, prompts=None, **options):
    runner = RewardRunner([NamedReward("r", fn)], **options)
    ids = [list(range(len(text))) for text in completions] if ids is None else ids
    return runner.score(prompts or make_prompts(len(completions)), completions, ids)


def lengths(completions):
    return [len(text) for text in completions]


def same(tensor, expected):
    return torch.equal(torch.nan_to_num(tensor, nan=-999.0), torch.tensor(expected).nan_to_num(nan=-999.0))


# Arguments


def test_a_reward_gets_only_what_its_signature_takes():
    seen = {}

    def reward(completions, *, answer, level=0):
        seen.update(answer=answer, level=level)
        return lengths(completions)

    run(reward, ["a", "bb"], prompts=make_prompts(2, answer=["x", "y"], other=[1, 2]))
    assert seen == {"answer": ["x", "y"], "level": 0}


def test_only_a_reward_that_names_it_is_told_the_step():
    told = []

    def asks(completions, run_step):
        told.append(run_step)
        return [0.0 for _ in completions]

    def takes_all(**everything):
        told.append("run_step" in everything)
        return [0.0 for _ in everything["completions"]]

    runner = RewardRunner([NamedReward("asks", asks), NamedReward("takes_all", takes_all)])
    assert runner.columns_needed == {}
    runner.score(make_prompts(1), ["a"], [[0]], 7)
    runner.score(make_prompts(1), ["a"], [[0]])
    assert told == [7, False, None, False]


def test_a_reward_with_keywords_gets_everything():
    seen = {}

    def reward(**everything):
        seen.update(everything)
        return [0.0]

    run(reward, ["abc"], prompts=make_prompts(1, answer=["x"]))
    assert seen == {
        "prompts": ["prompt 0"],
        "prompt_texts": ["prompt 0"],
        "completions": ["abc"],
        "completion_ids": [[0, 1, 2]],
        "answer": ["x"],
    }


def test_conversations_arrive_as_messages_and_as_text():
    talk = [{"role": "user", "content": "hi"}]
    prompts = Prompts(
        ids=[[1], [2]], texts=["<user>hi", "plain"], messages=[talk, None], columns={}, rows=[0, 1]
    )
    seen = {}

    def reward(prompts, prompt_texts, completions):
        seen.update(prompts=prompts, texts=prompt_texts)
        return lengths(completions)

    run(reward, ["a", "b"], prompts=prompts)
    assert seen == {"prompts": [talk, "plain"], "texts": ["<user>hi", "plain"]}


def test_a_column_with_a_standard_name_does_not_hide_the_completions():
    assert run(lengths, ["abc"], prompts=make_prompts(1, completions=["from the data"])).score.tolist() == [
        3.0
    ]


class Graded:
    columns = ("answer",)

    def __call__(self, completions, answer, hint, **columns):
        return lengths(completions)


def test_columns_needed_are_those_declared_and_those_required():
    def plain(completions, prompts, gold, bonus=1.0):
        return lengths(completions)

    runner = RewardRunner([NamedReward("a", Graded()), NamedReward("b", plain), NamedReward("c", lengths)])
    assert runner.columns_needed == {"a": ("answer", "hint"), "b": ("gold",)}


def test_one_column_may_be_declared_as_text():
    class Single(Graded):
        columns = "hint"

    assert RewardRunner([NamedReward("a", Single())]).columns_needed == {"a": ("hint", "answer")}


def test_no_reward_is_called_without_completions():
    def picky(completions):
        return [1.0 / len(completions)]

    scored = run(picky, [])
    assert scored.score.shape == scored.rewards["r"].shape == (0,)


def test_a_missing_column_is_a_data_error_with_a_suggestion():
    def reward(completions, answer):
        return lengths(completions)

    with pytest.raises(DataError, match=r"needs the column 'answer'; did you mean 'answers'\?") as caught:
        run(reward, ["a"], prompts=make_prompts(1, answers=["x"]))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda answer: [1.0], id="no completions"),
        pytest.param(lambda completions, /: [1.0], id="positional only"),
        pytest.param(lambda *everything: [1.0], id="star only"),
        pytest.param(getattr, id="written in C"),
        pytest.param(Graded, id="a class"),
        pytest.param(3.0, id="a number"),
    ],
)
def test_what_cannot_be_called_as_a_reward_is_a_plugin_error(fn):
    with pytest.raises(PluginError) as caught:
        RewardRunner([NamedReward("odd", fn)])
    assert "'odd'" in str(caught.value)
    assert caught.value.exit_code == 4


def test_methods_partials_and_objects_are_rewards():
    class Counter:
        def count(self, completions, times=1):
            return [len(text) * times for text in completions]

    assert run(Counter().count, ["ab"]).score.tolist() == [2.0]
    assert run(functools.partial(Counter().count, times=3), ["ab"]).score.tolist() == [6.0]


# Values and their combination


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param([1, 0], id="int"),
        pytest.param((1.0, 0.0), id="tuple"),
        pytest.param([True, False], id="bool"),
        pytest.param(np.array([1, 0]), id="numpy int"),
        pytest.param(np.array([True, False]), id="numpy bool"),
        pytest.param([np.float32(1), np.bool_(False)], id="numpy scalars"),
        pytest.param([np.array(1.0), torch.tensor(0)], id="0-d items"),
        pytest.param(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), id="torch bfloat16"),
        pytest.param(torch.tensor([True, False]), id="torch bool"),
    ],
)
def test_fault_W8_numbers_of_every_library_are_accepted(returned):
    scored = run(lambda completions: returned, ["a", "b"])
    assert scored.score.dtype == torch.float32
    assert scored.score.tolist() == [1.0, 0.0]
    assert scored.token_scores is None


def test_rewards_add_up_by_weight_over_those_that_apply():
    rewards = [
        NamedReward("a", lambda completions: [1.0, None, 3.0, None], 2.0),
        NamedReward("b", lambda completions: [10.0, 20.0, None, None], 0.5),
    ]
    scored = RewardRunner(rewards).score(make_prompts(4), [""] * 4, [[]] * 4)
    # 2·1 + 0.5·10; 0.5·20; 2·3; none applies
    assert same(scored.score, [7.0, 10.0, 6.0, math.nan])
    assert same(scored.rewards["a"], [1.0, math.nan, 3.0, math.nan])
    assert same(scored.rewards["b"], [10.0, 20.0, math.nan, math.nan])


def test_a_reward_of_weight_0_measures_but_makes_nothing_scorable():
    rewards = [
        NamedReward("a", lambda completions: [1.0, None]),
        NamedReward("b", lambda completions: [5.0, 6.0], 0.0),
    ]
    scored = RewardRunner(rewards).score(make_prompts(2), ["", ""], [[], []])
    assert same(scored.score, [1.0, math.nan])
    assert scored.rewards["b"].tolist() == [5.0, 6.0]


def test_rewards_for_single_tokens_stay_apart_from_the_score():
    rewards = [
        NamedReward("tokens", lambda completions: [[1.0, 2.0], None, [], torch.tensor([4.0])], 2.0),
        NamedReward("whole", lambda completions: [10.0, 20.0, None, None]),
    ]
    scored = RewardRunner(rewards).score(make_prompts(4), ["ab", "c", "", "d"], [[7, 8], [9], [], [6]])
    assert scored.score.tolist() == [10.0, 20.0, 0.0, 0.0]
    assert scored.token_scores.tolist() == [2.0, 4.0, 0.0, 8.0]
    assert same(scored.rewards["tokens"], [3.0, math.nan, 0.0, 4.0])


def test_one_completion_and_an_empty_one_are_scored():
    assert run(lengths, [""], ids=[[]]).score.tolist() == [0.0]
    assert run(lengths, ["é日🙂\x00"], ids=[[1]]).score.tolist() == [4.0]


def test_names_that_occur_twice_get_a_suffix():
    rewards = [NamedReward(name, lengths) for name in ("length", "length", "length_2", "length")]
    scored = RewardRunner(rewards).score(make_prompts(1), ["ab"], [[1]])
    assert list(scored.rewards) == ["length", "length_3", "length_2", "length_4"]


def test_prompts_and_completions_must_pair_up():
    with pytest.raises(ValueError, match="2 prompts, 1 completions, 1 lists of ids"):
        run(lengths, ["a"], prompts=make_prompts(2))


@given(st.lists(st.tuples(st.text(max_size=20), st.none() | st.floats(-1e6, 1e6, width=32)), max_size=12))
def test_the_order_of_completions_is_kept(items):
    texts, values = [text for text, _ in items], [value for _, value in items]
    scored = run(lambda completions: values, texts)
    assert same(scored.score, [math.nan if value is None else value for value in values])


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=16), max_size=5), max_size=8))
def test_token_rewards_land_on_their_tokens(values):
    scored = run(lambda completions: values, [""] * len(values), ids=[[1] * len(value) for value in values])
    expected = [token for value in values for token in value]
    assert (scored.token_scores is None and not values) or scored.token_scores.tolist() == expected


# Time, async, state


def test_async_rewards_run_together_and_each_is_timed():
    # Each waits until all three are there: one after another they would never finish.
    barrier = asyncio.Barrier(3)

    async def meet(completions):
        await asyncio.wait_for(barrier.wait(), 5)
        return lengths(completions)

    rewards = [NamedReward("meet", meet) for _ in range(3)] + [NamedReward("plain", lengths)]
    scored = RewardRunner(rewards).score(make_prompts(1), ["ab"], [[1]])
    assert scored.score.tolist() == [8.0]
    assert set(scored.metrics) == {f"reward/{n}/seconds" for n in ("meet", "meet_2", "meet_3", "plain")}


def test_async_rewards_work_inside_a_running_loop_and_keep_their_own():
    loops = []

    class Client:
        async def __call__(self, completions):
            loops.append(asyncio.get_running_loop())
            await asyncio.sleep(0)
            return lengths(completions)

    client = Client()

    async def notebook_cell():
        return run(client, ["abc"]).score.tolist()

    assert asyncio.run(notebook_cell()) == [3.0]
    assert run(client, ["abcd"]).score.tolist() == [4.0]
    assert loops[0] is loops[1] and not loops[0].is_closed()


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[W13]")])
def test_seconds_are_those_of_the_call(_):
    def slow(completions):
        time.sleep(0.05)
        return lengths(completions)

    scored = run(slow, ["a"])
    assert 0.05 <= scored.metrics["reward/r/seconds"][0] <= scored.seconds < 20.0


class Remembers:
    def __init__(self):
        self.seen = 0

    def __call__(self, completions):
        self.seen += len(completions)
        return [float(self.seen)] * len(completions)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_state_of_rewards_goes_into_checkpoints_and_back():
    runner = RewardRunner([NamedReward("memory", Remembers()), NamedReward("plain", lengths)])
    runner.score(make_prompts(2), ["", ""], [[], []])
    assert runner.state_dict() == {"memory": {"seen": 2}}
    resumed = RewardRunner([NamedReward("memory", Remembers())])
    resumed.load_state_dict(runner.state_dict())
    assert resumed.score(make_prompts(1), [""], [[]]).score.tolist() == [3.0]


def test_the_state_of_another_reward_is_refused():
    with pytest.raises(CheckpointError, match="state of other rewards"):
        RewardRunner([NamedReward("plain", lengths)]).load_state_dict({"memory": {"seen": 2}})


def test_one_thread_serves_all_async_rewards():
    async def reward(completions):
        return lengths(completions)

    for _ in range(5):
        run(reward, ["a"])
    assert sum(thread.name == "rlx-rewards" for thread in threading.enumerate()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_async_rewards_work_in_a_forked_process():
    async def reward(completions):
        return lengths(completions)

    run(reward, ["a"])  # the loop's thread exists here; it does not in the child
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # without a loop of its own the child would wait for ever
        os._exit(0 if run(reward, ["abc"]).score.tolist() == [3.0] else 1)
    assert os.waitpid(child, 0)[1] == 0
