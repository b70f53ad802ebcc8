"""Short documents put together into rows of about the same length.

A packed row is a group of documents, or of pieces of documents, that stay sequences of their own: none of
them sees another, and positions begin anew in each. What packing buys is rows of one size: a batch of them
has about the same number of tokens every time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Transform

STRATEGIES = ("bfd", "bfd_split", "wrapped")


class Piece(NamedTuple):
    """Tokens ``start`` to ``end`` (not included) of a document."""

    document: int
    start: int
    end: int


class Packing(Transform):
    """Puts tokenised demonstrations together into rows of about the same length.

    One of another kind takes its place where it has ``stage = "packing"``, ``groups`` and ``splits``.
    """

    stage = "packing"
    takes = frozenset({"length"})
    gives = frozenset({"pieces"})

    @dataclass(frozen=True)
    class Config:
        """How long the rows are, and which documents go together."""

        length: int | None = opt(None, "tokens of a row (default: max_length)", gt=1, unit="tokens")
        strategy: str = opt(
            "bfd",
            "bfd keeps documents whole; bfd_split splits those over the length; wrapped cuts wherever a row "
            "is full",
            choices=STRATEGIES,
            source="arXiv:2404.10830",
        )

    @property
    def splits(self) -> bool:
        """Whether a document may go into several rows, so that none is too long."""
        return bool(self.config.strategy != "bfd")

    def groups(self, lengths: Sequence[int], longest: int) -> list[list[Piece]]:
        """Which pieces of which documents make each row; see ``pack``.

        Args:
            lengths: tokens of each document.
            longest: tokens of a row where the option ``length`` does not say it.

        Raises:
            ConfigError: rows longer than ``longest``.
        """
        length = self.config.length or longest
        if length > longest:
            raise ConfigError(
                "packed rows would be longer than max_length",
                code="E-CONFIG-LENGTH",
                got=f"packing.length {length}",
                expected=f"at most {longest}",
                hint=f"--max-length {length}",
            )
        return pack(lengths, length, self.config.strategy)

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
        """Rows with ``length``, tokens of a document each → rows with ``pieces``, one a packed row."""
        lengths = [row["length"] for row in rows]
        longest = self.config.length or max([2, *lengths])
        return [{"pieces": group} for group in self.groups(lengths, longest)]


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
    if strategy not in STRATEGIES:
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
