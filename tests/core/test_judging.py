"""Judging: the order of a pair is drawn and undone, what a judge returns is checked, wins are counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlx.core.batch import Prompts, Rollouts, Sequences
from rlx.core.errors import DataError, PluginError, RewardError
from rlx.core.judging import JudgeRunner, Tally, wilson


def prompts(count, **columns):
    texts = [f"prompt {i}" for i in range(count)]
    return Prompts([[1]] * count, texts, [None] * count, columns, list(range(10, 10 + count)))


class Stub:
    """Answers by a rule of what it is shown, and keeps it."""

    def __init__(self, rule):
        self.rule, self.seen = rule, []

    def judge(self, prompts, pairs, *, pair_ids, **columns):
        self.seen += list(zip(prompts, pairs, pair_ids, strict=True))
        self.columns = columns
        return [self.rule(*pair) for pair in pairs]


def ask(judge, pairs, *, seed=0, keys=None, **columns):
    ids = [([ord(one[0])], [ord(other[0])]) for one, other in pairs]
    keys = keys if keys is not None else [(i,) for i in range(len(pairs))]
    return JudgeRunner("stub", judge, seed).verdicts(prompts(len(pairs), **columns), pairs, ids, keys)


MANY = [(f"a{i}", f"b{i}") for i in range(400)]


@pytest.mark.parametrize("place", [0, 1])
def test_a_judge_that_likes_one_place_favours_neither_side(place):
    verdicts = ask(Stub(lambda one, other: place), MANY)
    tally = Tally.of(verdicts, MANY)
    low, high = tally.interval
    assert low < 0.5 < high and abs(tally.rate - 0.5) < 0.05, tally


def test_the_order_is_undone_exactly():
    # Side 1 is better in every other pair; the judge reads, so whatever it is shown, it finds it.
    pairs = [(one, other) if i % 2 else (other, one) for i, (one, other) in enumerate(MANY)]
    judge = Stub(lambda one, other: 0 if one.startswith("b") else 1)
    assert ask(judge, pairs) == [int(i % 2) for i in range(len(pairs))]
    turned = [shown != pair for (_, shown, _), pair in zip(judge.seen, pairs, strict=True)]
    assert 160 < sum(turned) < 240  # 4 standard deviations of a fair coin: 200 ± 40
    for (prompt, shown, ids), pair, turn in zip(judge.seen, pairs, turned, strict=True):
        assert shown == (pair[::-1] if turn else pair)
        assert ids == tuple([ord(text[0])] for text in shown)  # the tokens go with the text
        assert prompt == f"prompt {pairs.index(pair)}"


def test_the_order_is_that_of_seed_and_key_whatever_else_is_asked():
    def shown(seed=0, keys=None, pairs=MANY):
        judge = Stub(lambda one, other: 0)
        ask(judge, pairs, seed=seed, keys=keys)
        return [pair for _, pair, _ in judge.seen]

    assert shown() == shown()
    assert shown(seed=1) != shown()
    assert shown(keys=[(i,) for i in range(7, 10)], pairs=MANY[7:10]) == shown()[7:10]


def test_equal_texts_are_a_tie_and_nobody_is_asked():
    judge = Stub(lambda one, other: 0 if one == "b" else 1)
    pairs = [("a", "a"), ("a", "b"), ("c", "c")]
    assert ask(judge, pairs) == [None, 1, None]
    assert len(judge.seen) == 1
    assert Tally.of([None, 1, None], pairs) == Tally(wins=0, losses=1, ties=2, no_verdict=0)
    silent = Stub(lambda one, other: 1 / 0)
    assert ask(silent, [("a", "a")]) == [None]


def test_a_judge_gets_what_its_signature_takes():
    class Plain:
        def judge(self, prompts, pairs):
            return [None] * len(pairs)

    class Asking:
        columns = ("answer",)

        def judge(self, prompts, pairs, hint, rows, prompt_texts=None):
            self.got = hint, rows, prompt_texts
            return [None] * len(pairs)

    pairs = [("a", "b"), ("c", "c"), ("d", "e")]
    assert ask(Plain(), pairs, answer=[1, 2, 3]) == [None] * 3
    asking = Asking()
    ask(asking, pairs, answer=[1, 2, 3], hint=["x", "y", "z"])
    assert asking.got == (["x", "z"], [10, 12], ["prompt 0", "prompt 2"])
    assert JudgeRunner("asking", asking).columns_needed == ("answer", "hint")
    with pytest.raises(DataError, match="judge 'stub' needs the column 'hint'; did you mean 'hints'"):
        ask(asking, pairs, answer=[1, 2, 3], hints=[0] * 3)
    everything = Stub(lambda one, other: None)
    ask(everything, pairs, answer=[1, 2, 3])
    assert everything.columns == {
        "answer": [1, 3],
        "prompt_texts": ["prompt 0", "prompt 2"],
        "rows": [10, 12],
    }


class Returning:
    def __init__(self, result):
        self.result = result

    def judge(self, prompts, pairs):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


PAIRS = [("one\x1b[2J", "other"), ("left", "right")]


@pytest.mark.parametrize(
    ("result", "what", "got", "row"),
    [
        ([0], "returned 1 verdicts, but 2 were expected", "1 values", "2 pairs, the first of data row 10"),
        (None, "returned None", "None", "2 pairs"),
        ({0: 1}, "returned dict", "{0: 1}", "2 pairs"),
        ([0, 2], "returned int for pair 1", "2", "data row 11"),
        ([-1, 0], "returned int for pair 0", "-1", "data row 10"),
        ([0, True], "returned bool for pair 1", "True", "data row 11"),
        ([0, 0.0], "returned float for pair 1", "0.0", "data row 11"),
        (["A", 0], "returned str for pair 0", "'A'", "data row 10"),
        (ZeroDivisionError("by \x1b zero"), "raised ZeroDivisionError", "by \\x1b zero", "2 pairs"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:24],
)
def test_what_is_no_verdict_names_judge_row_and_what_came_back(result, what, got, row):
    with pytest.raises(RewardError) as caught:
        ask(Returning(result), PAIRS)
    error = caught.value
    assert error.what.startswith(f"judge 'stub' {what}") and error.exit_code == 6
    assert got in error.got and row in error.where and __file__ in error.where
    assert "\x1b" not in "".join(error.lines())
    assert error.__cause__ is (result if isinstance(result, Exception) else None)


def test_whole_numbers_of_any_type_are_verdicts():
    keys = [(i,) for i in range(2)]
    plain = ask(Returning([0, 1]), PAIRS, keys=keys)
    assert ask(Returning((np.int64(0), np.int32(1))), PAIRS, keys=keys) == plain
    assert {type(verdict) for verdict in plain} == {int}


def test_an_error_of_ours_keeps_its_type_and_gets_a_note():
    with pytest.raises(DataError) as caught:
        ask(Returning(DataError("no luck")), PAIRS)
    assert caught.value.__notes__ == ["judge 'stub', 2 pairs, the first of data row 10"]


@pytest.mark.parametrize("judge", [Returning, object(), Stub.judge])
def test_what_cannot_be_asked_is_refused(judge):
    with pytest.raises(PluginError, match="judge 'x' cannot be asked"):
        JudgeRunner("x", judge)


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        # (p + z²/2n ± z√(p(1−p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, worked out apart
        (5, 10, 0.236593, 0.763407),
        (81, 263, 0.255289, 0.366210),  # Newcombe (1998) has 0.2553 and 0.3662
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_by_hand(wins, count, low, high):
    assert wilson(wins, count) == pytest.approx((low, high), abs=2e-6)


def test_a_tally_counts_only_what_was_decided():
    pairs = [("a", "b")] * 5 + [("c", "c")]
    tally = Tally.of([0, 0, 0, 1, None, None], pairs)
    assert tally == Tally(3, 1, 1, 1) and (tally.decided, tally.total) == (4, 6)
    assert tally.rate == 0.75 and tally.interval == wilson(3, 4)
    assert Tally(0, 0, 3, 2).rate == 0.5 and Tally(0, 0, 3, 2).interval == (0.0, 1.0)


def rollouts(texts, groups):
    n = len(texts)
    return Rollouts(
        Sequences.from_lists([[1]] * n, [[2]] * n, groups), prompts=prompts(n), texts=texts,
        finished=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


def test_wins_of_a_group_are_the_share_of_its_comparisons():
    # Longer is better, equal length is no verdict; groups need not stand together.
    judge = Stub(lambda one, other: None if len(one) == len(other) else int(len(other) > len(one)))
    texts = ["a", "zz", "bbb", "yy", "cc", "xx", "d", "d"]
    ranked = JudgeRunner("stub", judge).rank(
        rollouts(texts, [0, 1, 0, 1, 0, 2, 3, 3]), [[i] for i in range(8)], step=4
    )
    # group 0: bbb beats both, cc beats a; group 1: zz and yy are equally long; 2 is alone; 3: equal texts
    want = [0.0, math.nan, 1.0, math.nan, 0.5, math.nan, math.nan, math.nan]
    torch.testing.assert_close(ranked.wins, torch.tensor(want), equal_nan=True)
    assert ranked.metrics["judge/ties"].tolist() == [0, 0, 0, 0, 1]
    assert ranked.metrics["judge/no_verdict"].tolist() == [0, 0, 0, 1, 0]
    assert len(judge.seen) == 4
    for _, shown, ids in judge.seen:
        assert ids == tuple([texts.index(text)] for text in shown)


def test_the_step_is_part_of_the_order():
    def shown(step):
        judge = Stub(lambda one, other: 0)
        texts = [f"{i}" for i in range(40)]
        JudgeRunner("stub", judge).rank(rollouts(texts, [i // 2 for i in range(40)]), [[0]] * 40, step)
        return [pair for _, pair, _ in judge.seen]

    assert shown(1) == shown(1) and shown(1) != shown(2)
