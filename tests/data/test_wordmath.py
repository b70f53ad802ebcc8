"""The playground's data: right answers, disjoint splits, the same rows every time."""

import random
import re

import pytest

from rlx.core.errors import DataError
from rlx.plugins.datasets.wordmath import FAMILIES, WordMath, flawed, held_out, problem, solution

# The words decide the operation: read from the sentence, not from the row.
ADDS = re.compile(r"buys|finds|together|more than \w+\. How many")


def test_answers_follow_from_the_words():
    rows = WordMath().rows("train")[:1000] + WordMath().rows("test")
    for row in rows:
        x, y = map(int, re.findall(r"\d+", row["prompt"]))
        assert 2 <= y < x and x + y <= 99
        assert int(row["answer"]) == (x + y if ADDS.search(row["prompt"]) else x - y)
    assert {row["family"] for row in rows} == set(FAMILIES)


def test_splits_share_no_operand_pair():
    pairs = {split: {(r["x"], r["y"]) for r in WordMath().rows(split)} for split in ("train", "test")}
    assert all(held_out(*pair) for pair in pairs["test"])
    assert not any(held_out(*pair) for pair in pairs["train"])
    everything = [(x, y) for x in range(3, 98) for y in range(2, x) if x + y <= 99]
    assert len(everything) == 2304
    assert sum(held_out(x, y) for x, y in everything) == 296


def test_sizes_no_repeats_and_the_same_rows_every_time():
    rows = {split: WordMath().rows(split) for split in ("train", "test")}
    assert (len(rows["train"]), len(rows["test"])) == (8192, 512)
    for split, found in rows.items():
        assert len({row["prompt"] for row in found}) == len(found)
        assert WordMath().rows(split) == found
    # Written down: another Python or machine must give the same problems.
    first = "Amy has 84 pencils. Ann has 14 more than Amy. How many pencils does Ann have?"
    assert rows["train"][0] == {
        "prompt": first, "answer": "98", "family": "more", "x": 84, "op": "+", "y": 14,
    }  # fmt: skip
    assert WordMath(WordMath.Config(data_seed=1)).rows("test") != rows["test"]


def test_a_larger_split_begins_with_the_smaller_one():
    assert WordMath(WordMath.Config(train_rows=50)).rows("train") == WordMath().rows("train")[:50]


def test_an_unknown_split_is_a_data_error():
    with pytest.raises(DataError, match="no split 'dev'"):
        WordMath().rows("dev")


def test_solutions_are_right_and_flawed_draws_mostly_wrong():
    rng = random.Random(0)
    rows = [problem(rng, "test") for _ in range(4000)]
    assert solution({"x": 34, "op": "-", "y": 15, "answer": "19"}) == "34 - 15 = 19. Answer: 19"
    right = sum(flawed(row, rng) == solution(row) for row in rows) / len(rows)
    # The mean confusion is 0.4417; (1 - 0.4417) x 0.85 x 0.9 = 0.427. Standard error 0.008.
    assert abs(right - 0.427) < 0.03
    assert all(flawed(row, rng, wrong=True) != solution(row) for row in rows[:500])


def test_a_wrong_draw_never_has_the_right_answer():
    # A slip can mend a wrong operation: 62 - 5 + 10 = 62 + 5. About one draw in 1500.
    rng = random.Random(1)
    rows = [problem(rng, "train") for _ in range(3000)]
    hits = [r for r in rows if flawed(r, rng, wrong=True).endswith(f"Answer: {r['answer']}")]
    assert hits == []


def test_the_recipe_is_only_for_known_algorithms():
    assert WordMath().recipe("ppo")["max_completion_length"] == 24
    assert WordMath().recipe("unheard-of") == {}
