"""Prompt extraction, unpairing, conversion and selection of rows."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.errors import ConfigError, DataError
from rlx.core.rows import read_rows
from rlx.plugins.transforms import PLAIN, BadRow
from rlx.plugins.transforms.chat import ShareGPTMessages, SplitConversation, shared_start
from rlx.plugins.transforms.columns import AlpacaMessages
from rlx.plugins.transforms.formats import find_way
from rlx.plugins.transforms.preference import ExtractPrompt, Unpair
from rlx.plugins.transforms.selection import Filter, Truncate

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_rlhf_harmless_test.jsonl.gz"
PAIR, ONE = ("chosen", "rejected"), ("completion",)
TEXT = st.text("ab \n", max_size=12)
TURNS = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant"]),
        st.sampled_from("ab"),
    ),
    max_size=4,
)


def extracted(chosen, rejected, **options):
    [row] = ExtractPrompt(ExtractPrompt.Config(**options))([{"chosen": chosen, "rejected": rejected}])
    return row


@given(TEXT, TEXT, TEXT, st.sampled_from(["", "\n\nAssistant:", "ab"]))
def test_no_text_is_lost_or_shifted(start, one, other, marker):
    chosen, rejected = start + one, start + other
    row = extracted(chosen, rejected, marker=marker)
    assert row["prompt"] + row["chosen"] == chosen
    assert row["prompt"] + row["rejected"] == rejected
    assert row[PLAIN]


@given(TURNS, TURNS, TURNS)
def test_no_turn_is_lost_or_shifted(start, one, other):
    row = extracted(start + one, start + other)
    assert row["prompt"] + row["chosen"] == start + one
    assert row["prompt"] + row["rejected"] == start + other


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("I can", "I cannot", "I"),  # the word stays whole
        ("say yes", "say no", "say"),  # the space goes with the word
        ("a  b", "a  c", "a"),  # white space stays in one piece
        ("a b", "a b", "a b"),  # everything shared
        ("yes", "no", ""),  # nothing shared
        ("", "", ""),
        ("", "x", ""),
        ("a b", "a b c", "a b"),  # one is the beginning of the other
        ("Q\n\nAssistant: I am", "Q\n\nAssistant: I may", "Q\n\nAssistant:"),
        ("\n\nAssistant: x\n\nHuman: y\n\nAssistant: 1", "\n\nAssistant: x\n\nHuman: z", "\n\nAssistant:"),
    ],
)
def test_where_text_is_cut(chosen, rejected, prompt):
    assert extracted(chosen, rejected)["prompt"] == prompt


def test_where_messages_are_cut():
    user, yes, no = (
        {"role": r, "content": c} for r, c in [("user", "q"), ("assistant", "y"), ("assistant", "n")]
    )
    assert extracted([user, yes], [user, no])["prompt"] == [user]
    assert extracted([user, yes], [user, yes]) == {"prompt": [user], "chosen": [yes], "rejected": [yes]}
    longer = extracted([user, yes, user, no], [user, yes])
    assert (longer["prompt"], longer["rejected"]) == ([user], [yes])
    sharegpt = extracted(
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "y"}],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "n"}],
    )
    assert sharegpt == {"prompt": [user], "chosen": [yes], "rejected": [no]}
    with pytest.raises(BadRow):  # fault[D2]
        extracted([user], None)


@pytest.mark.skipif(not HH.exists(), reason="the shared data is not here")
def test_real_dialogues():
    with gzip.open(HH, "rt") as file:
        rows = [json.loads(line) for line in file]
    whole = 0
    for row in rows:
        found = extracted(row["chosen"], row["rejected"])
        assert found["prompt"].endswith("\n\nAssistant:")
        assert found["prompt"] + found["chosen"] == row["chosen"]
        assert found["prompt"] + found["rejected"] == row["rejected"]
        whole += "\n\nHuman:" not in found["chosen"] + found["rejected"]
    assert len(rows) == 2312
    assert whole > 0.99 * len(rows)  # only the last answers are left


def test_unpair():
    rows = Unpair(Unpair.Config())([{"prompt": "p", "chosen": "c", "rejected": "r"}])
    assert rows == [
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": "p", "completion": "r", "label": False},
    ]


def test_conversations():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [row] = ShareGPTMessages(ShareGPTMessages.Config())([{"conversations": turns}])
    assert row["messages"] == messages
    [row] = SplitConversation(SplitConversation.Config())([row])
    assert (row["prompt"], row["completion"]) == (messages[:1], messages[1:])
    system = {"role": "system", "content": "S"}
    [row] = ShareGPTMessages(ShareGPTMessages.Config())([{"conversations": turns, "system": "S"}])
    assert row["messages"] == [system, *messages]
    [row] = SplitConversation(SplitConversation.Config())([row])  # once, though the column is still there
    assert (row["prompt"], row["completion"]) == ([system, *messages[:1]], messages[1:])
    pair = {"chosen": messages, "rejected": [messages[0], {**messages[1], "content": "b"}], "system": "S"}
    [row] = ExtractPrompt(ExtractPrompt.Config())([pair])
    assert row["prompt"] == [system, messages[0]] and row["chosen"] == messages[1:]
    way = find_way(["conversations", "system"], [{"conversations": turns, "system": "S"}], "prompts")
    assert any("← system" in note for note in way.notes)
    [row] = AlpacaMessages(AlpacaMessages.Config())([{"instruction": "q", "input": "", "output": "a"}])
    assert row["messages"] == messages and "prompt" not in row
    alpaca = {"instruction": "q", "input": "", "output": "a", "system": "S"}
    assert AlpacaMessages(AlpacaMessages.Config())([alpaca])[0]["messages"] == [system, *messages]


@pytest.mark.parametrize(
    ("columns", "eats", "transforms", "answers"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs", [], PAIR),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "pairs", ["ColumnMap"], PAIR),
        ({"chosen": "b", "rejected": "c"}, "pairs", ["ExtractPrompt"], PAIR),
        ({"prompt": "a", "chosen": "ab", "rejected": "ac"}, "pairs", ["ExtractPrompt"], PAIR),
        (
            {"prompt": "a", "chosen": [{"role": "user"}], "rejected": [{"role": "user"}]},
            "pairs", ["ExtractPrompt"], PAIR,
        ),
        ({"prompt": "a", "completion": "b", "label": True}, "labeled", [], ONE),
        ({"messages": [], "label": True}, "labeled",
         ["ShareGPTMessages", "SplitConversation"], ONE),
        ({"chosen": "b", "rejected": "c"}, "labeled", ["ExtractPrompt", "Unpair"], ONE),
        ({"prompt": "a", "completion": "b", "text": "c"}, "demonstrations", [], ONE),
        ({"instruction": "a", "input": "", "output": "b", "text": "c"}, "demonstrations",
         ["InstructionPrompt", "ColumnMap"], ONE),
        ({"prompt": "a", "messages": []}, "demonstrations", ["ShareGPTMessages"], ()),
        ({"conversations": []}, "demonstrations", ["ShareGPTMessages"], ()),
        ({"text": "a"}, "demonstrations", [], ()),
    ],
)  # fmt: skip
def test_formats(columns, eats, transforms, answers):
    for names in (list(columns), list(columns)[::-1]):
        way = find_way(names, [columns], eats)
        assert [type(transform).__name__ for transform in way.transforms] == transforms
        assert way.answers == answers


@pytest.mark.parametrize("eats", ["prompts", "pairs", "labeled", "demonstrations"])
def test_no_way(eats):
    assert find_way(["number"], [{"number": 1}], eats) is None


@given(st.lists(TEXT, min_size=1))
def test_shared_start(texts):
    start = shared_start(*texts)
    assert all(text.startswith(start) for text in texts)
    longer = {text[: len(start) + 1] for text in texts}
    assert len(longer) > 1 or start in texts


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"min_characters": 2}, [1, 2]), ({"max_characters": 2}, [0, 1]), ({"matches": "^b"}, [1]),
        ({"lacks": "b"}, [0, 2]), ({"equals": ["a", "ccc"]}, [0, 2]),
        ({"column": "n", "at_least": 1, "at_most": 1.5}, [1]), ({}, [0, 1, 2]),
    ],
)  # fmt: skip
def test_filter(options, kept):
    rows = [{"prompt": "a", "n": 0}, {"prompt": "bb", "n": 1}, {"prompt": "ccc", "n": 2.5}]
    assert Filter(Filter.Config(**options))(rows) == [rows[i] for i in kept]


def test_filter_refuses_what_it_cannot_judge():
    with pytest.raises(ConfigError, match="no regular expression"):
        Filter(Filter.Config(matches="("))
    with pytest.raises(BadRow, match="no number"):
        Filter(Filter.Config(at_least=1))([{"prompt": "x"}])
    with pytest.raises(BadRow):
        Filter(Filter.Config())([{"prompt": None}])


@pytest.mark.parametrize(
    ("side", "left"), [("right", ["1234", "9"]), ("left", ["6789", "9"]), ("drop", ["9"])]
)
def test_truncate(side, left, chat_tokenizer):
    rows = [{"prompt": "123456789"}, {"prompt": "9"}]
    out = Truncate(Truncate.Config(max_tokens=4, side=side))(rows, chat_tokenizer)
    assert [row["prompt"] for row in out] == left  # the packaged tokenizer has a token a digit


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("most", range(1, 12))
def test_no_character_is_cut_in_two(side, most, chat_tokenizer):
    text = "ab é世😀 cd"  # of the last ones before the space each byte is a token
    [row] = Truncate(Truncate.Config(max_tokens=most, side=side))([{"prompt": text}], chat_tokenizer)
    assert text.startswith(row["prompt"]) if side == "right" else text.endswith(row["prompt"])
    assert len(chat_tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) <= most


def test_mixtures_of_data_sets(tmp_path):
    for name, size in (("a", 10), ("b", 4)):
        rows = "\n".join(json.dumps({"prompt": f"{name}{i}"}) for i in range(size))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    parts = [
        {"name": str(tmp_path / "a.jsonl"), "fraction": 0.3},
        {"name": str(tmp_path / "b.jsonl"), "fraction": 1},
    ]
    table = read_rows(parts)
    # Of a at 1/6, 3/6 and 5/6 of the whole, of b at 1/8, 3/8, 5/8 and 7/8.
    assert [row["prompt"] for row in table.rows] == ["b0", "a0", "b1", "a3", "b2", "a6", "b3"]
    assert table.place(3).endswith("a.jsonl, a.jsonl:4")
    assert [row["prompt"] for row in read_rows(parts, limit=4).rows] == ["b0", "a0", "b1", "a3"]
    with pytest.raises(DataError, match="others do not") as caught:
        read_rows([parts[0], {"name": "wordmath"}])
    assert caught.value.where == "the one at place 1" and "wordmath" in caught.value.got
    with pytest.raises(DataError, match="no share"):
        read_rows([{**parts[0], "fraction": 2}])
