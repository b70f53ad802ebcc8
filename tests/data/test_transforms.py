"""Columns, conversations and chat templates."""

import itertools

import pytest

from rlx.core.errors import ConfigError, DataError
from rlx.plugins.transforms import BadRow
from rlx.plugins.transforms.chat import CHATML, MAX_CHARACTERS, ChatTemplate, ConversationPrompt
from rlx.plugins.transforms.columns import (
    TEXT_COLUMNS,
    ColumnMap,
    DropDuplicates,
    Format,
    InstructionPrompt,
    detect,
)

USER, ANSWER = {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def render(prompt, tokenizer, **options):
    (row,) = ChatTemplate(ChatTemplate.Config(**options))([{"prompt": prompt, "n": 1}], tokenizer)
    assert row["n"] == 1
    return row["_text"], row["_messages"]


@pytest.mark.parametrize(
    ("row", "name", "columns"),
    [
        ({"prompt": "x", "question": "y"}, "prompt", {"prompt": "prompt"}),
        ({"answer": "4", "question": "x"}, "prompt", {"prompt": "question"}),
        ({"problem": "x", "level": 3}, "prompt", {"prompt": "problem"}),
        ({"instruction": "x", "input": "", "output": "y"}, "instruction", None),
        ({"instruction": "x", "output": "y"}, "prompt", {"prompt": "instruction"}),
        ({"input": "x", "output": "y"}, "prompt", {"prompt": "input"}),
        ({"conversations": []}, "conversation", {"messages": "conversations"}),
        ({"messages": [], "query": "x"}, "prompt", {"prompt": "query"}),
        ({"query": 17, "messages": []}, "conversation", {"messages": "messages"}),
        ({"prompt": None}, "prompt", {"prompt": "prompt"}),
    ],
)
def test_the_format_is_found_by_the_columns(row, name, columns):
    found = detect(row, [row])
    assert found.name == name
    assert columns is None or found == Format(name, columns)


def test_the_format_does_not_depend_on_the_order_of_columns():
    columns = [*TEXT_COLUMNS[1:5], "messages"]
    assert {repr(detect(order, [])) for order in itertools.permutations(columns)} == {
        repr(Format("prompt", {"prompt": "question"}))
    }


def test_columns_of_other_things_are_no_prompt():
    assert detect(["id", "text", "label"], [{"id": 1, "text": "x", "label": 0}]) is None
    assert detect(["question"], [{"question": 3}, {"question": {"text": "x"}}]) is None


def test_column_map_copies_and_says_what_it_takes():
    transform = ColumnMap(ColumnMap.Config(columns={"prompt": "q", "answer": "a"}))
    assert (transform.takes, transform.gives) == ({"q", "a"}, {"prompt", "answer"})
    assert transform([{"q": 1}]) == [{"q": 1, "prompt": 1, "answer": None}]


def test_instruction_and_input_are_joined():
    transform = InstructionPrompt(InstructionPrompt.Config())
    rows = [
        {"instruction": "a", "input": "b"},
        {"instruction": "a", "input": ""},
        {"instruction": "a", "input": None},
    ]
    assert [row["prompt"] for row in transform(rows)] == ["a\n\nb", "a", "a"]
    with pytest.raises(BadRow, match="instruction is int"):
        transform([{"instruction": 3, "input": ""}])


def test_duplicates_keep_the_first():
    rows = [
        {"prompt": "a", "n": 0},
        {"prompt": "b", "n": 1},
        {"prompt": "a", "n": 2},
        {"prompt": [USER], "n": 3},
    ]
    kept = DropDuplicates(DropDuplicates.Config())([*rows, {"prompt": [dict(USER)], "n": 4}])
    assert [row["n"] for row in kept] == [0, 1, 3]


def test_duplicates_by_other_columns():
    """Two answers to one prompt are no copies; neither are dialogues that have no prompt at all."""
    pairs = [{"prompt": "a", "chosen": c, "rejected": "x"} for c in "bcb"]
    transform = DropDuplicates(DropDuplicates.Config(columns=["prompt", "chosen"]))
    assert transform.takes == {"prompt", "chosen"}
    assert [row["chosen"] for row in transform(pairs)] == ["b", "c"]
    dialogues = [{"messages": [{**USER, "content": text}]} for text in "aab"]
    assert len(DropDuplicates(DropDuplicates.Config(columns=["messages"]))(dialogues)) == 2


def test_dialogues_end_with_the_last_user_turn():
    transform = ConversationPrompt(ConversationPrompt.Config())
    sharegpt = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "U"},
        {"from": "gpt", "value": "A"},
    ]
    rows = transform([{"messages": [USER, ANSWER, USER, ANSWER]}, {"messages": sharegpt}])
    assert [row["prompt"] for row in rows] == [[USER, ANSWER, USER], [SYSTEM, USER]]
    other = {"role": "system", "content": "other"}
    for system, wanted in (("S", [SYSTEM, USER]), (" ", [USER]), (None, [USER])):
        assert transform([{"messages": [USER, ANSWER], "system": system}])[0]["prompt"] == wanted
    assert transform([{"messages": [other, USER], "system": "S"}])[0]["prompt"] == [other, USER]
    with pytest.raises(BadRow, match="messages is str"):
        transform([{"messages": "U"}])


def test_text_becomes_one_user_message(chat_tokenizer):
    assert render("U", chat_tokenizer) == ("<|user|>U<|end|><|assistant|>", None)
    with_system = "<|system|>S<|end|><|user|>U<|end|><|assistant|>"
    assert render("U", chat_tokenizer, system_prompt="S") == (with_system, None)
    assert render([USER], chat_tokenizer, system_prompt="S") == (with_system, [SYSTEM, USER])
    assert render([SYSTEM, USER], chat_tokenizer, system_prompt="other") == (with_system, [SYSTEM, USER])


def test_a_last_assistant_turn_is_continued(chat_tokenizer):
    assert render([USER, ANSWER], chat_tokenizer)[0] == "<|user|>U<|end|><|assistant|>A"


def test_plain_text_without_a_template_or_on_request(chat_tokenizer, plain_tokenizer):
    assert render("U", plain_tokenizer) == ("U", None)
    assert render("U", chat_tokenizer, template="none") == ("U", None)


def test_other_templates(chat_tokenizer, plain_tokenizer, tmp_path):
    chatml = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert render("U", plain_tokenizer, template="chatml")[0] == chatml
    path = tmp_path / "t.jinja"
    path.write_text(CHATML)
    assert render("U", plain_tokenizer, template=str(path))[0] == chatml
    assert render("U", chat_tokenizer, template="{{ messages[0].content }}!")[0] == "U!"
    with pytest.raises(ConfigError, match="neither a template nor a file"):
        ChatTemplate(ChatTemplate.Config(template="chatlm"))


@pytest.mark.parametrize("fault", ["fault[D11]"])
def test_messages_need_a_template(plain_tokenizer, fault):
    with pytest.raises(DataError) as caught:
        render([USER], plain_tokenizer)
    assert not isinstance(caught.value, BadRow)  # every row has it, so no policy helps
    assert "tiny" in caught.value.what and "--chat-template chatml" in caught.value.hint
    with pytest.raises(ConfigError, match="system_prompt needs a chat template"):
        render("U", plain_tokenizer, system_prompt="S")


BAD = {
    "fault[D2]-none": (None, "prompt is NoneType, not text"),
    "fault[D2]-int": (3, "prompt is int, not text"),
    "fault[D3]-empty": ("", "prompt is empty"),
    "fault[D3]-blank": (" \n\t\u3000", "prompt is empty"),
    "fault[D9]-surrogate": ("a\ud83d", "cannot be encoded"),
    "fault[D9]-nul": ("a\x00b", "cannot be encoded"),
    "fault[D9]-in-a-turn": ([{"role": "user", "content": "\udc00"}], "cannot be encoded"),
    "fault[D9]-huge": ("x" * MAX_CHARACTERS, "longer than 4,194,304 characters"),
    "fault[D10]-none": ([], "empty list"),
    "fault[D10]-text": (["U"], "turn 0: role is None"),
    "fault[D10]-role": ([USER, {"role": "robot", "content": "x"}], "turn 1: role is robot; known are system"),
    "fault[D10]-content": ([{"role": "user", "content": 3}], "turn 0: content is int, not text"),
    "fault[D10]-calling user": (
        [{"role": "user", "content": None, "tool_calls": [{"function": {"name": "add"}}]}],
        "turn 0: content is NoneType, not text",
    ),
    "fault[D10]-system": ([USER, SYSTEM], "turn 1: a system message is not the first"),
    "fault[D10]-first": ([ANSWER, USER], "turn 0: an assistant turn before any user turn"),
    "fault[D10]-twice": ([USER, USER], "turn 1: two user turns in a row"),
    "fault[D10]-nobody": ([SYSTEM], "no user turn with text"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_prompt_that_cannot_be_used(chat_tokenizer, fault):
    prompt, message = BAD[fault]
    with pytest.raises(BadRow, match=message):
        render(prompt, chat_tokenizer)


def test_a_template_that_refuses_names_its_reason(chat_tokenizer):
    template = "{{ raise_exception('only French') }}"
    with pytest.raises(BadRow, match="refuses it: only French"):
        render("U", chat_tokenizer, template=template)
    with pytest.raises(BadRow, match=r"refuses it: .*nobody"):
        render("U", chat_tokenizer, template="{{ nobody.there.at_all }}")
    with pytest.raises(BadRow, match="refuses it"):
        render("U", chat_tokenizer, template="{% if %}")


def test_a_template_cannot_reach_the_machine(chat_tokenizer):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BadRow, match=r"refuses it: .*unsafe"):
        render("U", chat_tokenizer, template=template)


@pytest.mark.parametrize("fault", ["fault[S20]"])
def test_a_template_without_end_is_refused(fault):
    import subprocess
    import sys

    # In a process of its own, with less memory than the template asks for.
    code = """
import resource
from transformers import AutoTokenizer
from rlx.core.errors import DataError
from rlx.plugins.datasets import tiny_path
from rlx.plugins.transforms.chat import ChatTemplate
tokenizer = AutoTokenizer.from_pretrained(tiny_path())
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for template in ("{{ 'a' * 10**9 }}", "{{ messages[0].content * 10**9 }}"):
    try:
        ChatTemplate(ChatTemplate.Config(template=template))([{"prompt": "x"}], tokenizer)
    except DataError as error:
        print(error.what)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["the chat template asks for more memory than there is"] * 2, (
        done.stderr
    )
