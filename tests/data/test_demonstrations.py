"""Demonstrations: which tokens are learned, chat templates of every kind, packing."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from rlx.core.data import check_data
from rlx.core.errors import ConfigError, DataError
from rlx.core.settings import Settings
from rlx.plugins.datasets import tiny_path
from rlx.plugins.transforms.answers import RenderAnswers, RenderDialogue
from rlx.plugins.transforms.chat import CHATML, BadRow, ChatTemplate

USER, YES, NO = (
    {"role": role, "content": content}
    for role, content in [("user", "2 + 2?"), ("assistant", "It is 4."), ("assistant", "<b>No</b>")]
)
# The opening of a turn has a mark that finished turns lack.
REASONING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
assert REASONING != CHATML
# Only the last turn is rendered with a mark.
LAST_MARKED = """\
{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>' }}
{%- if loop.last and m.role == 'assistant' -%}{{ '(empty)' }}{%- endif -%}
{{ m.content ~ '<|end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""
TOOLS = """\
{%- for t in tools or [] -%}{{ '[' ~ t.function.name ~ ']' }}{%- endfor -%}
{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>' ~ (m.content or '') }}
{%- for call in m.tool_calls or [] -%}{{ '(' ~ call.function.name ~ ')' }}{%- endfor -%}{{ '<|end|>' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""


@pytest.fixture(scope="module")
def marks():
    """A tokenizer that knows the marks of ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def template(text):
    return ChatTemplate(ChatTemplate.Config(template=text))


def answered(tokenizer, prompt, answer, text=None, **columns):
    [row] = RenderAnswers(template(text), ["completion"])(
        [{"prompt": prompt, "completion": answer, **columns}], tokenizer
    )
    return row["_prompt"], row["_answers"][0]


def spans(tokenizer, messages, text=None, **columns):
    [row] = RenderDialogue(template(text), True)([{"messages": messages, **columns}], tokenizer)
    return [row["_whole"][start:end] for start, end in row["_spans"]]


def load(rows, tokenizer, **options):
    options = {"algo": "sft", "dataset": rows, "batch_size": 1, **options}
    return check_data(Settings(**options), tokenizer, eats="demonstrations")[0]


def learned(data, tokenizer, row=0):
    sequences = data.batch([row]).sequences
    return tokenizer.decode(sequences.ids[sequences.scored])


def test_an_answer_is_what_the_whole_has_more(marks):
    start = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    # The newline after the mark of the end is left out.
    assert answered(marks, [USER], [YES], CHATML) == (start, "It is 4.<|im_end|>")
    assert answered(marks, "2 + 2?", "It is 4.", CHATML) == (start, "It is 4.<|im_end|>")
    assert answered(marks, [USER], "It is 4.", CHATML) == (start, "It is 4.<|im_end|>")


def test_a_template_that_opens_turns_in_another_way(marks):
    start = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert answered(marks, [USER], [YES], REASONING) == (start, "It is 4.<|im_end|>")
    # The answer begins like the mark, and is still not cut within its own text.
    assert answered(marks, [USER], [NO], REASONING) == (start, "<b>No</b><|im_end|>")


def test_a_template_that_marks_the_last_turn(marks):
    start = "<|user|>2 + 2?<|end|>\n<|assistant|>"
    assert answered(marks, [USER], [YES], LAST_MARKED) == (start, "(empty)It is 4.<|end|>")
    assert spans(marks, [USER, YES, USER, YES], LAST_MARKED) == ["It is 4.<|end|>", "(empty)It is 4.<|end|>"]


def test_an_answer_that_goes_on_with_a_turn(marks):
    begun = {"role": "assistant", "content": "It is"}
    rest = {"role": "assistant", "content": " 4."}
    found = answered(marks, [USER, begun], [rest], CHATML)
    assert found == ("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nIt is", " 4.<|im_end|>")


def test_tools(marks):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    result = {"role": "tool", "content": "4"}
    assert answered(marks, [USER], [call, result, YES], TOOLS, tools=tools) == (
        "[add]<|user|>2 + 2?<|end|><|assistant|>",
        "(add)<|end|><|tool|>4<|end|><|assistant|>It is 4.<|end|>",
    )
    with pytest.raises(BadRow, match="chatml has no form for tool calls"):
        spans(marks, [USER, call, result, YES], CHATML)
    for form in (tools, json.dumps(tools)):  # as JSON text where a table has no nested types
        found = spans(marks, [USER, call, result, YES], TOOLS, tools=form)
        assert found == ["(add)<|end|>", "It is 4.<|end|>"]
    for form, reason in (
        ("[{", "text, and no JSON"),
        ({"name": "add"}, "no list of JSON schemas"),
        ("[1]", "no list of JSON schemas"),
    ):
        with pytest.raises(BadRow, match=f"tools is {reason}"):
            spans(marks, [USER, YES], TOOLS, tools=form)


def test_the_turns_of_the_assistant(marks):
    dialogue = [{"role": "system", "content": "Be brief."}, USER, YES, USER, NO, USER]
    assert spans(marks, dialogue, CHATML) == ["It is 4.<|im_end|>", "<b>No</b><|im_end|>"]
    assert spans(marks, dialogue, REASONING) == ["It is 4.<|im_end|>", "<b>No</b><|im_end|>"]
    with pytest.raises(BadRow, match="no assistant turn"):
        spans(marks, [USER], CHATML)
    with pytest.raises(BadRow, match="does not show it"):
        spans(marks, [USER, YES], "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}")


def test_what_is_learned(chat_tokenizer, plain_tokenizer):
    both = [{"prompt": "a b", "completion": " c"}]
    assert learned(load(both, plain_tokenizer), plain_tokenizer) == " c<|end|>"
    assert learned(load(both, chat_tokenizer), chat_tokenizer) == " c<|end|>"
    whole = load([{"text": "2 apples"}], chat_tokenizer)  # text with no template, whatever the tokenizer has
    assert learned(whole, chat_tokenizer) == " apples<|end|>"
    everything = load(both, chat_tokenizer, completion_only_loss=False)
    assert learned(everything, chat_tokenizer) == "a b<|end|><|assistant|> c<|end|>"
    dialogue = [{"messages": [USER, YES, USER, NO]}]
    assert learned(load(dialogue, chat_tokenizer), chat_tokenizer) == (
        "2 + 2?<|end|><|assistant|>It is 4.<|end|><|user|>2 + 2?<|end|><|assistant|><b>No</b><|end|>"
    )
    turns = load(dialogue, chat_tokenizer, assistant_only_loss=True)
    assert learned(turns, chat_tokenizer) == "It is 4.<|end|><b>No</b><|end|>"
    split = [{"prompt": [USER, YES, USER], "completion": [NO]}]
    assert learned(load(split, chat_tokenizer), chat_tokenizer) == "<b>No</b><|end|>"
    turns = load(split, chat_tokenizer, assistant_only_loss=True)
    assert learned(turns, chat_tokenizer) == "It is 4.<|end|><b>No</b><|end|>"


@pytest.mark.parametrize(
    ("row", "options", "what"),
    [
        ({"text": "a"}, {"assistant_only_loss": True}, "needs conversations"),
        ({"text": "a"}, {"completion_only_loss": True}, "needs demonstrations with a prompt"),
        (
            {"messages": [USER, YES]},
            {"completion_only_loss": True, "assistant_only_loss": True},
            "are both set",
        ),
        ({"text": "a"}, {"packing_strategy": "wrapped"}, "packing_strategy is set, and packing is off"),
    ],
)
def test_questions_that_the_rows_cannot_answer(chat_tokenizer, row, options, what):
    with pytest.raises(ConfigError, match=what):
        load([row], chat_tokenizer, **options)


def test_a_row_without_dialogue_is_told_by_the_name_of_its_column(chat_tokenizer):
    for column in ("messages", "conversation"):
        with pytest.raises(DataError, match="1 of 2 rows") as caught:
            load([{column: [USER, YES]}, {column: None}], chat_tokenizer)
        assert caught.value.got == f"{column} is NoneType, not a list of messages (1)"


def test_messages_without_a_template(plain_tokenizer):
    with pytest.raises(DataError, match="no chat template"):  # fault[D11]
        load([{"messages": [USER, YES]}], plain_tokenizer)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, {"role": "robot", "content": "x"}], "turn 1: role is robot"),
        ([YES], "turn 0: an assistant turn before any user turn"),
        ([USER, {"role": "assistant", "content": 3}], "turn 1: content is int, not text"),
        ([], "prompt is an empty list of messages"),
    ],
    ids=[f"fault[D10]-{i}" for i in range(4)],
)
def test_dialogues_that_cannot_be_used(chat_tokenizer, messages, reason):
    with pytest.raises(DataError) as caught:
        load([{"messages": messages}], chat_tokenizer)
    assert reason in caught.value.got and caught.value.where == "row 0"


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "drop"], ids=lambda mode: f"fault[D7]-{mode}")
def test_what_is_too_long(plain_tokenizer, mode):
    rows = [{"prompt": "1" * 6, "completion": "2" * 6}, {"prompt": "1" * 12, "completion": "2"}] * 2
    rows += [{"prompt": "1", "completion": "2"}]
    data = load(rows, plain_tokenizer, max_length=10, truncation_mode=mode)
    sequences = data.batch(range(len(data))).sequences
    found = [plain_tokenizer.decode(ids) for ids in sequences.ids.split(sequences.lengths.tolist())]
    cut = {
        "keep_start": ["1" * 6 + "2" * 4] * 2,  # of the other row nothing is left to learn
        "keep_end": ["1" * 3 + "2" * 6 + "<|end|>", "1" * 8 + "2<|end|>"] * 2,
        "drop": [],
    }[mode]
    assert found == [*cut, "12<|end|>"]
    assert ("left out 2 of 5 rows: nothing to learn within max_length 10" in data.report) == (
        mode == "keep_start"
    )


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_documents_stay_sequences_of_their_own(plain_tokenizer, strategy):
    rows = [{"prompt": "1" * (1 + i % 4), "completion": "2" * (1 + i % 5)} for i in range(12)]
    rows.append({"prompt": "3" * 5, "completion": "4" * 20})
    loose = load(rows, plain_tokenizer, max_length=12 if strategy == "bfd" else 100)
    packed = load(rows, plain_tokenizer, packing=True, packing_strategy=strategy, max_length=12)
    assert len(packed) < len(loose) == 13 and any(
        line.startswith("packed 13") and line.endswith(f", by {strategy}") for line in packed.report
    )
    batches = [packed.batch([row]).sequences for row in range(len(packed))]
    assert all(len(s.ids) <= 12 for s in batches) and max(len(s) for s in batches) > 1
    assert torch.equal(
        torch.cat([s.ids for s in batches]).sort().values,
        loose.batch(range(13)).sequences.ids.sort().values,
    )
    cuts = sum(len(s) for s in batches) - 13  # only the first token after a cut is not learned
    lost = loose.batch(range(13)).sequences.scored.sum() - sum(s.scored.sum() for s in batches)
    assert 0 <= lost <= cuts and (strategy == "bfd") == (cuts == 0)
    both = packed.batch([1, 0], [1])
    assert torch.equal(both.sequences.ids, batches[0].ids)
