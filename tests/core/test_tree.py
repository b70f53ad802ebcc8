"""The row that sequences become: what is in it once, where each token is, and how it is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from rlx.core import varlen
from rlx.core.batch import Sequences
from rlx.core.microbatch import cut_trees
from rlx.core.tree import Chunk, Tree, common_lengths, plant
from rlx.core.tree_attention import TreeMask, attention

PAIR = Sequences.from_lists([[5, 6, 7], [9], [5, 6, 7]], [[1, 1], [2, 3, 4], [1, 8, 8]], groups=[4, 0, 4])


def everywhere(sequences: Sequences) -> torch.Tensor:
    return torch.arange(len(sequences.ids))


def test_by_hand() -> None:
    # 5 6 7 1 | 1 and 5 6 7 1 | 8 8 have four tokens in common: one more than their prompt. 9 2 3 4 is alone.
    assert common_lengths(PAIR).tolist() == [4, 0, 4]
    tree = plant(PAIR, everywhere(PAIR), merge=False)
    assert PAIR.ids[tree.places].tolist() == [5, 6, 7, 1, 1, 8, 8, 9, 2, 3, 4]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 4, 5, 0, 1, 2, 3]
    assert tree.states.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 0, 1, 2, 3, 5, 6]
    assert tree.chunks == (Chunk(((0, 4),)), Chunk(((4, 1),), 0), Chunk(((4, 2),), 0), Chunk(((0, 4),)))
    merged = plant(PAIR, everywhere(PAIR))
    assert merged.chunks == (Chunk(((0, 4), (4, 1), (4, 2))), Chunk(((0, 4),)))
    assert torch.equal(merged.places, tree.places)


def test_what_comes_after_the_last_wanted_token_is_left_out() -> None:
    tree = plant(PAIR, torch.tensor([4, 6, 10]), merge=False)  # last of the first, 2 of the second, 6
    assert PAIR.ids[tree.places].tolist() == [5, 6, 7, 1, 1, 9, 2]
    assert tree.places[tree.states[torch.tensor([4, 6])]].tolist() == [4, 6]
    assert PAIR.ids[tree.places[tree.states[10]]] == 6  # computed for the first sequence
    nothing = plant(PAIR, torch.zeros(0, dtype=torch.long))
    assert len(nothing) == 1


def test_large_prefixes_keep_their_branches_apart() -> None:
    prompt = list(range(100))
    sequences = Sequences.from_lists([prompt] * 3, [[1] * 20, [2] * 20, [3] * 20], groups=[0, 0, 0])
    # In one call 160² pairs, apart 100² + 3·20·120: 8400 in vain, and three calls are worth 3000.
    assert len(plant(sequences, everywhere(sequences)).chunks) == 4
    small = Sequences.from_lists([prompt[:30]] * 3, [[1] * 9, [2] * 9, [3] * 9], groups=[0, 0, 0])
    assert len(plant(small, everywhere(small)).chunks) == 1


def test_the_same_group_without_the_same_tokens_shares_nothing() -> None:
    one = Sequences.from_lists([[5, 6], [6, 6]], [[1], [1]], groups=[0, 0])
    other = Sequences.from_lists([[5, 6], [5, 6]], [[1], [1]], groups=[0, 1])
    assert common_lengths(one).tolist() == common_lengths(other).tolist() == [0, 0]


GROUPED = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(1, 2), min_size=1, max_size=6)), min_size=1, max_size=8
)


def made(rows: list[tuple[int, list[int]]]) -> Sequences:
    """Sequences over two tokens, so that much is shared by chance."""
    return Sequences.from_lists(
        [ids[:1] for _, ids in rows], [ids[1:] for _, ids in rows], [g for g, _ in rows]
    )


@given(GROUPED, st.booleans())
def test_every_token_is_in_the_row_with_all_that_it_sees(
    rows: list[tuple[int, list[int]]], merge: bool
) -> None:
    sequences = made(rows)
    tree = plant(sequences, everywhere(sequences), merge=merge)
    assert torch.equal(sequences.ids[tree.places[tree.states]], sequences.ids)
    within = everywhere(sequences) - sequences.starts[sequences.owners]
    assert torch.equal(tree.positions[tree.states], within)
    assert sum(len(chunk) for chunk in tree.chunks) == len(tree) == len(set(tree.states.tolist()))
    # Naive: the longest beginning that all of a group have, once a group.
    expected = 0
    for group in {g for g, _ in rows}:
        ids = [tuple(row) for g, row in rows if g == group]
        common = 0
        while len(ids) > 1 and all(len(row) > common for row in ids) and len({r[common] for r in ids}) == 1:
            common += 1
        expected += common + sum(len(row) - common for row in ids)
    assert len(tree) == expected
    # Each token sees its own sequence's earlier ones and itself, by the chunks.
    seen = visible(tree)
    for number, length in enumerate(sequences.lengths.tolist()):
        start = int(sequences.starts[number])
        path = tree.states[start : start + length]
        for t in range(length):
            assert set(seen[path[t]].nonzero().flatten().tolist()) == set(path[: t + 1].tolist())


def visible(tree: Tree, window: int = 0) -> torch.Tensor:
    """(M, M) bool, who sees whom, read off what the mask adds to scores."""
    rule = lambda b, h, q, k: (k <= q) & ((q - k < window) if window else (k <= q))  # noqa: E731
    biases = TreeMask(tree, rule, window).biases(torch.zeros(1))
    seen = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    ends = torch.tensor([0, *(len(chunk) for chunk in tree.chunks)]).cumsum(0).tolist()
    for number, (chunk, bias) in enumerate(zip(tree.chunks, biases, strict=True)):
        rows = torch.arange(ends[number], ends[number + 1])
        keys = rows if chunk.prefix is None else torch.cat(
            [torch.arange(ends[chunk.prefix], ends[chunk.prefix + 1]), rows]
        )  # fmt: skip
        allowed = torch.ones(len(rows), len(rows)).tril() > 0 if bias is None else bias == 0
        seen[rows[:, None], keys] = allowed
    return seen


# Micro-batches


@given(GROUPED, st.integers(1, 40))
def test_every_row_once_and_within_the_budget(rows: list[tuple[int, list[int]]], budget: int) -> None:
    sequences = made(rows)
    parts = cut_trees(sequences, budget)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(rows)))
    sizes = [len(plant(taken, everywhere(taken))) for taken in map(sequences.take, parts)]
    for part, size in zip(parts, sizes, strict=True):
        assert len(part) == 1 or size <= budget
    whole = len(plant(sequences, everywhere(sequences)))
    if budget >= whole:
        assert len(parts) == 1
    if all(len(plant(t, everywhere(t))) <= budget for t in families(sequences)):
        assert sum(sizes) == whole  # no group was parted


def families(sequences: Sequences) -> list[Sequences]:
    return [sequences.take((sequences.groups == g).nonzero().squeeze(1)) for g in sequences.groups.unique()]


def test_cut_by_hand() -> None:
    # Groups: 7 has 4 + 1 + 2 + 1 = 8 tokens, 3 has 3 + 1 + 1 = 5, 5 has 6. Budget 11: 8, then 6 + 5.
    rows = [(3, 3, 1), (7, 4, 1), (5, 6, 0), (7, 4, 2), (3, 3, 1), (7, 4, 1)]
    sequences = Sequences.from_lists(
        [[g] * p for g, p, _ in rows],
        [[100 + i] * c for i, (_, _, c) in enumerate(rows)],
        [g for g, _, _ in rows],
    )
    assert [part.tolist() for part in cut_trees(sequences, 11)] == [[1, 3, 5], [2, 0, 4]]
    # Budget 7: group 7 is too large; two of its rows take 4 + 1 + 2, the third begins anew with 4 + 1.
    assert [part.tolist() for part in cut_trees(sequences, 7)] == [[1, 3], [5], [2], [0, 4]]
    with pytest.raises(ValueError, match="at least 1 token"):
        cut_trees(sequences, 0)


def test_pairs_are_cut_as_pairs() -> None:
    prompts, completions = [[1, 2], [1, 2], [3], [3]], [[5], [6], [7, 7], [8]]
    pairs = Sequences.from_lists(prompts, completions, groups=[0, 0, 1, 1])
    assert [part.tolist() for part in cut_trees(pairs, 8, per_row=2)] == [[0, 1]]
    assert [part.tolist() for part in cut_trees(pairs, 7, per_row=2)] == [[0], [1]]
    with pytest.raises(ValueError, match="do not fill rows"):
        cut_trees(pairs.take(torch.tensor([0, 1, 2])), 7, per_row=2)
    assert cut_trees(Sequences.from_lists([], []), 7) == []


# The kernel for variable lengths, by a stand-in that follows its documentation


def documented(q, k, v, ends_q, ends_k, most_q, most_k, *, scale, window_size, enable_gqa):
    """Flash attention's rules: (tokens, heads, numbers), ends aligned, window as (left, right)."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and q.is_contiguous()
    found = []
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        assert b - a <= most_q and d - c <= most_k
        rows = torch.arange(int(d - c) - int(b - a), int(d - c))[:, None]
        columns = torch.arange(int(d - c))
        seen = columns <= rows + window_size[1]
        if window_size[0] >= 0:
            seen &= columns >= rows - window_size[0]
        one = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        found.append(sdpa(*one, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(found)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: documented)
    monkeypatch.setattr(varlen, "works", lambda *tensors: True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("window", [0, 2, 4])
def test_the_kernel_is_told_the_same_tree(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = plant(PAIR, everywhere(PAIR), merge=False)
    rule = lambda b, h, q, k: (k <= q) & (q - k < (window or 100))  # noqa: E731
    mask, random = TreeMask(tree, rule, window), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(tree), 8, generator=random) for heads in (4, 2, 2))
    layer = torch.nn.Identity()
    by_kernel, _ = attention(layer, q, k, v, mask, scaling=0.3)
    want = sdpa(q, k, v, attn_mask=visible(tree, window), scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(by_kernel, want)
    monkeypatch.undo()
    torch.testing.assert_close(attention(layer, q, k, v, mask, scaling=0.3)[0], want)


@pytest.mark.usefixtures("kernel")
def test_the_kernel_is_not_told_what_it_cannot_do() -> None:
    tree = plant(PAIR, everywhere(PAIR), merge=False)
    blocks = lambda b, h, q, k: (k <= q) & (k // 2 == q // 2)  # noqa: E731
    assert TreeMask(tree, blocks, 2).ragged is None
    assert TreeMask(plant(PAIR, everywhere(PAIR)), lambda b, h, q, k: k <= q, 0).ragged is None  # merged


@pytest.mark.parametrize("pairs", [4, 2])
def test_the_kernel_is_compared_with_plain_attention_first(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (torch.device("cpu"), torch.float32, 4, pairs, 8, 8)
    monkeypatch.setattr(varlen, "_kernel", lambda: documented)
    assert varlen.deviation(*arguments, 0) < 1e-5 and varlen.deviation(*arguments, 3) < 1e-5

    def aligned_at_the_start(q, k, v, ends_q, ends_k, *rest, **options):
        first = []
        for a, b, c in zip(ends_q, ends_q[1:], ends_k, strict=False):
            ends = torch.tensor([0, b - a], dtype=torch.int32)
            keys = slice(c, c + b - a)
            first.append(documented(q[a:b], k[keys], v[keys], ends, ends, *rest, **options))
        return torch.cat(first)

    monkeypatch.setattr(varlen, "_kernel", lambda: aligned_at_the_start)
    assert varlen.deviation(*arguments, 0) > 0.1
    varlen._checked.cache_clear()
    assert not varlen._checked(*arguments)

    def window_of_one_more(*words, window_size, **options):
        return documented(*words, window_size=(window_size[0] + 1, 0), **options)

    monkeypatch.setattr(varlen, "_kernel", lambda: window_of_one_more)
    assert varlen.deviation(*arguments, 3) > 0.1

    def missing():
        raise ImportError("no kernel")

    varlen._checked.cache_clear()
    monkeypatch.setattr(varlen, "_kernel", missing)
    assert not varlen._checked(*arguments)
    varlen._checked.cache_clear()


def test_the_first_use_may_be_in_a_checkpointed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: documented)
    found, weight = [], torch.ones(3, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = x * weight
        found.append(varlen._checked(torch.device("cpu"), torch.float32, 2, 1, 8, 8))
        return (y * weight).sum()

    varlen._checked.cache_clear()
    checkpoint(layer, torch.ones(3), use_reentrant=False).backward()
    varlen._checked.cache_clear()
    assert found == [True, True] and weight.grad.tolist() == [2, 2, 2]


def test_the_kernel_is_for_half_precision_on_cuda() -> None:
    half = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not varlen.works(half, half, half)
