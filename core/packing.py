"""Short documents put together into rows of about the same length.

A packed row is a group of documents, or of pieces of documents, that stay sequences of their own: none of
them sees another, and positions begin anew in each. What packing buys is rows of one size: a batch of them
has about the same number of tokens every time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens ``start`` to ``end`` (not included) of a document."""

    document: int
    start: int
    end: int


def pack(lengths: Sequence[int], limit: int, strategy: str) -> list[list[Piece]]:
    """Which pieces of which documents make each row. Every token of every document is in exactly one row.

    Args:
        lengths: tokens of each document.
        limit: most tokens of a row.
        strategy: ``bfd``, best-fit decreasing: documents stay whole, none may be over the limit;
            ``bfd_split``: the same, documents over the limit split into pieces of the limit first;
            ``wrapped``: documents one after another, cut wherever a row is full.

    Returns:
        Rows in the order of their first documents, the pieces of a row in the order of the documents.

    Raises:
        ValueError: a document over the limit with ``bfd``, or an unknown strategy.

    Source:
        arXiv:2404.10830.
    """
    if strategy == "wrapped":
        return _wrapped(lengths, limit)
    if strategy not in ("bfd", "bfd_split"):
        raise ValueError(f"packing is bfd, bfd_split or wrapped, not {strategy!r}")
    if strategy == "bfd" and any(length > limit for length in lengths):
        raise ValueError(f"a document of {max(lengths)} tokens does not go into rows of {limit}")
    pieces = [
        Piece(number, start, min(start + limit, length))
        for number, length in enumerate(lengths)
        for start in range(0, length, limit)
    ]
    return _best_fit(pieces, limit)


def _best_fit(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """Longest first, each into the row that it fills best."""
    rows: list[list[Piece]] = []
    room: dict[int, list[int]] = {}  # tokens left → rows
    sizes: list[int] = []  # the keys of room, sorted
    for piece in sorted(pieces, key=lambda piece: (piece.start - piece.end, piece)):
        length = piece.end - piece.start
        place = bisect_left(sizes, length)
        if place == len(sizes):
            rows.append([])
            row, left = len(rows) - 1, limit
        else:
            left = sizes[place]
            row = room[left].pop()
            if not room[left]:
                del room[left], sizes[place]
        rows[row].append(piece)
        left -= length
        if left and left not in room:
            room[left] = []
            insort(sizes, left)
        if left:
            room[left].append(row)
    return sorted(sorted(row) for row in rows)


def _wrapped(lengths: Sequence[int], limit: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    left = 0
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            if left == 0:
                rows.append([])
                left = limit
            end = min(length, start + left)
            rows[-1].append(Piece(number, start, end))
            left -= end - start
            start = end
    return rows
