"""Prompt and answer as tokens: nothing lost, nothing shifted, whatever merges over the boundary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlx.core.tokens import cut_places, fitted, split_tokenised


def merging(begins_with_space=False):
    """A tokenizer with the tokens a, b, c, ab, bc, abc; one kind puts a space before every text."""
    alphabet = ["a", "b", "c", "\u2581", "ab", "bc", "abc", "<eos>"]
    merges = [("b", "c"), ("a", "bc"), ("a", "b")]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges))
    if begins_with_space:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        inner.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


PLAIN, SPACED = merging(), merging(begins_with_space=True)


def split(tokenizer, prompt, answer):
    [found] = split_tokenised(tokenizer, [prompt], [answer], special=False)
    return tuple(tokenizer.convert_ids_to_tokens(ids) for ids in found)


def test_one_text_where_the_boundary_allows():
    assert split(PLAIN, "ab", "ab") == (["ab"], ["ab"])
    assert split(PLAIN, "bc", "") == (["bc"], [])


def test_apart_where_a_merge_reaches_over():
    assert PLAIN.tokenize("abc") == ["abc"]
    assert split(PLAIN, "ab", "c") == (["ab"], ["c"])
    assert split(PLAIN, "a", "bca") == (["a"], ["bc", "a"])


def test_the_token_goes_to_the_answer_where_apart_is_another_text():
    assert SPACED.tokenize("c") == ["\u2581", "c"]  # apart there would be a space before c
    assert split(SPACED, "ab", "c") == (["\u2581"], ["abc"])
    assert split(SPACED, "cb", "c") == (["\u2581", "c"], ["bc"])


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.sampled_from([PLAIN, SPACED]))
def test_nothing_is_lost_or_shifted(prompt, answer, tokenizer):
    [(start, end)] = split_tokenised(tokenizer, [prompt], [answer], special=False)
    assert tokenizer.decode(start + end) == prompt + answer
    begun = tokenizer(prompt)["input_ids"]
    assert start == begun[: len(start)]
    if tokenizer is PLAIN:
        assert start == begun  # what the model is given when it samples


@given(st.text("abc ", max_size=8), st.text("abc é\n", max_size=8))
def test_the_packaged_tokenizer(chat_tokenizer, prompt, answer):
    [(start, end)] = split_tokenised(chat_tokenizer, [prompt], [answer], special=True)
    assert chat_tokenizer.decode(start) == prompt
    assert chat_tokenizer.decode(end) == answer


IDS = st.lists(st.integers(0, 9), max_size=8)


@given(IDS, st.lists(IDS, min_size=1, max_size=2), st.integers(1, 12))
def test_cut_to_a_limit(prompt, answers, limit):
    longest = len(prompt) + max(map(len, answers))
    for mode in ("keep_start", "keep_end", "drop"):
        found = fitted(prompt, answers, limit, mode)
        if longest <= limit:
            assert found == (prompt, answers)
        elif found is None:
            assert {
                "keep_start": len(prompt) >= limit,
                "keep_end": max(map(len, answers)) >= limit,
                "drop": True,
            }[mode]
        else:
            start, ends = found
            assert len(start) + max(map(len, ends)) == limit
            if mode == "keep_start":
                assert start == prompt
                assert all(a[: len(e)] == e for a, e in zip(answers, ends, strict=True))
            else:
                assert ends == answers and start and prompt[-len(start) :] == start


def test_cut_places_give_a_straddling_token_to_what_follows():
    ids = PLAIN("cabcb")["input_ids"]
    assert PLAIN.convert_ids_to_tokens(ids) == ["c", "abc", "b"]
    assert cut_places(PLAIN, "cabcb", ids, [0, 1, 2, 4, 5]) == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("special", [True, False])
def test_no_texts(chat_tokenizer, special):
    assert split_tokenised(chat_tokenizer, [], [], special=special) == []
