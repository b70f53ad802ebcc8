"""Micro-batches: every row once, within the budget, little padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.microbatch import cut

LENGTHS = st.lists(st.integers(0, 60), max_size=40)


def test_cut_by_hand() -> None:
    # Sorted: 9 | 5 4 | 2 2 1. Budget 10: 9 alone; two of 5; then 4 rows of 2 would fit, three are left.
    parts = cut(torch.tensor([2, 9, 4, 2, 5, 1]), budget=10)
    assert [part.tolist() for part in parts] == [[1], [4, 2], [0, 3, 5]]


def test_a_pair_is_never_parted() -> None:
    # Pairs (1, 8), (3, 3), (7, 2): longest 8, 3, 7; a pair of longest 8 is 16 padded tokens.
    parts = cut(torch.tensor([1, 8, 3, 3, 7, 2]), budget=20, per_row=2)
    assert [part.tolist() for part in parts] == [[0], [2], [1]]


@given(LENGTHS, st.integers(1, 200), st.sampled_from([1, 2, 3]))
def test_every_row_once_and_within_the_budget(lengths: list[int], budget: int, per_row: int) -> None:
    lengths = lengths[: len(lengths) // per_row * per_row]
    flat = torch.tensor(lengths, dtype=torch.long)
    parts = cut(flat, budget, per_row)
    rows = [row for part in parts for row in part.tolist()]
    assert sorted(rows) == list(range(len(lengths) // per_row))
    for part in parts:
        members = [lengths[row * per_row + i] for row in part.tolist() for i in range(per_row)]
        assert len(part) == 1 or len(members) * max(members) <= budget
    longest = [max(lengths[row * per_row : (row + 1) * per_row]) for row in rows]
    assert longest == sorted(longest, reverse=True)
    assert [part.tolist() for part in cut(flat, budget, per_row)] == [part.tolist() for part in parts]


@given(LENGTHS, st.integers(60, 300))
def test_no_micro_batch_could_have_taken_one_row_more(lengths: list[int], budget: int) -> None:
    parts = cut(torch.tensor(lengths, dtype=torch.long), budget)
    for part in parts[:-1]:
        assert (len(part) + 1) * max(1, max(lengths[row] for row in part.tolist())) > budget


def test_nothing_to_cut() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert cut(none, 8) == []


def test_refuses_half_a_pair_and_no_budget() -> None:
    with pytest.raises(ValueError, match="3 sequences do not fill rows of 2"):
        cut(torch.tensor([1, 2, 3]), 8, per_row=2)
    with pytest.raises(ValueError, match="at least 1 token"):
        cut(torch.tensor([1]), 0)
