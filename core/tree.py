"""Sequences as one row of tokens without padding, in which what several of them begin with stands once.

The sequences of a group usually share a prompt: k completions of it, or the chosen and the rejected answer.
The tokens that all of them begin with (compared, never assumed) make a prefix, computed once; what is left of
each is a branch that sees the prefix and itself. A sequence without company is a branch without prefix.
Torch only; ``rlx.core.tree_attention`` makes a model's layers keep to it.

Legend: N sequences, T tokens of all sequences, M tokens of the row, at most T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlx.core.batch import Sequences

SPARE = 1000
"""Pairs of tokens that one call of attention may compute in vain to save another call: a call takes as long
as some 1000 pairs of 8 heads of 64 numbers."""


@dataclass(frozen=True)
class Chunk:
    """Adjacent tokens of the row that go through attention in one call.

    Attributes:
        pieces: first position and number of tokens of each segment in it. All see the first piece, and
            otherwise only themselves.
        prefix: number of the chunk that all of them see, or None.
    """

    pieces: tuple[tuple[int, int], ...]
    prefix: int | None = None

    def __len__(self) -> int:
        return sum(tokens for _, tokens in self.pieces)


@dataclass(frozen=True)
class Tree:
    """The row, and where to find each sequence in it.

    Attributes:
        places: (M,) int64, place in ``Sequences.ids`` of each token of the row.
        positions: (M,) int64, its position within its sequence.
        states: (T,) int64, place in the row of each token of the sequences; meaningless for tokens that are
            not in it.
        chunks: the parts of the row, in order.
    """

    places: Tensor
    positions: Tensor
    states: Tensor
    chunks: tuple[Chunk, ...]

    def __len__(self) -> int:
        return len(self.places)


def common_lengths(sequences: Sequences) -> Tensor:
    """How many leading tokens each sequence has in common with all others of its group.

    Args:
        sequences: N ≥ 0.

    Returns:
        (N,) int64; 0 for a sequence without company.
    """
    count, lengths = len(sequences), sequences.lengths
    if not count:
        return torch.zeros_like(lengths)
    _, group = sequences.groups.unique(return_inverse=True)
    number = torch.arange(count, device=lengths.device)
    first = torch.full_like(number, count).scatter_reduce(0, group, number, "amin")[group]  # (N,)
    columns = torch.arange(int(lengths.max()), device=lengths.device)
    real = columns < lengths[:, None]
    ids = torch.zeros_like(real, dtype=torch.long)
    ids[real] = sequences.ids
    same = (ids == ids[first]) & real & real[first]
    # Of each with the first one; a sequence that is itself the first one has no say.
    common = same.long().cumprod(1).sum(1).masked_fill(first == number, len(columns) + 1)
    least = torch.full_like(number, len(columns) + 1).scatter_reduce(0, group, common, "amin")[group]
    return least.masked_fill(least > len(columns), 0)


def plant(sequences: Sequences, wanted: Tensor, *, merge: bool = True) -> Tree:
    """The row for sequences of which some states are wanted.

    Args:
        sequences: at least one token.
        wanted: (K,) int64, places in ``Sequences.ids`` whose states are wanted. No sequence goes further into
            the row than its last wanted token. With none, the row is a single token.
        merge: put a small prefix and its branches into one call of attention.
    """
    keep = torch.zeros_like(sequences.lengths)
    if len(wanted):
        within = wanted - sequences.starts[sequences.owners[wanted]]
        keep = keep.scatter_reduce(0, sequences.owners[wanted], within + 1, "amax")
    else:
        keep[int(sequences.lengths.argmax())] = 1
    common = common_lengths(sequences)
    starts, group, keep_, common_ = torch.stack(
        [sequences.starts, sequences.groups, keep, common]
    ).tolist()  # one wait for the device
    grown = _grow(group, keep_, common_, merge)
    segments = torch.tensor(
        grown.segments, device=keep.device
    )  # (segments, 3): owner, first position, tokens
    owner, position, tokens = segments.unbind(1)
    places = _ranges(torch.tensor(starts, device=keep.device)[owner] + position, tokens)
    positions = _ranges(position, tokens)
    # A sequence's token t stands at prefix + t while t < common, else at branch + t − common.
    at = torch.tensor(grown.at, device=keep.device)  # (N, 2): start of prefix and of branch
    owners = sequences.owners
    inside = torch.arange(len(sequences.ids), device=keep.device) - sequences.starts[owners]
    shared = common[owners]
    states = torch.where(inside < shared, at[owners, 0] + inside, at[owners, 1] + inside - shared)
    return Tree(places, positions, states, grown.chunks)


@dataclass(frozen=True)
class _Grown:
    """Segments as (owner, first position, tokens) in row order; starts of prefix and branch per sequence."""

    segments: list[tuple[int, int, int]]
    at: list[tuple[int, int]]
    chunks: tuple[Chunk, ...]


def _grow(groups: list[int], keep: list[int], common: list[int], merge: bool) -> _Grown:
    """Lay out prefixes and branches, group after group in the order in which groups first appear."""
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    segments: list[tuple[int, int, int]] = []
    at, chunks, row = [(0, 0)] * len(groups), list[Chunk](), 0
    for rows in members.values():
        shared = common[rows[0]]
        longest = max(rows, key=lambda number: keep[number])
        prefix, begin = min(shared, keep[longest]), row
        parts = [(longest, 0, prefix)] if prefix else []
        row += prefix
        for number in rows:
            at[number] = (begin, row)
            branch = max(0, keep[number] - shared)
            if branch:
                parts.append((number, shared, branch))
            row += branch
        segments += parts
        chunks += _chunks([(first, tokens) for _, first, tokens in parts], bool(prefix), len(chunks), merge)
    return _Grown(segments, at, tuple(chunks))


def _chunks(pieces: list[tuple[int, int]], rooted: bool, number: int, merge: bool) -> list[Chunk]:
    """One group's chunks: a piece each, or all pieces in one where little is computed in vain.

    Args:
        pieces: the prefix first, if there is one.
        rooted: whether there is.
        number: of the first chunk.
        merge: whether pieces may be put together.
    """
    if not rooted:
        return [Chunk((piece,)) for piece in pieces]
    trunk = pieces[0][1]
    together = sum(tokens for _, tokens in pieces) ** 2
    apart = trunk**2 + sum(tokens * (trunk + tokens) for _, tokens in pieces[1:])
    if merge and together - apart <= SPARE * (len(pieces) - 1):
        return [Chunk(tuple(pieces))]
    return [Chunk((pieces[0],)), *(Chunk((piece,), number) for piece in pieces[1:])]


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, … of each length, one after another."""
    offsets = starts - (lengths.cumsum(0) - lengths)
    each = torch.repeat_interleave(offsets, lengths)
    return each + torch.arange(len(each), device=lengths.device)
