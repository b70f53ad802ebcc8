"""Pairs and labelled completions: batches, what is cut, counted and refused."""

from pathlib import Path

import pytest
import torch

from rlx.core.data import check_data
from rlx.core.errors import DataError, ErrorGroup
from rlx.core.settings import Settings
from rlx.core.tree import plant
from rlx.plugins.datasets.wordmath import WordMath

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_rlhf_harmless_test.jsonl.gz"


def load(rows, tokenizer, eats="pairs", **options):
    options = {"algo": "dpo", "dataset": rows, "batch_size": 2, **options}
    return check_data(Settings(**options), tokenizer, eats=eats)[0]


def texts_of(sequences, tokenizer):
    return [tokenizer.decode(ids) for ids in sequences.ids.split(sequences.lengths.tolist())]


def scored_of(sequences, tokenizer):
    parts = zip(
        *(x.split(sequences.lengths.tolist()) for x in (sequences.ids, sequences.scored)), strict=True
    )
    return [tokenizer.decode(ids[flags]) for ids, flags in parts]


def pairs(n):
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "margin": i / 2} for i in range(n)]


def labels(n):
    return [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(n)]


def test_a_batch_of_pairs(chat_tokenizer):
    data = load(pairs(4), chat_tokenizer)
    batch = data.batch([3, 0, 1], [0, 2])
    assert texts_of(batch.sequences, chat_tokenizer) == [
        f"<|user|>p{i}<|end|><|assistant|>{side}{i}<|end|>" for i in (3, 1) for side in "cr"
    ]
    assert scored_of(batch.sequences, chat_tokenizer) == ["c3<|end|>", "r3<|end|>", "c1<|end|>", "r1<|end|>"]
    assert batch.sequences.groups.tolist() == [0, 0, 2, 2]
    assert torch.equal(batch.margin, torch.tensor([1.5, 0.5]))
    assert len(batch) == 2 and len(data) == 4 and len(data.batch([0, 1])) == 2
    plain = [{k: v for k, v in row.items() if k != "margin"} for row in pairs(2)]
    assert load(plain, chat_tokenizer).batch([0]).margin is None


def test_text_ends_with_end_of_sequence(plain_tokenizer):
    rows = [
        {"prompt": "a", "chosen": " b", "rejected": " c<|end|>"},
        {"prompt": "1" * 30, "chosen": "2" * 40, "rejected": ""},
    ]
    data = load(rows, plain_tokenizer, max_length=50)
    sequences = data.batch([0, 1]).sequences
    found = texts_of(sequences, plain_tokenizer)
    assert found[:2] == ["a b<|end|>", "a c<|end|>"]
    # What max_length cuts has no end.
    assert found[2:] == ["1" * 30 + "2" * 20, "1" * 30 + "<|end|>"]
    assert any("rejected is empty in 1 of 2 rows" in line for line in data.report)  # fault[D5]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "drop"], ids=lambda mode: f"fault[D7]-{mode}")
def test_what_is_too_long(plain_tokenizer, mode):
    prompt, answer = "1" * 20, "2" * 9  # a token a digit
    rows = [
        {"prompt": prompt, "chosen": answer, "rejected": "3"},
        {"prompt": "1" * 4, "chosen": "2", "rejected": "3"},
        {"prompt": "1" * 40, "chosen": "2" * 40, "rejected": "3"},
    ]
    data = load(rows, plain_tokenizer, max_length=25, truncation_mode=mode)
    found = texts_of(data.batch(range(len(data))).sequences, plain_tokenizer)
    short = ["11112<|end|>", "11113<|end|>"]
    assert (
        found
        == {
            "keep_start": [prompt + "22222", prompt + "3<|end|>", *short],
            "keep_end": ["1" * 15 + answer + "<|end|>", "1" * 15 + "3<|end|>", *short],
            "drop": short,
        }[mode]
    )
    why = {"keep_start": "prompt alone over", "keep_end": "completion alone over", "drop": "over"}[mode]
    left_out = 2 if mode == "drop" else 1
    assert f"left out {left_out} of 3 rows: {why} max_length 25" in data.report
    assert max(data.batch(range(len(data))).sequences.lengths) <= 25


def test_never_over_the_positions_of_the_model(plain_tokenizer):  # fault[D7]
    options = Settings(algo="dpo", dataset=[{"prompt": "1" * 5, "chosen": "2" * 90, "rejected": "3"}])
    data, _ = check_data(options, plain_tokenizer, eats="pairs", max_positions=30)
    assert data.batch([0]).sequences.lengths.max() == 30
    assert any("the 30 positions of the model, less than max_length 1024" in line for line in data.report)


def test_a_batch_of_labelled_completions_and_its_mismatched_pairs(chat_tokenizer):
    data = load(labels(5), chat_tokenizer, "labeled")
    rows = [4, 1, 0]
    whole = data.batch(rows)
    assert scored_of(whole.sequences, chat_tokenizer) == ["c4<|end|>", "c1<|end|>", "c0<|end|>"]
    assert whole.desirable.tolist() == [True, False, True]
    assert texts_of(whole.mismatched, chat_tokenizer) == [
        f"<|user|>p{p}<|end|><|assistant|>c{c}<|end|>" for p, c in [(4, 1), (1, 0), (0, 4)]
    ]
    # The pairs are those of the whole batch, however it is split between processes.
    parts = [data.batch(rows, [0, 2]), data.batch(rows, [1])]
    found = [texts_of(part.mismatched, chat_tokenizer) for part in parts]
    assert [found[0][0], found[1][0], found[0][1]] == texts_of(whole.mismatched, chat_tokenizer)
    assert data.batch([2]).mismatched is None


def test_labelled_completions_of_one_prompt_share_it(chat_tokenizer):
    """Wherever they stand in the batch, and whichever process has them; so do their mismatched ones."""
    rows = [{"prompt": f"p{i % 2}", "completion": f"c{i}", "label": i > 1} for i in range(4)]
    data = load(rows, chat_tokenizer, "labeled")
    whole = data.batch([3, 0, 1, 2])
    assert whole.sequences.groups.tolist() == whole.mismatched.groups.tolist() == [0, 1, 0, 1]
    assert data.batch([3, 0, 1, 2], [2, 3]).sequences.groups.tolist() == [0, 1]
    for sequences in (whole.sequences, whole.mismatched):
        prompt, completion = int(sequences.prompt_lengths[0]), int(sequences.counts[0])
        fed = plant(sequences, sequences.scored.nonzero()[:, 0] - 1)
        # Both prompts once; of the completions "c", the same in all four, once as well.
        assert len(fed) == 2 * (prompt + 1 + 2 * (completion - 2))


def test_mismatched_pairs_keep_the_limit(plain_tokenizer):
    rows = [
        {"prompt": "1" * 20, "completion": "2", "label": True},
        {"prompt": "1", "completion": "2" * 20, "label": False},
    ]
    for mode in ("keep_start", "keep_end", "drop"):
        data = load(rows, plain_tokenizer, "labeled", max_length=22, truncation_mode=mode)
        batch = data.batch([0, 1])
        assert batch.sequences.lengths.tolist() == [22, 22]
        assert batch.mismatched.lengths.tolist() == [22, 3]


def test_pairs_become_labelled_completions(chat_tokenizer):
    data = load(pairs(2), chat_tokenizer, "labeled")
    assert data.batch(range(4)).desirable.tolist() == [True, False, True, False]
    assert "transform unpair: 2 rows became 4" in data.report
    assert "2 desirable and 2 undesirable completions" in data.report


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "chosen is NoneType, not text or a list of messages"),
        ({"rejected": 3}, "rejected is int, not text or a list of messages"),
        ({"prompt": 3}, "prompt is int, not text or a list of messages"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"chosen": "a\0"}, "chosen has a NUL or half a surrogate pair in it, which cannot be encoded"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "chosen, turn 0: role is user, not assistant"),
        (
            {"chosen": [{"role": "assistant", "content": "x"}] * 2},
            "prompt with chosen: turn 2: two assistant turns in a row",
        ),
        (
            {"chosen": [{"role": "assistant", "content": 3}]},
            "prompt with chosen: turn 1: content is int, not text",
        ),
    ],
    ids=[
        f"fault[{f}]"
        for f in ("D2-none", "D2-int", "D2-prompt", "D3", "D9", "D10-user", "D10-twice", "D10-int")
    ],
)
def test_unusable_rows(chat_tokenizer, change, reason):
    rows = [{**row, **(change if i in (1, 3) else {})} for i, row in enumerate(pairs(8))]
    with pytest.raises(DataError) as caught:
        load(rows, chat_tokenizer)
    assert caught.value.got == f"{reason} (2)" and caught.value.where == "row 1, row 3"
    data = load(rows, chat_tokenizer, on_bad_row="drop", max_bad_rows=0.5)
    assert data.rows == [0, 2, 4, 5, 6, 7]
    assert any(reason in line for line in data.report)


def test_columns_that_are_not_there(chat_tokenizer):
    with pytest.raises(ErrorGroup) as caught:  # fault[D1]
        load([{"question": "q", "winner": "x"}], chat_tokenizer)
    assert "chosen" in str(caught.value) and "rejected" in str(caught.value)
    assert "--columns chosen=winner" in str(caught.value)


def test_pairs_without_a_difference(chat_tokenizer):
    same = [{"prompt": "p", "chosen": "x", "rejected": "x"}]
    data = load([*pairs(9), *[{**row, "margin": 1} for row in same]], chat_tokenizer)  # fault[D4]: 10 %
    assert "warning: 1 of 10 pairs have the same chosen and rejected tokens: row 9" in data.report
    with pytest.raises(DataError, match="nothing to learn"):  # fault[D4]
        load(same * 8, chat_tokenizer)


def test_nothing_left(chat_tokenizer):
    with pytest.raises(DataError) as caught:  # fault[D6]
        load(pairs(24), chat_tokenizer, max_length=3, truncation_mode="drop")
    assert "0 of 24 rows" in caught.value.what and "24 over max_length 3" in caught.value.what


def test_labels(chat_tokenizer):
    rows = [{**row, "label": label} for row, label in zip(labels(4), [1, "false", "Yes", 0.0], strict=True)]
    assert load(rows, chat_tokenizer, "labeled").desirable == [True, False, True, False]
    with pytest.raises(DataError, match="rows"):  # fault[D2]
        load([*rows, {**rows[0], "label": "maybe"}], chat_tokenizer, "labeled")
    same = load([{**row, "label": True} for row in labels(24)], chat_tokenizer, "labeled")  # fault[D13]
    assert any("every label is True" in line for line in same.report)


def test_margins(chat_tokenizer):
    for bad in (None, "much", float("nan")):
        rows = pairs(3)
        rows[1]["margin"] = bad
        with pytest.raises(DataError, match="margin is not a finite number"):
            load(rows, chat_tokenizer)


def test_few_rows_and_copies_are_told(chat_tokenizer):
    data = load(pairs(2) + pairs(1), chat_tokenizer, batch_size=8)
    assert any("3 rows are fewer than one batch of 8" in line for line in data.report)  # fault[D16]
    assert any("1 of 3 rows are copies of another" in line for line in data.report)  # fault[D17]


def test_the_fingerprint_follows_the_data(chat_tokenizer):
    one = load(pairs(3), chat_tokenizer).fingerprint
    assert one == load(pairs(3), chat_tokenizer).fingerprint
    assert one != load(pairs(3), chat_tokenizer, max_length=7).fingerprint
    assert one != load(pairs(4), chat_tokenizer).fingerprint


@pytest.mark.parametrize("eats", ["pairs", "labeled", "demonstrations"])
def test_the_playground(chat_tokenizer, eats):
    options = Settings(algo="dpo", dataset={"name": "wordmath", "train_rows": 8, "test_rows": 4})
    train, test = check_data(options, chat_tokenizer, eats=eats)
    assert (len(train), len(test)) == (8, 4)
    sequences = train.batch(range(8)).sequences
    scored, texts = scored_of(sequences, chat_tokenizer), texts_of(sequences, chat_tokenizer)
    assert texts[0].startswith("<|user|>Amy has 84 pencils. Ann has 14 more than Amy.")
    right = "84 + 14 = 98. Answer: 98<|end|>"
    assert scored[0] == right and len(texts) == (16 if eats == "pairs" else 8)
    if eats != "demonstrations":
        wrong = scored[1::2]
        answers = [row["answer"] for row in WordMath(WordMath.Config(train_rows=8)).rows("train")]
        expected = answers if eats == "pairs" else answers[1::2]
        assert not any(w.endswith(f"Answer: {a}<|end|>") for w, a in zip(wrong, expected, strict=True))


@pytest.mark.skipif(not HH.exists(), reason="the shared data is not here")
def test_real_dialogues_keep_their_text(chat_tokenizer):
    options = Settings(algo="dpo", dataset=str(HH), max_rows=200, max_length=100_000)
    data, _ = check_data(options, chat_tokenizer, eats="pairs", max_positions=100_000)
    assert len(data) == 200
    sequences = data.batch(range(len(data))).sequences
    texts, scored = texts_of(sequences, chat_tokenizer), scored_of(sequences, chat_tokenizer)
    assert all(text.startswith("\n\nHuman:") and text.endswith("<|end|>") for text in texts)
    assert all(text.endswith("\n\nAssistant:" + end) for text, end in zip(texts, scored, strict=True))
