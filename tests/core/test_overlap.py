"""Rewards asked while completions are sampled: whatever a reward does, the result is that of one call."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import threading
import time

import numpy as np
import pytest
import torch

from rlx.core.batch import Prompts
from rlx.core.errors import DataError, RewardError
from rlx.core.overlap import chunk_size, overlap
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.plugins.contract import Completions, Failed, Rewarded
from rlx.plugins.telling import Complete

B, N = 4, 3
IDS = [[place + 1, 7, *([9] * (place % 4))] for place in range(B * N)]
STEP = 5


def decode(ids):
    return " ".join(map(str, ids))


def prompts_of(**columns):
    rows = [100 + i for i in range(B)]
    return Prompts([[1]] * B, [f"p{i}" for i in range(B)], [None] * B, columns, rows)


PROMPTS = prompts_of(answer=["1", "7", None, "9"])
EACH = [i for i in range(B) for _ in range(N)]


class Telling:
    """A generator that says what it is asked to say."""

    def sync(self, policy):
        """Nothing to take over."""

    def generate(self, prompts, n, sampling, seeds, *, on_complete=None):
        return Completions([], [], [])

    def close(self):
        """Nothing to give back."""


class Silent(Telling):
    def generate(self, prompts, n, sampling, seeds):
        return Completions([], [], [])


def complete(place, ids=None):
    return Complete(place // N, place % N, IDS[place] if ids is None else ids, True)


def independent(fn, size=2):
    fn.independent, fn.chunk_size = True, size
    return fn


def score(rewards, order=None, prompts=PROMPTS, told=None, **options):
    """What rewards say of all completions; told in an order while they are sampled, or not at all."""
    runner = RewardRunner([NamedReward(fn.__name__, fn, 0.5) for fn in rewards], **options)
    ids = [list(own) for own in IDS]
    asked = (prompts.take(EACH), [decode(own) for own in ids], ids, STEP)
    if order is None:
        return runner.score(*asked)
    with overlap(runner, Telling(), prompts, N, decode, STEP) as early:
        for place in order:
            early.take([complete(place, (told or {}).get(place))])
        return runner.score(*asked, early)


def shuffled():
    order = list(range(B * N))
    random.Random(1).shuffle(order)
    return order


def same(one, other):
    """Whether two results are equal, clocks left out."""

    def plain(scored):
        tokens = None if scored.token_scores is None else scored.token_scores.tolist()
        totals = {name: own.tolist() for name, own in scored.rewards.items()}
        metrics = {name: own for name, own in sorted(scored.metrics.items()) if "seconds" not in name}
        return repr((scored.score.tolist(), totals, tokens, metrics, sorted(scored.columns.items())))

    return plain(one) == plain(other)


# What a reward may return for some completions: each function is called with all of them, or with parts.
def numbers(completions):
    return [len(text) / 7 for text in completions]


def by_column(completions, answer):
    rows = zip(completions, answer, strict=True)
    return [None if right is None else float(right in text.split()) for text, right in rows]


def tokens(completion_ids):
    return [[0.1 * token for token in ids] for ids in completion_ids]


def mixed(completion_ids):
    kinds = {0: lambda ids: None, 1: lambda ids: [1.0] * len(ids), 2: lambda ids: 2.5}
    return [kinds[ids[0] % 3](ids) for ids in completion_ids]


def tensor(completion_ids):
    return torch.tensor([float(ids[0]) for ids in completion_ids], requires_grad=True)


def array(completion_ids):
    return np.asarray([ids[0] / 3 for ids in completion_ids], dtype=np.float32)


def everything(prompts, prompt_texts, completions, completion_ids, run_step, **columns):
    found = zip(prompts, prompt_texts, completions, completion_ids, columns["answer"], strict=True)
    return [float(len(str(one)) + run_step) for one in found]


def telling(completion_ids):
    """Metrics of both kinds, columns, and a metric and a column that not every call has."""
    firsts = [ids[0] for ids in completion_ids]
    few = {"third": float(firsts.count(3))} if 3 in firsts else {}
    mostly = {"late": [0.1 * first if first > 5 else None for first in firsts]} if max(firsts) > 5 else {}
    column = {"odd": [bool(first % 2) if first > 5 else None for first in firsts]} if max(firsts) > 5 else {}
    return Rewarded(
        [float(first) for first in firsts],
        metrics={"count": float(len(firsts)), "first": [first / 3 for first in firsts], **few, **mostly},
        columns={"text": [f"c{first}" for first in firsts], **column},
    )


async def later(completions):
    await asyncio.sleep(0.005)
    return [len(text) / 3 for text in completions]


def failing_items(completion_ids):
    return [Failed("was busy", "ask again") if ids[0] in (4, 9) else 1.0 for ids in completion_ids]


def not_finite(completion_ids):
    return [math.nan if ids[0] in (9, 4) else 1.0 for ids in completion_ids]


def wrong_length(completion_ids):
    return [[1.0] * (len(ids) + (ids[0] in (4, 9))) for ids in completion_ids]


def raising(completion_ids):
    for ids in completion_ids:
        if ids[0] == 9:
            error = ValueError("no such thing as 9")
            error.add_note("of the reward's own")
            raise error
    return [1.0 for _ in completion_ids]


async def raising_later(completion_ids):
    await asyncio.sleep(0.001)
    return raising(completion_ids)


GOOD = (numbers, by_column, tokens, mixed, tensor, array, everything, telling, later)
BAD = (failing_items, not_finite, wrong_length, raising, raising_later)
ALL = [independent(fn) for fn in (*GOOD, *BAD)]


def spied(fn):
    """The same reward, and the lengths of its calls."""
    calls = []

    @functools.wraps(fn)
    def spy(**given):
        calls.append(len(next(values for values in given.values() if isinstance(values, list))))
        return fn(**given)

    return spy, calls


@pytest.mark.filterwarnings("ignore:reward 'tensor' returned a tensor")
@pytest.mark.parametrize("fn", GOOD, ids=lambda fn: fn.__name__)
def test_a_reward_leaves_what_one_call_leaves(fn):
    spy, calls = spied(fn)
    assert same(score([spy], shuffled()), score([fn]))
    assert calls == [2] * 6


def test_rewards_of_all_kinds_together_leave_what_they_leave_alone():
    def ranked(completions):  # compares completions: it is called once, with all of them
        return [sorted(completions).index(text) / 10 for text in completions]

    ranked, calls = spied(ranked)
    rewards = [numbers, ranked, tokens, later, telling]
    whole = score(rewards)
    assert same(score(rewards, shuffled()), whole)
    assert calls == [B * N] * 2


def message(error):
    """What a user reads, but for how many completions shared the call."""
    return error.what, error.code, error.where.split("; ")[0], error.got, error.expected, error.hint


@pytest.mark.parametrize("fn", BAD, ids=lambda fn: fn.__name__)
def test_what_cannot_be_used_is_the_same_error(fn):
    errors = []
    for order in (None, shuffled()):
        with pytest.raises(RewardError) as caught:
            score([numbers, fn], order)
        errors.append(caught.value)
    one, other = errors
    assert message(one) == message(other)
    assert one.where == other.where or "raised" in one.what
    assert repr(one.__cause__) == repr(other.__cause__)
    if one.__cause__ is not None:
        assert one.__cause__.__notes__ == other.__cause__.__notes__ == ["of the reward's own"]


@pytest.mark.parametrize("fn", BAD, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("policy", ["none", "value"])
def test_what_cannot_be_used_counts_the_same(fn, policy):
    found = []
    for order in (None, shuffled()):
        with pytest.warns(UserWarning, match="further ones are only counted") as told:
            found.append(score([numbers, fn], order, on_error=policy, error_value=-2.0))
        assert len(told) == 1
    assert same(*found)
    assert found[1].metrics[f"reward/{fn.__name__}/errors"][0] > 0


def test_of_several_errors_the_first_in_the_batch_is_raised():
    def picky(completion_ids):
        for ids in completion_ids:
            if ids[0] in (2, 9):
                raise ValueError(f"no {ids[0]}")
        return [1.0 for _ in completion_ids]

    for order in (None, [8, 9, 0, 1, *range(2, 8), 10, 11]):
        with pytest.raises(RewardError) as caught:
            score([independent(picky)], order)
        assert caught.value.got == "ValueError: no 2"


def test_an_error_names_the_rows_of_its_call():
    with pytest.raises(RewardError, match="2 completions, the first of data row 102"):
        score([raising], [0, 1, 8, 9, 2, 3, 4, 5, 6, 7, 10, 11])


def test_an_end_asked_for_by_a_reward_is_raised_as_it_is():
    def leaving(completion_ids):
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught:
        score([independent(leaving)], shuffled())
    assert caught.value.code == 3
    assert not overlapping()


def test_a_metric_of_two_kinds_is_refused():
    def undecided(completion_ids):
        metric = 1.0 if [1, 7] in completion_ids else [1.0] * len(completion_ids)
        return Rewarded([0.0 for _ in completion_ids], metrics={"m": metric})

    with pytest.raises(RewardError, match="metric 'm' as one number in one call and as one a completion"):
        score([independent(undecided)], range(B * N))


def test_a_column_that_is_missing_is_the_error_it_always_was():
    with pytest.raises(DataError, match="needs the column 'answer'"):
        score([independent(by_column)], shuffled(), prompts=prompts_of())


def test_what_was_told_otherwise_than_it_ended_is_asked_about_again():
    spy, calls = spied(telling)
    assert same(score([spy], range(B * N), told={3: [3, 3]}), score([telling]))
    assert calls[-1] == 4  # with the two of the call in which one was not true


def test_what_was_told_twice_counts_once():
    order = [0, 1, 2, 3, 1, 0, 4, 3, *range(5, B * N)]
    assert same(score([telling], order), score([telling]))


def test_what_was_never_told_is_asked_about_in_the_end():
    spy, calls = spied(numbers)
    assert same(score([spy], [5, 1, 2]), score([numbers]))
    assert calls == [2, B * N - 2]
    calls.clear()
    assert same(score([spy], [5]), score([numbers]))
    assert calls == [B * N]


def test_what_ends_all_at_once_is_asked_about_in_one_call_as_ever():
    asked = []

    def noting(completion_ids):
        asked.append((len(completion_ids), threading.current_thread() is threading.main_thread()))
        return [0.0 for _ in completion_ids]

    runner = RewardRunner([NamedReward("noting", independent(noting))])
    with overlap(runner, Telling(), PROMPTS, N, decode, STEP) as early:
        early.take([complete(place) for place in range(B * N)])
        runner.score(PROMPTS.take(EACH), [decode(ids) for ids in IDS], IDS, STEP, early)
    assert asked == [(B * N, True)]


def test_calls_share_out_a_batch_by_the_order_in_which_it_was_told_and_not_by_the_clock():
    shared = []
    for pause in (0.0, 0.01):
        seen = []

        def noting(completion_ids, seen=seen, pause=pause):
            time.sleep(pause)
            seen.append([ids[0] - 1 for ids in completion_ids])
            return [0.0 for _ in completion_ids]

        score([independent(noting)], shuffled())
        shared.append(seen)
    order = shuffled()
    assert shared == [[order[k : k + 2] for k in range(0, 10, 2)] + [sorted(order[10:])]] * 2


def test_a_reward_finds_the_gpu_of_its_process(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda n: found.append((n, threading.current_thread().name))
    )

    def noting(completions):
        found.append(threading.current_thread().name)
        return [0.0 for _ in completions]

    score([independent(noting, size=6)], range(B * N))
    assert found[:2] == [(3, "rlx-overlap"), "rlx-overlap"]


def test_after_a_new_start_nothing_told_before_counts():
    runner = RewardRunner([NamedReward("telling", telling)])
    with overlap(runner, Telling(), PROMPTS, N, decode, STEP) as early:
        early.take([complete(0), complete(1), complete(2, [3])])
        early.restart()
        for place in shuffled():
            early.take([complete(place)])
        scored = runner.score(PROMPTS.take(EACH), [decode(ids) for ids in IDS], IDS, STEP, early)
    assert scored.metrics["reward/telling/count"] == [float(B * N)]
    assert scored.columns == score([telling]).columns


def overlapping():
    return [thread for thread in threading.enumerate() if thread.name == "rlx-overlap"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_error_in_sampling_nothing_is_called_any_more(error):
    begun, go_on, calls, ended = threading.Event(), threading.Event(), [], []

    def busy(completion_ids):
        calls.append(len(completion_ids))
        begun.set()
        go_on.wait(10)
        return [0.0 for _ in completion_ids]

    async def waiting(completion_ids):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("waiting")

    rewards = [NamedReward("waiting", independent(waiting)), NamedReward("busy", independent(busy))]
    threading.Timer(0.2, go_on.set).start()
    with (
        pytest.raises(error),
        overlap(RewardRunner(rewards), Telling(), PROMPTS, N, decode, STEP) as early,
    ):
        for place in range(8):
            early.take([complete(place)])
        assert begun.wait(10)
        raise error
    assert calls == [2] and not overlapping()
    until = time.monotonic() + 10
    while not ended and time.monotonic() < until:
        time.sleep(0.01)
    assert ended == ["waiting"]


def test_ctrl_c_does_not_wait_for_a_call_that_does_not_end(monkeypatch):
    monkeypatch.setattr("rlx.core.overlap.GRACE", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    def endless(completion_ids):
        begun.set()
        go_on.wait(30)
        return [0.0 for _ in completion_ids]

    runner = RewardRunner([NamedReward("endless", independent(endless))])
    with pytest.raises(KeyboardInterrupt), overlap(runner, Telling(), PROMPTS, N, decode, STEP) as early:
        early.take([complete(0), complete(1)])
        assert begun.wait(10)
        raise KeyboardInterrupt
    (thread,) = overlapping()
    assert thread.daemon
    go_on.set()
    thread.join(10)


class Remembering:
    independent, chunk_size = True, 2

    def __call__(self, completions):
        return [0.0 for _ in completions]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Nothing kept."""


class Attached:
    independent, chunk_size, needs_policy = True, 2, True

    def __call__(self, completions):
        return [0.0 for _ in completions]


def test_rewards_that_remember_or_need_the_policy_are_called_once():
    for fn in (Remembering(), Attached()):
        assert RewardRunner([NamedReward("r", fn)]).independent == []


@pytest.mark.parametrize("generator", [Telling(), Silent()])
def test_a_generator_that_cannot_tell_is_not_asked_to(generator):
    runner = RewardRunner([NamedReward("numbers", numbers)])
    with overlap(runner, generator, PROMPTS, N, decode, STEP) as early:
        assert (early is None) == isinstance(generator, Silent)
    with overlap(None, generator, PROMPTS, N, decode, STEP) as early:
        assert early is None


@pytest.mark.parametrize(
    ("least", "total", "size"), [(16, 8, 16), (16, 128, 16), (16, 129, 32), (16, 512, 64), (1, 9, 2)]
)
def test_calls_are_as_large_as_rewards_ask_for_and_not_too_many(least, total, size):
    few = independent(lambda completions: [0.0 for _ in completions], least)
    none = independent(lambda completions: [0.0 for _ in completions], 1)
    assert chunk_size([NamedReward("none", none), NamedReward("few", few)], total) == size


def test_seconds_are_those_in_which_any_call_was_under_way():
    async def patient(completions):
        await asyncio.sleep(0.2)
        return [0.0 for _ in completions]

    began = time.perf_counter()
    scored = score([independent(patient)], range(B * N))
    assert 0.2 <= scored.metrics["reward/patient/seconds"][0] <= time.perf_counter() - began
