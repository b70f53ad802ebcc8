"""The whole way from rows to token ids: what comes out, what is reported, what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.data import check_data, load_prompts, overlap
from rlx.core.errors import ConfigError, DataError, ErrorGroup
from rlx.core.settings import Settings

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl.gz"
NEEDED = {"exact_match": ("answer",)}


def settings(dataset, **options):
    return Settings(**{"dataset": dataset, "batch_size": 2, "max_completion_length": 24, **options})


def texts(prompts):
    return [{"prompt": prompt, "answer": str(i)} for i, prompt in enumerate(prompts)]


def test_the_playground(chat_tokenizer):
    train, test = check_data(settings("wordmath", batch_size=64), chat_tokenizer, columns_needed=NEEDED)
    assert (len(train), len(test)) == (8192, 512)
    assert train.report == [
        "wordmath/train: 8192 rows",
        "8192 prompts through the chat template: 19 to 24 tokens, mean 22.7",
    ]
    taken = train.take([1, 0, 1])
    assert taken.rows == [1, 0, 1]
    question = "Amy has 84 pencils. Ann has 14 more than Amy. How many pencils does Ann have?"
    assert taken.texts[1] == f"<|user|>{question}<|end|><|assistant|>"
    assert taken.ids[1] == chat_tokenizer(taken.texts[1])["input_ids"]
    assert taken.columns["answer"][1] == "98" and taken.columns["prompt"][1] == question
    assert not any(name.startswith("_") for name in taken.columns)
    assert taken.messages == [None] * 3


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not at ../shared/data")
def test_gsm8k_as_it_comes(chat_tokenizer):
    found = load_prompts(settings(str(GSM8K), max_prompt_length=800), chat_tokenizer, columns_needed=NEEDED)
    assert len(found) == 7473
    assert "prompt ← question" in found.report
    assert found.prompts.columns["answer"][0].endswith("#### 72")
    assert found.prompts.texts[0].startswith("<|user|>Natalia sold clips to 48 of her friends")


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not at ../shared/data")
def test_real_prompts_over_the_limit(chat_tokenizer):
    with pytest.raises(DataError) as caught:
        load_prompts(settings(str(GSM8K)), chat_tokenizer)
    assert caught.value.what == "7 of 7473 prompts of gsm8k_train.jsonl.gz are longer than 512 tokens"
    assert caught.value.where.startswith("gsm8k_train.jsonl.gz:400, ") and caught.value.where.endswith(
        " and 2 more"
    )


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1
    )
)
def test_no_prompt_is_lost_or_shifted(plain_tokenizer, prompts):
    prompts = [f"x{prompt}" for prompt in prompts]
    found = load_prompts(settings(texts(prompts), max_prompt_length=900), plain_tokenizer)
    assert found.prompts.texts == prompts
    assert found.prompts.columns["answer"] == [str(i) for i in range(len(prompts))]
    assert all(found.prompts.ids)


def test_the_fingerprint_follows_rows_and_rendering(chat_tokenizer):
    def fingerprint(rows, **options):
        return load_prompts(settings(rows, **options), chat_tokenizer).fingerprint

    first = fingerprint(texts("abc"))
    assert fingerprint(texts("abc")) == first
    others = [
        fingerprint(texts("abd")),
        fingerprint([{**row, "answer": "9"} for row in texts("abc")]),
        fingerprint(texts("abc"), system_prompt="S"),
        fingerprint(texts("abc"), max_rows=2),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize("fault", ["fault[D1]"])
def test_missing_columns_are_told_together(chat_tokenizer, fault):
    rows = [{"q": "x", "solution": "1", "n": 3}]
    with pytest.raises(ErrorGroup) as caught:
        load_prompts(settings(rows), chat_tokenizer, columns_needed=NEEDED)
    prompt, answer = caught.value.problems
    assert prompt.what == "ppo needs the column 'prompt', which the list given does not have"
    assert (prompt.got, prompt.hint) == ("q, solution, n", "--columns prompt=q")
    assert answer.what.startswith("reward exact_match needs the column 'answer'")
    assert answer.hint == "--columns answer=solution"
    assert caught.value.exit_code == 3
    assert len(caught.value.lines()) <= 12
    mapped = settings(rows, columns={"prompt": "q", "answer": "solution"})
    found = load_prompts(mapped, chat_tokenizer, columns_needed=NEEDED)
    assert found.prompts.columns == {
        "prompt": ["x"],
        "answer": ["1"],
        "q": ["x"],
        "solution": ["1"],
        "n": [3],
    }
    assert "columns: prompt ← q, answer ← solution" in found.report


@pytest.mark.parametrize("fault", ["fault[D1]-mapping"])
def test_a_mapping_from_nowhere(chat_tokenizer, fault):
    with pytest.raises(DataError, match="columns maps from 'qestion'") as caught:
        load_prompts(settings([{"question": "x"}], columns={"prompt": "qestion"}), chat_tokenizer)
    assert caught.value.hint == "did you mean 'question'?"


BAD_ROWS = [{"prompt": p} for p in ("a", None, "b", 3, "", "c", "\ud800", "d")]


@pytest.mark.parametrize("fault", ["fault[D2]-error", "fault[D3]-error", "fault[D9]-error"])
def test_rows_that_cannot_be_used_are_told_together(chat_tokenizer, fault):
    with pytest.raises(DataError) as caught:
        load_prompts(settings(BAD_ROWS), chat_tokenizer)
    assert caught.value.exit_code == 3
    assert caught.value.what == "4 of 8 rows of the list given cannot be used"
    assert caught.value.where == "row 1, row 3, row 4, row 6"
    for reason in ("prompt is NoneType", "prompt is int", "prompt is empty (1)", "cannot be encoded"):
        assert reason in caught.value.got
    assert "--on-bad-row drop" in caught.value.hint


def test_a_value_that_a_reward_will_miss_is_told(chat_tokenizer):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b"}, {"prompt": "c", "answer": None}]
    found = load_prompts(settings(rows), chat_tokenizer, columns_needed=NEEDED)
    assert "warning: answer is missing in 2 of 3 rows: row 1, row 2" in found.report


def test_only_five_places_are_named(chat_tokenizer):
    with pytest.raises(DataError) as caught:
        load_prompts(settings([{"prompt": ""}] * 8), chat_tokenizer)
    assert caught.value.where == "row 0, row 1, row 2, row 3, row 4 and 3 more"


@pytest.mark.parametrize("fault", ["fault[D2]-drop"])
def test_bad_rows_are_dropped_up_to_a_share(chat_tokenizer, fault):
    with pytest.raises(DataError, match="4 of 8 rows") as caught:
        load_prompts(settings(BAD_ROWS, on_bad_row="drop"), chat_tokenizer)
    assert caught.value.expected == "at most 1.00% of the rows: max_bad_rows 0.01"
    assert caught.value.hint.endswith("--max-bad-rows 0.55")
    found = load_prompts(settings(BAD_ROWS, on_bad_row="drop", max_bad_rows=0.5), chat_tokenizer)
    assert found.prompts.rows == [0, 2, 5, 7]
    assert found.report[1].startswith("left out 4 of 8 rows: cannot be used: ")


@pytest.mark.parametrize("fault", ["fault[D6]"])
def test_no_row_left(chat_tokenizer, fault):
    rows = texts(["x" * 200] * 24)
    with pytest.raises(DataError) as caught:
        load_prompts(settings(rows, max_prompt_length=128, prompt_overflow="drop"), chat_tokenizer)
    assert caught.value.what == "0 of 24 rows of the list given left: 24 over max_prompt_length 128"


@pytest.mark.parametrize("fault", ["fault[D7]"])
def test_prompts_over_the_limit(chat_tokenizer, fault):
    # One token a digit, and three around it: <|user|> … <|end|><|assistant|>.
    rows = texts(["1" * 10, "1" * 400, "1" * 125])
    with pytest.raises(DataError, match="1 of 3 prompts") as caught:
        load_prompts(settings(rows, max_prompt_length=128), chat_tokenizer)
    assert (caught.value.where, caught.value.got) == ("row 1", "up to 403 tokens")
    assert "--max-prompt-length 403" in caught.value.hint
    dropped = load_prompts(settings(rows, max_prompt_length=128, prompt_overflow="drop"), chat_tokenizer)
    assert dropped.prompts.rows == [0, 2]
    assert "left out 1 of 3 rows: over max_prompt_length 128" in dropped.report
    cut = load_prompts(settings(rows, max_prompt_length=128, prompt_overflow="truncate_left"), chat_tokenizer)
    assert [len(ids) for ids in cut.prompts.ids] == [13, 128, 128]
    assert cut.prompts.texts[1] == "1" * 126 + "<|end|><|assistant|>"
    assert cut.prompts.texts[2].startswith("<|user|>")
    assert "cut 1 prompts on the left to 128 tokens: max_prompt_length 128" in cut.report


@pytest.mark.parametrize("policy", ["error", "drop", "truncate_left"], ids="fault[D7]-{}".format)
def test_prompt_and_completion_fit_the_model(chat_tokenizer, policy):
    # 100 positions less 24 of completion leave 76, although 512 are allowed.
    rows = texts(["1" * 73, "1" * 74])
    options = settings(rows, prompt_overflow=policy)
    if policy == "error":
        with pytest.raises(DataError) as caught:
            load_prompts(options, chat_tokenizer, max_positions=100)
        assert caught.value.expected == "at most 76: 100 positions of the model less max_completion_length 24"
        return
    lengths = [len(ids) for ids in load_prompts(options, chat_tokenizer, max_positions=100).prompts.ids]
    assert lengths == {"drop": [76], "truncate_left": [76, 76]}[policy]


def test_the_tokenizer_knows_a_limit_too(chat_tokenizer):
    with pytest.raises(ConfigError, match="completions fill the model's whole context"):
        load_prompts(settings(texts("a"), max_completion_length=1024), chat_tokenizer)


@pytest.mark.parametrize("fault", ["fault[D16]"])
def test_fewer_rows_than_a_batch(chat_tokenizer, fault):
    found = load_prompts(settings(texts("abc"), batch_size=4), chat_tokenizer)
    assert found.report[-1] == "3 rows are fewer than one batch of 4: rows repeat within a batch"


@pytest.mark.parametrize("fault", ["fault[D17]"])
def test_copies_and_overlap_are_counted(chat_tokenizer, fault):
    options = settings(texts(["a\x1b", "b", "a\x1b", "a\x1b"]), eval_dataset=texts(["b", "z"]))
    train, test = check_data(options, chat_tokenizer)
    (line,) = [line for line in train.report if line.startswith("warning")]
    assert line.startswith("warning: 2 of 4 prompts are copies of another; 3 times '<|user|>a\\\\x1b")
    (line,) = [line for line in test.report if line.startswith("warning")]
    assert line.startswith(
        "warning: 1 of 2 evaluation prompts are training prompts too, for example '<|user|>b"
    )
    assert overlap(test, load_prompts(settings(texts("q")), chat_tokenizer)) == []


def test_training_and_evaluation_problems_are_told_together(chat_tokenizer):
    with pytest.raises(ErrorGroup) as caught:
        check_data(settings([{"prompt": ""}], eval_dataset=[{"z": 1}]), chat_tokenizer)
    assert [problem.code for problem in caught.value.problems] == ["E-DATA-ROW", "E-DATA-COLUMN"]


def test_evaluation_data_may_have_the_wanted_names_already(chat_tokenizer):
    options = settings([{"q": "x"}], eval_dataset=texts("ab"), columns={"prompt": "q"})
    train, test = check_data(options, chat_tokenizer)
    assert (len(train), len(test)) == (1, 2)


def test_no_evaluation_data(chat_tokenizer):
    assert check_data(settings(texts("ab")), chat_tokenizer)[1] is None
    with pytest.raises(DataError, match="no evaluation data"):
        load_prompts(settings(texts("ab")), chat_tokenizer, evaluation=True)


def test_alpaca_and_dialogues(chat_tokenizer):
    alpaca = load_prompts(settings([{"instruction": "Add", "input": "1, 2", "output": "3"}]), chat_tokenizer)
    assert alpaca.prompts.texts == ["<|user|>Add\n\n1, 2<|end|><|assistant|>"]
    turns = [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]
    chat = load_prompts(settings([{"conversations": turns}]), chat_tokenizer)
    assert chat.prompts.texts == ["<|user|>U<|end|><|assistant|>"]
    assert chat.prompts.messages == [[{"role": "user", "content": "U"}]]
    assert "prompt ← conversations, up to the last user turn" in chat.report


class Bracketed:
    """A tokenizer that puts begin and end around every text, as some do."""

    eos_token, eos_token_id, chat_template, model_max_length, name_or_path = (
        "</s>",
        2,
        None,
        10**30,
        "bracketed",
    )

    def __call__(self, texts, *, add_special_tokens, verbose):
        ids = [[ord(c) for c in text] for text in texts]
        return {"input_ids": [[1, *one, 2] for one in ids] if add_special_tokens else ids}


def test_plain_text_gets_what_begins_a_text_and_not_what_ends_it():
    assert load_prompts(settings(texts("ab")), Bracketed()).prompts.ids == [[1, 97], [1, 98]]
    templated = load_prompts(settings(texts("a"), chat_template="{{ messages[0].content }}"), Templated())
    assert templated.prompts.ids == [[97]]


class Templated(Bracketed):
    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]
