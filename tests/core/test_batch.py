"""Flat batches: what belongs together stays together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.batch import Pairs, Prompts, Rollouts, Sequences, flat_index

LISTS = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.lists(st.integers(0, 9), max_size=4)),
    min_size=1,
    max_size=5,
)


def sequences(rows):
    return Sequences.from_lists([p for p, _ in rows], [c for _, c in rows])


@given(LISTS, st.randoms())
def test_take_picks_whole_sequences_in_the_order_asked_for(rows, random):
    index = [random.randrange(len(rows)) for _ in range(3)]
    taken, expected = sequences(rows).take(torch.tensor(index)), sequences([rows[i] for i in index])
    assert taken.ids.tolist() == expected.ids.tolist()
    assert taken.scored.tolist() == expected.scored.tolist()
    assert taken.counts.tolist() == [len(rows[i][1]) for i in index]
    assert taken.groups.tolist() == index


def test_flat_index_by_hand():
    # segments of length 2, 0, 3 begin at 0, 2, 2
    assert flat_index(torch.tensor([2, 0, 3]), torch.tensor([2, 1, 0])).tolist() == [2, 3, 4, 0, 1]


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        Sequences.from_lists([[1], []], [[2], [3]])


def test_first_token_of_a_sequence_cannot_be_scored():
    with pytest.raises(ValueError, match="no token precedes it"):
        Sequences(
            torch.tensor([1, 2]),
            torch.tensor([2]),
            torch.tensor([0]),
            torch.tensor([0]),
            torch.tensor([True, True]),
        )


def rollouts():
    seqs = Sequences.from_lists([[1], [1, 2], [3]], [[4, 5], [], [6]])
    prompts = Prompts(
        [[1], [1, 2], [3]], ["a", "b", "c"], [None] * 3, {"answer": ["x", "y", "z"]}, [10, 11, 12]
    )
    return Rollouts(
        seqs,
        prompts=prompts,
        texts=["t0", "t1", "t2"],
        finished=torch.tensor([True, False, True]),
        old=torch.tensor([0.1, 0.2, 0.3]),
        score=torch.tensor([1.0, 2.0, 3.0]),
        rewards={"r": torch.tensor([1.0, 2.0, 3.0])},
    )


def test_rollouts_take_moves_every_field_with_its_sequence():
    taken = rollouts().take(torch.tensor([2, 0]))
    assert taken.old.tolist() == pytest.approx([0.3, 0.1, 0.2])
    assert taken.texts == ["t2", "t0"]
    assert taken.prompts.columns == {"answer": ["z", "x"]} and taken.prompts.rows == [12, 10]
    assert taken.rewards["r"].tolist() == [3, 1] and taken.finished.tolist() == [True, True]
    assert taken.reference is None


def test_sizes_count_scored_tokens_sequences_and_rows():
    batch = rollouts()
    assert [float(batch.size(by)) for by in ("tokens", "sequences", "rows")] == [3, 3, 3]
    with pytest.raises(ValueError, match="not by 'prompts'"):
        batch.size("prompts")


def test_pairs_keep_both_answers_of_a_row_together():
    seqs = Sequences.from_lists([[1]] * 4, [[2], [3, 4], [5], [6]])
    pairs = Pairs(seqs, reference=torch.arange(5.0), margin=torch.tensor([0.5, 1.5]))
    second = pairs.take(torch.tensor([1]))
    assert len(pairs) == 2 and len(second) == 1
    assert second.sequences.ids.tolist() == [1, 5, 1, 6]
    assert second.reference.tolist() == [3, 4] and second.margin.tolist() == [1.5]
    assert float(pairs.size("rows")) == 2 and float(pairs.size("tokens")) == 5
