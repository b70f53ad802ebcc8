"""rlx compare: the better side wins, equals do not, files and models mix, and errors say what to do."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

from rlx.core import contest
from rlx.core.answers import Answers
from rlx.core.batch import Prompts
from rlx.core.commands.main import main
from rlx.core.contest import find_side
from rlx.plugins.datasets import tiny_path
from rlx.plugins.datasets.wordmath import WordMath


@pytest.fixture(scope="module")
def problems():
    return WordMath().rows("test")[:60]


def rows(problems, answer):
    """Completions to the problems as a file has them."""
    return [{"prompt": row["prompt"], "completion": f"Answer: {answer(row)}"} for row in problems]


def right(row):
    return row["answer"]


def wrong(row):
    return str(int(row["answer"]) + 1000)


@pytest.fixture
def write(tmp_path):
    def put(name, lines):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return put


@pytest.fixture
def call(capsys):
    """What a command line prints; and its exit code."""

    def run(*words):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            capsys.readouterr()
            code = main(["compare", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def numbers(call, *words):
    code, out, err = call(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_packaged_model_beats_one_that_is_always_wrong_and_loses_to_one_that_is_right(
    call, write, problems, tmp_path
):
    bad = write("bad.jsonl", rows(problems, wrong))
    verdicts = tmp_path / "verdicts.jsonl"
    found = numbers(
        call, "tiny", bad, "--reward", "exact_match", "--max-completion-length", 24, "--output", verdicts
    )
    assert found["win_rate"] == 1.0 and found["low"] > 0.8 and found["losses"] == 0
    assert found["pairs"] == 60 and found["wins"] + found["no_verdict"] == 60 and found["wins"] > 12
    lines = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(60))
    assert {line["b"] for line in lines} == {row["completion"] for row in rows(problems, wrong)}
    for line, problem in zip(lines, problems, strict=True):
        assert problem["prompt"] in line["prompt"]
        solved = line["a"].endswith(f"Answer: {problem['answer']}")
        assert line["better"] == ("a" if solved else None)

    good = write("good.jsonl", rows(problems[5:40], right))  # of the others there is no completion
    found = numbers(call, good, "tiny", "--reward", "exact_match", "--max-completion-length", 24)
    assert found["win_rate"] == 1.0 and found["pairs"] == 35
    assert found["b"]["finished"] > 0.9 and found["a"]["finished"] is None


def test_of_several_prompts_of_a_row_each_answer_meets_the_one_to_the_same_prompt():
    """As transforms make them. Where one side lacks a prompt of a row, nobody knows which."""

    def answers(rows, texts):
        prompts = Prompts([[1]] * len(rows), [f"p{i}" for i in rows], [None] * len(rows), {}, rows)
        return Answers(prompts, texts, [[1]] * len(rows))

    one = answers([0, 0, 1, 2, 2], ["a0", "b0", "a1", "a2", "b2"])
    other = answers([2, 1, 0, 0], ["A2", "A1", "A0", "B0"])
    mine, theirs = contest._matched(one, other, 10)
    assert list(zip(mine.texts, theirs.texts, strict=True)) == [("a0", "A0"), ("b0", "B0"), ("a1", "A1")]
    assert [len(found.texts) for found in contest._matched(one, other, 2)] == [2, 2]


def test_equals_do_not_win(call):
    # Both are the packaged model, sampled on streams of their own.
    words = ("tiny", "tiny", "--reward", "exact_match", "--max-completion-length", 24)
    found = numbers(call, *words)
    assert found["low"] < 0.5 < found["high"] and found["wins"] + found["losses"] > 20
    assert found["pairs"] == 128
    assert numbers(call, *words) == found
    assert numbers(call, *words, "--seed", 1) != found


def test_a_judge_that_likes_the_first_place_decides_nothing(call, write, problems):
    many = [{"prompt": f"{i}", "completion": "a"} for i in range(128)]
    one, other = write("1.jsonl", many), write("2.jsonl", [{**row, "completion": "b"} for row in many])
    found = numbers(call, one, other, "--judge", "random", "--option", "first=1")
    assert found["low"] < 0.5 < found["high"] and found["wins"] + found["losses"] == 128


def test_two_files_are_matched_by_prompt_and_bring_their_own_columns(call, write, problems):
    one = [
        {**row, "answer": problem["answer"]}
        for row, problem in zip(rows(problems, right), problems, strict=True)
    ]
    a, b = write("a.jsonl", one), write("b.jsonl", list(reversed(rows(problems[:30], wrong))))
    found = numbers(call, a, b, "--reward", "exact_match", "--num-prompts", 20)
    assert (found["wins"], found["losses"], found["pairs"]) == (20, 0, 20)
    code, _, err = call(b, a, "--reward", "exact_match")  # the first side's columns count
    assert code == 3 and "needs the column 'answer'" in err
    assert numbers(call, b, a, "--reward", "exact_match", "--dataset", "wordmath")["losses"] == 30


def test_of_a_runs_completions_the_last_evaluation_counts(write):
    def line(step, text, **more):
        return {"step": step, "prompt": "p", "completion": text, **more}

    lines = [line(0, "old", eval=True), line(5, "last", eval=True), line(6, "train")]
    assert [row["completion"] for row in find_side(write("a.jsonl", lines)).rows] == ["last"]
    assert [row["completion"] for row in find_side(write("b.jsonl", lines[2:])).rows] == ["train"]


def test_the_report_is_for_people_and_shows_no_control_characters(call, write):
    lines = [{"prompt": f"q{i}", "completion": "x\x1b[31m" * i} for i in range(4)]
    a, b = write("a.jsonl", lines), write("b.jsonl", [{**line, "completion": "yy"} for line in lines])
    code, out, _ = call(a, b, "--reward", "length", "--examples", 9)
    assert code == 0 and "\x1b" not in out and "\\x1b" in out
    assert (
        out.startswith("4 prompts, judge reward\n  A  ") and "95 % interval" in out and "B better: q0" in out
    )
    code, out, _ = call(a, a, "--reward", "length")
    assert "no pair was decided" in out and "equal texts 4" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tiny", "tiny"], 2, "nothing says which answer is better"),
        (["tiny", "tiny", "--judge", "reward", "--reward", "length"], 2, "both given"),
        (["tiny", "tiny", "--judge", "rewrd"], 2, "there is no judge 'rewrd'; did you mean"),
        (["tiny", "tiny", "--judge", "random", "--option", "frist=1"], 2, "did you mean 'first'"),
        (["tiny", "tiny", "--judge", "random", "--option", "first"], 2, "no value"),
        (["tiny", "tiny", "--reward", "length", "--temperature", "0"], 2, "temperature"),
        (["tiny", "./nowhere", "--reward", "length"], 2, "does not exist"),
        (["tiny", "empty", "--reward", "length"], 2, "holds no model"),
        (["tiny", "gone.jsonl", "--reward", "length"], 2, "there is no file 'gone.jsonl'"),
        (["tiny", "other.jsonl", "--reward", "length"], 3, "no prompt has a completion on both sides"),
        (["other.jsonl", "bad.jsonl", "--reward", "length"], 3, "prompt (text or messages)"),
        (["other.jsonl", "none.jsonl", "--reward", "length"], 3, "holds no completions"),
        (["other.jsonl", "other.jsonl", "--reward", "length", "--output", "bad.jsonl"], 2, "exists already"),
        (["other.jsonl", "other.jsonl", "--reward", "length", "--output", "x/y.jsonl"], 2, "in no folder"),
        (["other.jsonl", "differs.jsonl", "--reward", "./broken.py:broken"], 6, "raised ZeroDivisionError"),
    ],
    ids=lambda value: "-".join(value)[-40:] if isinstance(value, list) else "",
)
def test_errors(words, code, said, call, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write("other.jsonl", [{"prompt": "not of the data", "completion": "x"}])
    write("differs.jsonl", [{"prompt": "not of the data", "completion": "y"}])
    write("bad.jsonl", [{"prompt": "p"}])
    write("none.jsonl", [])
    (tmp_path / "broken.py").write_text("def broken(completions):\n    return 1 / 0\n")
    found, out, err = call(*words)
    assert found == code and said in err and "Traceback" not in err and out == "", err
    assert len(err.splitlines()) <= 12


def test_a_run_stands_for_its_policy_and_says_what_it_was_trained_on(tmp_path, call, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = "Ann has {} shells and finds {} more. How many are there?"
    data = [{"question": asked.format(i + 5, i), "answer": str(2 * i + 5)} for i in range(12)]
    write("data.jsonl", data)
    words = """--algo rloo --reward exact_match --dataset data.jsonl --eval-dataset data.jsonl --lora-r 2
        --columns prompt=question --max-steps 2 --batch-size 4 --save-steps 1 --max-completion-length 12
        --progress none --no-plots --output-dir run""".split()
    assert main(["run", *words]) == 0
    found = numbers(call, "run", "tiny", "--reward", "exact_match")
    assert found["pairs"] == 12 and found["a"]["length"] <= 12 and found["b"]["length"] <= 12
    # An adapter with its base, a checkpoint, and a run that has no final policy yet.
    assert find_side("run").model == {"model": "tiny", "adapter": "run", "tokenizer": "run"}
    checkpoint = numbers(call, "run/checkpoint-2", "tiny", "--reward", "exact_match")
    assert {**checkpoint["a"], "name": ""} == {**found["a"], "name": ""}
    (tmp_path / "run" / "adapter_config.json").unlink()
    assert find_side("run").model["adapter"] == "run/checkpoint-2"
    # Its completions are those of its evaluation, and find their answers in its data.
    assert numbers(call, "run/completions.jsonl", "tiny", "--reward", "exact_match")["pairs"] == 8
    found = numbers(call, "run/completions.jsonl", "run/completions.jsonl", "--reward", "exact_match")
    assert (found["ties"], found["pairs"]) == (8, 8)


def test_a_run_whose_model_was_an_object_is_a_side(tmp_path, call, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import rlx

    monkeypatch.chdir(tmp_path)
    rlx.run(
        model=AutoModelForCausalLM.from_pretrained(tiny_path()),
        tokenizer=AutoTokenizer.from_pretrained(tiny_path()),
        reward="exact_match", lora_r=2, max_steps=1, batch_size=4, max_rows=8, max_eval_rows=4,
        max_completion_length=8, progress="none", plots=False, output_dir="run",
    )  # fmt: skip
    assert find_side("run").model["model"] == str(tiny_path())
    words = ("--reward", "length", "--num-prompts", 4)
    assert numbers(call, "run", "tiny", *words)["pairs"] == 4
    assert numbers(call, "run/completions.jsonl", "run/completions.jsonl", *words)["ties"] == 4
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    code, _, err = call("run", "tiny", *words)
    assert code == 2 and "nothing says which model the adapter run is of" in err


def test_a_config_beside_a_file_does_not_make_it_a_runs(write, tmp_path):
    (tmp_path / "config.yaml").write_text("algo: dpo\ndataset: elsewhere.jsonl\n")
    assert find_side(write("a.jsonl", [{"prompt": "p", "completion": "c"}])).run is None


def test_a_copy_of_a_model_without_a_run_is_a_side(tmp_path, call):
    shutil.copytree(tiny_path(), tmp_path / "copy")
    words = ("--reward", "exact_match", "--max-completion-length", 24, "--num-prompts", 8)
    assert numbers(call, tmp_path / "copy", "tiny", *words)["pairs"] == 8


@pytest.mark.slow
def test_a_policy_that_was_trained_beats_the_one_it_began_with(tmp_path, call):
    options = f"--algo rloo --reward exact_match --max-steps 12 --progress none --output-dir {tmp_path}/run"
    assert main(["run", *options.split()]) == 0
    found = numbers(call, tmp_path / "run", "tiny", "--reward", "exact_match", "--num-prompts", 256)
    assert found["win_rate"] > 0.9 and found["low"] > 0.85 and found["wins"] > 80, found
