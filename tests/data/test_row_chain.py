"""Rows through transforms: the order, the account that is kept, and transforms that break their contract."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlx.core.data import load_prompts
from rlx.core.errors import DataError, PluginError
from rlx.core.settings import Settings
from rlx.plugins.contract import Transform

NEEDED = {"exact_match": ("answer",)}


def settings(dataset, **options):
    return Settings(**{"dataset": dataset, "batch_size": 2, "max_completion_length": 24, **options})


def texts(prompts):
    return [{"prompt": prompt, "answer": str(i)} for i, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class Options:
    fault: str = ""


class Shout(Transform):
    takes, gives = frozenset({"raw"}), frozenset({"prompt"})

    def __call__(self, rows, tokenizer):
        return [{**row, "prompt": row["raw"].upper()} for row in rows]


class Faulty(Transform):
    """One fault a value of the option."""

    gives = frozenset({"extra"})

    def __call__(self, rows, tokenizer):
        fault = self.config.fault
        if fault == "raises" and any(row["prompt"] == "b" for row in rows):
            raise KeyError("nothing for b")
        if fault == "together" and len(rows) > 1:
            raise RuntimeError("too many")
        if fault == "none":
            return None
        if fault == "generator":
            return (row for row in rows)
        if fault == "schema":
            return [row if i == 1 else {**row, "extra": 1} for i, row in enumerate(rows)]
        if fault == "text":
            return ["x"]
        if fault == "filter":
            return [{**row, "extra": 1} for row in rows if row["prompt"] != "b"]
        return [{"prompt": row["prompt"] + end, "extra": 1} for row in rows for end in "12"]


def run_faulty(tokenizer, fault, **options):
    return load_prompts(settings(texts("abc"), **options), tokenizer, [Faulty(Options(fault))])


def test_transforms_run_in_order_and_may_make_the_prompt(chat_tokenizer):
    found = load_prompts(settings([{"raw": "a"}, {"raw": "b"}]), chat_tokenizer, [Shout(Options())])
    assert [text[8] for text in found.prompts.texts] == ["A", "B"]
    assert found.prompts.rows == [0, 1]


def test_the_chain_is_checked_before_a_row_is_touched(chat_tokenizer):
    class Never(Shout):
        def __call__(self, rows, tokenizer):
            raise AssertionError("called")

    with pytest.raises(DataError) as caught:
        load_prompts(settings(texts("ab")), chat_tokenizer, [Never(Options())])
    assert caught.value.what.endswith("Never needs the column 'raw', which the list given does not have")
    with pytest.raises(DataError, match="reward exact_match needs the column 'answer'"):
        load_prompts(settings([{"raw": "a"}]), chat_tokenizer, [Never(Options())], columns_needed=NEEDED)


def test_the_source_is_left_as_it_was(chat_tokenizer):
    class Vandal(Transform):
        def __call__(self, rows, tokenizer):
            for row in rows:
                row["prompt"] = "x"
            return rows

    rows = texts("ab")
    before = copy.deepcopy(rows)
    found = load_prompts(settings(rows), chat_tokenizer, [Vandal(Options())])
    assert rows == before
    assert found.prompts.columns["prompt"] == ["x", "x"]


PLUGIN_FAULTS = {
    "fault[D12]-raises": ("raises", "failed", "row 1", "KeyError: 'nothing for b'"),
    "fault[D12]-together": (
        "together",
        "failed",
        "all 3 rows together, none of them alone",
        "RuntimeError: too many",
    ),
    "fault[D12]-none": ("none", "gave no list of rows", "", "NoneType"),
    "fault[D12]-generator": ("generator", "gave no list of rows", "", "generator"),
    "fault[D12]-schema": (
        "schema",
        "gave a row of the wrong shape",
        "row 1 of what it gave",
        "a dict of prompt",
    ),
    "fault[D12]-text": ("text", "gave a row of the wrong shape", "row 0 of what it gave", "str"),
}


@pytest.mark.parametrize("fault", PLUGIN_FAULTS)
def test_a_faulty_transform_is_named(chat_tokenizer, fault):
    option, what, where, got = PLUGIN_FAULTS[fault]
    with pytest.raises(PluginError, match=what) as caught:
        run_faulty(chat_tokenizer, option)
    assert "Faulty" in caught.value.what
    assert re.search(rf"{what} \(\S+{re.escape(Path(__file__).name)}:\d+\)$", caught.value.what)
    assert caught.value.exit_code == 4
    assert caught.value.where == where
    assert caught.value.got.startswith(got)


def test_rows_that_a_transform_fails_on_are_dropped_only_by_policy(chat_tokenizer):
    class Picky(Faulty):
        def __call__(self, rows, tokenizer):
            super().__call__(rows, tokenizer)
            return [{**row, "extra": 1} for row in rows]

    options = settings(texts("abc"), on_bad_row="drop", max_bad_rows=0.4)
    found = load_prompts(options, chat_tokenizer, [Picky(Options("raises"))])
    assert found.prompts.rows == [0, 2]
    assert "raises KeyError" in found.report[1]
    with pytest.raises(DataError, match="1 of 3 rows"):
        load_prompts(settings(texts("abc"), on_bad_row="drop"), chat_tokenizer, [Picky(Options("raises"))])


def test_a_transform_says_by_the_public_name_that_a_row_cannot_be_used(chat_tokenizer):
    import rlx

    class Careful(Transform):
        def __call__(self, rows, tokenizer):
            if any(row["prompt"] == "b" for row in rows):
                raise rlx.BadRow("it is a b")
            return rows

    with pytest.raises(DataError, match="it is a b") as caught:
        load_prompts(settings(texts("abc")), chat_tokenizer, [Careful(Options())])
    assert caught.value.exit_code == 3  # the data's fault; any other exception would be the plugin's, 4
    options = settings(texts("abc"), on_bad_row="drop", max_bad_rows=0.4)
    found = load_prompts(options, chat_tokenizer, [Careful(Options())])
    assert found.prompts.rows == [0, 2] and "it is a b" in "".join(found.report)


def test_a_second_try_starts_from_unspoilt_rows(chat_tokenizer):
    class Spoiler(Transform):
        def __call__(self, rows, tokenizer):
            for row in rows:
                if row["prompt"] == "b":
                    raise ValueError("no b")
                row["prompt"] += "!"
            return rows

    options = settings(texts("ab"), on_bad_row="drop", max_bad_rows=0.5)
    assert load_prompts(options, chat_tokenizer, [Spoiler(Options())]).prompts.columns["prompt"] == ["a!"]


def test_rows_that_a_transform_leaves_out_or_adds_are_reported(chat_tokenizer):
    kept = run_faulty(chat_tokenizer, "filter")
    assert kept.prompts.rows == [0, 2]
    assert any(line.startswith("left out 1 of 3 rows: by transform") for line in kept.report)
    more = run_faulty(chat_tokenizer, "")
    assert len(more) == 6
    assert any(line.endswith("3 rows became 6") for line in more.report)
