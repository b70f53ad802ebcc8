r"""accuracy: equality as mathematics, in workers that hostile expressions cannot hold up."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import re
import time
from pathlib import Path

import pytest

from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, RewardError
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.plugins.contract import Failed
from rlx.rewards import accuracy
from rlx.rewards.accuracy import Accuracy

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl.gz"
TIMEOUT = 1.0


@pytest.fixture(scope="module")
def check():
    """One reward of two workers for most tests: they are the same whatever it has seen before."""
    reward = Accuracy(Accuracy.Config(workers=2, timeout=10.0))
    yield lambda gold, *texts: reward(completions=list(texts), answer=[gold] * len(texts)).values
    reward.close()


def make(**options):
    return Accuracy(Accuracy.Config(**{"workers": 1, "timeout": TIMEOUT, **options}))


def runner(reward, **options):
    return RewardRunner([NamedReward("accuracy", reward)], **options)


def prompts(*golds):
    count = len(golds)
    return Prompts([[1]] * count, ["?"] * count, [None] * count, {"answer": list(golds)}, list(range(count)))


EQUAL = [
    (r"\frac{1}{2}", [r"\boxed{\frac{1}{2}}", "0.5", "1/2", r"$\frac{2}{4}$", "So it is .5", "#### 1/2"]),
    ("1,234", ["1234", r"\boxed{1,234}", "The answer is 1234.0", "#### $1,234"]),
    (18, ["18", "3 * 6 = 18", "#### 18\nor so", "9 + 9"]),
    ("x+1", ["$1+x$", r"\boxed{\frac{x^2-1}{x-1}}"]),
    (r"\{1,2\}", [r"$\{2,1\}$"]),
    ("(1, 2)", [r"\boxed{(1,2)}"]),
    ("Half of 36 is 18.\n#### 18", ["18"]),
    (r"We add. So \boxed{18} apples.", ["18"]),
    ("18 dollars", ["18", r"\boxed{18 \text{ dollars}}"]),
]
UNEQUAL = [
    (r"\frac{1}{2}", ["2", r"\boxed{\frac{1}{3}}", "0.51", "", "half of it", "1/2 or 3"]),
    ("18", ["It is 18, no, 19", "#### 18\n#### 19", "-18", "180", "x = y"]),
    ("x+1", ["$x-1$", "$y+1$"]),
    ("(1, 2)", ["$(2,1)$"]),
]


@pytest.mark.parametrize(("gold", "texts"), EQUAL)
def test_what_is_equal_is_right_however_it_is_written(check, gold, texts):
    assert check(gold, *texts) == [1.0] * len(texts)


@pytest.mark.parametrize(("gold", "texts"), UNEQUAL)
def test_what_is_not_equal_is_wrong(check, gold, texts):
    assert check(gold, *texts) == [0.0] * len(texts)


@pytest.mark.parametrize("gold", ["", "  ", None, "no number here at all", "!?"])
def test_a_gold_that_cannot_be_read_does_not_apply_and_is_counted(gold):
    reward = make(timeout=10.0)
    told = reward(completions=["3", "3"], answer=[gold, "3"])
    reward.close()
    assert told.values == [None, 1.0]
    assert told.metrics == {"undecided": [0.0, 0.0], "unreadable_gold": [1.0, 0.0]}
    assert told.columns == {"answer": [None, "3"]}


def test_without_a_mark_the_last_expression_is_the_answer_unless_marks_are_asked_for(check):
    reward = make(marked=True, timeout=10.0)
    texts = ["12 and then 18", r"\boxed{18}", "#### 18", "The answer is 18"]
    assert check("18", *texts) == [1.0, 1.0, 1.0, 1.0]
    assert reward(completions=texts, answer=["18"] * 4).values == [0.0, 1.0, 1.0, 1.0]
    reward.close()


def test_only_the_end_of_a_completion_is_read():
    reward = make(longest=10, timeout=10.0)
    assert reward(completions=["18" + " " * 8, "18" + " " * 9], answer=["18"] * 2).values == [1.0, 0.0]
    reward.close()


def test_another_column_may_hold_the_answer():
    reward = make(column="solution", timeout=10.0)
    assert reward.columns == ("solution",)
    assert reward(completions=["2"], solution=["2"], answer=["3"]).values == [1.0]
    reward.close()


# Three rows of GSM8K's test split, answers as its authors wrote them; the whole of it where it is at hand.
ROWS = [
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n"
    "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.\n#### 18",
    "It takes 2/2=<<2/2=1>>1 bolt of white fiber\n"
    "So the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric\n#### 3",
    "The cost of the house and repairs came out to 80,000+50,000=$<<80000+50000=130000>>130,000\n"
    "So he made a profit of 200,000-130,000=$<<200000-130000=70000>>70,000\n#### 70000",
]


@pytest.mark.parametrize("source", ["three rows", "all"])
def test_solutions_of_gsm8k_are_right_and_their_neighbours_wrong(check, source):
    rows = ROWS
    if source == "all":
        if not GSM8K.exists():
            pytest.skip(f"the data is not at {GSM8K}")
        with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line)["answer"] for line in lines][:200]
    for row in rows:
        number = int(row.rpartition("####")[2].strip().replace(",", ""))
        texts = [
            row,
            rf"\boxed{{{number:,}}}",
            f"it is ${number}.00.",
            f"{2 * number}/2",
            f"#### {number + 1}",
        ]
        assert check(row, *texts) == [1.0, 1.0, 1.0, 1.0, 0.0], row


HARMLESS = [
    "__import__('os').system('touch pwn')",
    "$__import__('os').system('touch pwn')$",
    r"\boxed{__import__('os').system('touch pwn')}",
    "3*(__import__('os').system('touch pwn'))",
    "the answer is 3+__import__('os').system('touch pwn')",
    "(" * 1_000_000,
    "$" + "(" * 1_000_000,
    r"\boxed{" * 200_000,
    "9" * 1_000_000,
    "\x00\ud800" * 1000,
]
ENDLESS = [
    "9**9**9**9",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
    "#### " + "-" * 1900,
]


@pytest.mark.parametrize("text", HARMLESS, ids=lambda text: f"fault[S12] {text[:12]!r}")
def test_hostile_text_is_wrong_and_harmless(check, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert check("5", text, "5") == [0.0, 1.0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ENDLESS, ids=lambda text: f"fault[S12] {text[:12]!r}")
def test_an_endless_expression_fails_by_itself(text):
    reward = make(workers=2)
    reward(completions=["1", "1"], answer=["1", "1"])
    began = time.monotonic()
    values = reward(completions=["5", text, "6"], answer=["5"] * 3).values
    took = time.monotonic() - began
    reward.close()
    assert values == [1.0, Failed("took longer than 1 s", accuracy.HINT), 0.0]
    assert TIMEOUT <= took < TIMEOUT + 20.0


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[S12] eval")])
def test_no_code_of_ours_evaluates_text(_):
    """math-verify evaluates what its pattern of digits and operators lets through; nothing else does."""
    rewards = Path(accuracy.__file__).parent
    for file in (*rewards.glob("*.py"), *rewards.with_name("core").glob("worker*.py")):
        assert not re.search(r"(?<![.\w])(eval|exec|sympify|parse_expr)\(", file.read_text()), file


def test_S12_control_the_endless_expression_is_endless():
    process = multiprocessing.get_context("spawn").Process(
        target=accuracy.compare, args=("5", ENDLESS[1], False), daemon=True
    )
    process.start()
    process.join(4.0)
    assert process.is_alive()
    process.kill()
    process.join()


def test_a_check_without_a_result_goes_by_reward_on_error_and_never_in_silence():
    reward, given = make(), (prompts("5", "5"), ["5", ENDLESS[1]], [[1], [1]])
    with pytest.raises(RewardError) as caught:
        runner(reward).score(*given)
    assert caught.value.what == "reward 'accuracy' failed for item 1"
    assert "took longer than 1 s" in caught.value.got and "--accuracy.undecided" in caught.value.hint
    with pytest.warns(UserWarning, match="took longer"):
        scored = runner(reward, on_error="value", error_value=-1.0).score(*given)
    assert scored.score.tolist() == [1.0, -1.0]
    assert scored.metrics["reward/accuracy/errors"] == [1.0]
    assert scored.metrics["reward/accuracy/undecided"] == [0.0, 1.0]
    assert scored.metrics["reward/accuracy/unreadable_gold"] == [0.0]
    reward.close()


@pytest.mark.parametrize(("undecided", "score"), [("none", None), ("wrong", 0.0)])
def test_an_option_says_what_such_a_completion_is_worth(undecided, score):
    reward = make(undecided=undecided)
    told = reward(completions=["5", ENDLESS[1]], answer=["5", "5"])
    reward.close()
    assert told.values == [1.0, score]
    assert told.metrics["undecided"] == [0.0, 1.0]


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(accuracy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.hint == 'pip install "rlx[math]"'


def test_a_missing_column_is_told_before_anything_is_checked():
    assert runner(make(column="gold")).columns_needed == {"accuracy": ("gold",)}
