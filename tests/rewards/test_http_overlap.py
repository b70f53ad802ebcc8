"""The http reward asked about a batch in several calls that are under way together."""

from __future__ import annotations

import threading
import time

import pytest

from rlx.core.batch import Prompts
from rlx.core.overlap import chunk_size, overlap
from rlx.core.reward_call import start
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.plugins.contract import Completions
from rlx.plugins.references import make
from rlx.plugins.telling import Complete

COUNT = 12
PROMPTS = Prompts([[1]] * COUNT, ["hi"] * COUNT, [None] * COUNT, {}, [*range(COUNT)])
IDS = [[5] * (1 + i % 3) for i in range(COUNT)]


class Telling:
    def sync(self, policy):
        """Nothing to take over."""

    def generate(self, prompts, n, sampling, seeds, *, on_complete=None):
        return Completions([], [], [])

    def close(self):
        """Nothing to give back."""


def decode(ids):
    return "x" * len(ids)


def scored(reward, order=(), **options):
    """The scores of a batch of which some was told before the end."""
    runner = RewardRunner([NamedReward("http", reward)], **options)
    with overlap(runner, Telling(), PROMPTS, 1, decode, 7) as early:
        for place in order:
            early.take([Complete(place, 0, IDS[place], True)])
        return runner.score(PROMPTS, [decode(ids) for ids in IDS], IDS, 7, early)


def arguments(*texts):
    count = len(texts)
    return {
        "prompts": ["p"] * count, "prompt_texts": ["p"] * count, "completions": list(texts),
        "completion_ids": [[1]] * count, "run_step": 1,
    }  # fmt: skip


def test_requests_are_full_and_scores_those_of_one_call(http):
    stub = http.stub()
    reward = make("reward", stub.url, {"batch_size": 4})
    assert chunk_size([NamedReward("http", reward)], COUNT) == 4
    whole = scored(reward)
    stub.requests.clear()
    pieces = scored(reward, [3, 11, 0, 7, 5, 1, 8, 2, 10])
    assert (
        pieces.rewards["http"].tolist() == whole.rewards["http"].tolist() == [float(len(ids)) for ids in IDS]
    )
    assert [len(request.said["completions"]) for request in stub.requests] == [4, 4, 4]
    assert {request.said["step"] for request in stub.requests} == {7}


def test_items_without_a_score_and_repetitions_are_counted_over_all_calls(http):
    refused, lock = [], threading.Lock()

    def answer(request):
        with lock:
            first = len(refused) < 2
            if first:
                refused.append(request)
        if first:
            return http.reply(status=500)
        texts, ids = request.said["completions"], request.said["ids"]
        errors = ["too long" if len(text) == 3 else None for text in texts]
        scores = [None if error else float(len(text)) for text, error in zip(texts, errors, strict=True)]
        return http.reply({"scores": scores, "ids": ids, "errors": errors})

    found = []
    for order in ((), range(COUNT)):
        refused.clear()
        reward = make("reward", http.stub(answer).url, {"batch_size": 3, "max_wait": 0.01, "retries": 2})
        with pytest.warns(UserWarning, match="counted as not applicable"):
            found.append(scored(reward, order, on_error="none"))
    whole, pieces = found
    assert repr(pieces.rewards["http"].tolist()) == repr(whole.rewards["http"].tolist())
    assert pieces.metrics["reward/http/failed"] == whole.metrics["reward/http/failed"] == [4.0]
    assert pieces.metrics["reward/http/errors"] == [4.0]
    # Two repetitions of each of four requests: for the item in it without a score, or after a refusal.
    assert pieces.metrics["reward/http/retries"] == whole.metrics["reward/http/retries"] == [8.0]


def test_calls_under_way_together_share_the_limit_of_requests(http):
    lock, under_way, most = threading.Lock(), [0], [0]
    together = threading.Barrier(2, timeout=20)

    def answer(request):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        together.wait()  # two at a time: fewer would wait for ever
        time.sleep(0.02)  # long enough for more to come
        with lock:
            under_way[0] -= 1
        return http.lengths(request)

    reward = make("reward", http.stub(answer).url, {"batch_size": 1, "concurrency": 2})
    calls = [start(reward, arguments("a", "bb")) for _ in range(4)]
    assert [call.result().result.values for call in calls] == [[1.0, 2.0]] * 4
    assert most == [2]
    assert start(reward, arguments("a", "bb")).result().result.values == [1.0, 2.0]


def test_a_call_that_fails_does_not_unlearn_what_another_found_out(http):
    found_out = threading.Event()

    def answer(request):
        if "late" in str(request.said):
            found_out.wait(20)
            return http.reply(status=400)
        return http.lengths(request)

    stub = http.stub(answer)
    reward = make("reward", stub.url)
    late, early = start(reward, arguments("late")), start(reward, arguments("a"))
    assert early.result().result.values == [1.0]
    found_out.set()
    late.result()
    stub.requests.clear()
    start(reward, arguments("bb")).result()
    assert "query" not in stub.requests[0].said  # OpenRLHF's word: asked in every dialect only once
