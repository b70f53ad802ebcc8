"""A run's completions scored anew: old and new score, columns that are needed, files that are damaged."""

from __future__ import annotations

import json

import pytest

from rlx.core.commands.main import main
from rlx.core.components import check_spec, read_specs
from rlx.core.errors import ConfigError, DataError
from rlx.core.rescore import rescore

LINE = {
    "step": 1, "prompt": "2 + 2?", "completion": "Answer: 4", "score": 1.5, "rewards": {"exact_match": 1.0},
    "finished": True, "row": 7, "data": {"answer": "4"}, "completion_ids": [1, 2, 3],
}  # fmt: skip
HOSTILE = "\x1b[2J\u202e[bold]\nERROR forged Answer: 4"


@pytest.fixture
def folder(tmp_path):
    """A function that writes lines as completions.jsonl and gives the folder."""

    def write(*changes, tail=""):
        text = "".join(json.dumps({**LINE, **change}) + "\n" for change in changes)
        (tmp_path / "completions.jsonl").write_text(text + tail)
        return tmp_path

    return write


def component(name, **options):
    [spec], problems = read_specs("reward", {"name": name, **options}, "reward", {})
    assert problems == []
    return check_spec(spec)


def test_old_and_new_scores_stand_side_by_side(folder):
    path = folder({}, {"completion": "Answer: 5", "eval": True}, {"data": {"answer": None}, "rewards": {}})
    rows = rescore(component("exact_match"), path, {})
    assert [(row.old, row.new, row.changed, row.held_out) for row in rows] == [
        (1.0, 1.0, False, False),
        (1.0, 0.0, True, True),
        (1.5, None, True, False),  # the run had no reward of this name: the weighted sum
    ]


def test_another_reward_sees_ids_messages_and_columns_of_the_run(folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def seen(prompts, completion_ids, level):\n"
        "    assert prompts == [[{'role': 'user', 'content': 'hi'}], '2 + 2?']\n"
        "    return [len(ids) + int(n) for ids, n in zip(completion_ids, level)]\n"
    )
    path = folder({"messages": [{"role": "user", "content": "hi"}], "completion_ids": [1]}, {})
    rows = rescore(component(f"{tmp_path}/mine.py:seen"), path, {"level": "10"})
    assert [row.new for row in rows] == [11.0, 13.0]


def test_a_column_that_the_run_did_not_keep_is_asked_for(folder):
    path = folder({}, {"data": {}})
    with pytest.raises(DataError) as caught:
        rescore(component("exact_match"), path, {})
    assert "no column 'answer'" in caught.value.what and "--columns answer=" in caught.value.hint
    assert [row.new for row in rescore(component("exact_match"), path, {"answer": "4"})] == [1.0, 1.0]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "null", "[" * 100_000, *({**LINE, name: value} for name, value in {
        "completion": 1, "step": "1", "score": "1.0", "rewards": {"a": "b"}, "data": None,
        "completion_ids": None,
    }.items())],
    ids=lambda line: str(line)[:20],
)  # fmt: skip
def test_lines_that_no_run_wrote_are_told(folder, line):
    path = folder({}, tail=(line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(DataError) as caught:
        rescore(component("exact_match"), path, {})
    assert "completions.jsonl:2" in caught.value.where


def test_a_line_that_is_still_being_written_is_left_alone(folder):
    path = folder({}, tail='{"step": 2, "pro')
    assert len(rescore(component("exact_match"), path, {})) == 1
    assert (path / "completions.jsonl").read_text().endswith('{"step": 2, "pro')


def test_a_folder_without_completions_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no completions to score"):
        rescore(component("exact_match"), tmp_path, {})


def test_the_command_shows_hostile_text_harmless_and_sums_up(folder, capsys):
    path = folder(
        {}, {"completion": HOSTILE, "eval": True}, {"completion": "Answer: 5"}, {"data": {"answer": ""}}
    )
    assert main(["reward", "try", "exact_match", "--from", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1:4] == [
        "     1          1          1   Answer: 4",
        "     1          1          1   eval: \\x1b[2J\\u202e[bold]\\nERROR forged Answer: 4",
        "     1          1          0 * Answer: 5",
    ]
    assert out.splitlines()[-1] == "4 completions: old mean 1, new mean 0.666667, 1 without; 2 differ (*)"


@pytest.mark.parametrize(
    "words", [(), ("--prompt", "a"), ("--from", ".", "--prompt", "a"), ("--from", ".", "--completion", "a")]
)
def test_either_a_run_or_a_text_is_scored(words, capsys):
    assert main(["reward", "try", "exact_match", *words]) == 2
    assert "--from RUN_DIR alone" in capsys.readouterr().err
