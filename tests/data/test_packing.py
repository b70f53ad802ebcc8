"""Packing keeps every token once, and rows within the limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.plugins.transforms.packing import Piece, pack

LENGTHS = st.lists(st.integers(1, 30), max_size=40)


@given(LENGTHS, st.integers(1, 12), st.sampled_from(["bfd", "bfd_split", "wrapped"]))
def test_every_token_is_in_one_row(lengths, limit, strategy):
    if strategy == "bfd":
        lengths = [min(length, limit) for length in lengths]
    rows = pack(lengths, limit, strategy)
    tokens = [(p.document, i) for row in rows for p in row for i in range(p.start, p.end)]
    assert sorted(tokens) == [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    sizes = [sum(p.end - p.start for p in row) for row in rows]
    assert all(0 < size <= limit for size in sizes)
    if strategy == "bfd":
        assert all(p.start == 0 and p.end == lengths[p.document] for row in rows for p in row)
        # No two rows fit into one: best fit leaves at most one row half empty.
        assert sum(2 * size <= limit for size in sizes) <= 1
    if strategy == "bfd_split":
        pieces = sum(-(-length // limit) for length in lengths)
        assert sum(map(len, rows)) == pieces
    if strategy == "wrapped":
        assert all(size == limit for size in sizes[:-1])
        assert tokens == sorted(tokens)


def test_best_fit_by_hand():
    # 6 opens a row, 5 another; 4 fits the first to the brim, 3 the second; 2 goes there as well: 5 + 3 + 2.
    assert pack([2, 3, 4, 5, 6], 10, "bfd") == [
        [Piece(0, 0, 2), Piece(1, 0, 3), Piece(3, 0, 5)],
        [Piece(2, 0, 4), Piece(4, 0, 6)],
    ]
    assert pack([5, 3], 4, "bfd_split") == [[Piece(0, 0, 4)], [Piece(0, 4, 5), Piece(1, 0, 3)]]
    assert pack([5, 2], 4, "wrapped") == [[Piece(0, 0, 4)], [Piece(0, 4, 5), Piece(1, 0, 2)]]


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="5 tokens"):
        pack([5], 4, "bfd")
    with pytest.raises(ValueError, match="tetris"):
        pack([5], 4, "tetris")
