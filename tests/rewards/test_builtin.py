"""The built-in rewards on cases made by hand."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, RlxError
from rlx.core.options import build, options
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.rewards.contains import Contains
from rlx.rewards.exact_match import ExactMatch
from rlx.rewards.length import Length, Overlong
from rlx.rewards.regex import Format, Regex
from rlx.rewards.repetition import Repetition


def make(reward, **values):
    return reward(build(reward.Config, values, owner=f"reward {reward.__name__}"))


def match(completion, answer="19", **values):
    reward = make(ExactMatch, **values)
    return reward(completions=[completion], **{values.get("column", "answer"): [answer]})[0]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("34 - 15 = 19. Answer: 19", 1.0),
        ("34 - 15 = 19. Answer: 19  \n", 1.0),
        ("34 + 15 = 49. Answer: 49", 0.0),
        ("Answer: 19 apples", 0.0),
        ("Answer: 19\nand so on", 0.0),
        ("Answer: 19. Then more. Answer: 20", 0.0),
        ("Answer: 20. No: Answer: 19", 1.0),
        ("I think it is 19.", 0.0),
        ("19", 0.0),
        ("Answer:", 0.0),
        ("Answer: ", 0.0),
        ("", 0.0),
        ("long reasoning\n#### 19", 1.0),
        ("so $\\boxed{19}$.", 1.0),
        ("\\boxed{20} or \\boxed{19}", 1.0),
        ("\\boxed{19} or so", 0.0),
        ("Answer: \\boxed{19}", 1.0),
        ("\\boxed{19", 0.0),
        ("Answer: 19.0", 1.0),
        ("Answer: $19.", 1.0),
        ("Answer: -19", 0.0),
        ("Answer: 1e1", 0.0),
        ("Answer: 19日", 0.0),
    ],
)
def test_exact_match_compares_what_ends_the_text(completion, score):
    assert match(completion) == score


@pytest.mark.parametrize(
    "answer", ["19", 19, 19.0, " 19 ", "34 - 15 = <<34-15=19>>19\n#### 19", "\\boxed{19}"]
)
def test_exact_match_reads_the_answer_out_of_the_data(answer):
    assert match("Answer: 19", answer) == 1.0
    assert match("Answer: 20", answer) == 0.0


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_exact_match_abstains_without_an_answer(answer):
    assert match("Answer: 19", answer) is None


def test_exact_match_options():
    assert match("Answer: 1,000", "1000") == 1.0
    assert match("Answer: 1,000", "1000", numbers=False) == 0.0
    assert match("Answer: PARIS", "Paris") == 1.0
    assert match("Answer: PARIS", "Paris", ignore_case=False) == 0.0
    assert match(" paris ", "Paris", bare=True) == 1.0
    assert match("it is 7", "7", pattern=r"is (\d+)$") == 1.0
    assert match("Answer: 7", "7", column="gold") == 1.0
    assert match("\\boxed{\\frac{1}{2}}", "$\\boxed{\\frac{1}{2}}$") == 1.0
    assert make(ExactMatch, column="gold").columns == ("gold",)


@given(st.integers(-(10**9), 10**9), st.text(max_size=30))
def test_exact_match_finds_every_number_after_any_reasoning(number, before):
    assert match(f"{before}\nAnswer: {number}", str(number)) == 1.0
    assert match(f"{before}\n#### {number:,}", number) == 1.0
    assert match(f"{before}\nAnswer: {number + 1}", str(number)) == 0.0


@pytest.mark.parametrize("pattern", ["(", "no group"])
def test_a_pattern_that_cannot_work_is_a_config_error(pattern):
    with pytest.raises(ConfigError, match="pattern of reward 'exact_match'"):
        make(ExactMatch, pattern=pattern)


@pytest.mark.parametrize(
    "text",
    [
        "Answer:" * 100_000,
        "Answer: " + " " * 1_000_000 + "x\ny",
        "####" * 200_000,
        "\\boxed{" * 100_000,
        "\\boxed{}$" + "$" * 1_000_000 + "x",
        "(" * 1_000_000,
        "Answer: " + "9" * 1_000_000,
        "__import__('os').system('touch pwn')",
        "Answer: 9**9**9**9",
        "Answer: 1e999999999",
    ],
    ids=lambda text: f"fault[S12] {text[:12]}",
)
def test_hostile_text_costs_no_time(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.process_time()  # the clock of this process: others may keep the machine busy
    assert match(text) == 0.0
    assert make(Regex, pattern=r"Answer: (\d+)$")(completions=[text]) in ([0.0], [1.0])
    assert make(Format)(completions=[text, "<think>" * 100_000]) == [0.0, 0.0]
    assert time.process_time() - began < 1.0
    assert not list(tmp_path.iterdir())


def test_regex_searches_or_matches_everything():
    texts = ["a 12", "12", ""]
    assert make(Regex, pattern=r"\d+")(completions=texts) == [1.0, 1.0, 0.0]
    assert make(Regex, pattern=r"\d+", full=True)(completions=texts) == [0.0, 1.0, 0.0]
    assert make(Regex, pattern=r"\d+", match_score=-1.0, miss_score=0.5)(completions=texts) == [
        -1.0,
        -1.0,
        0.5,
    ]
    assert make(Regex, pattern="x")(completions=["a" * 10_000 + "x"]) == [0.0]
    assert make(Regex, pattern="(?s).*", full=True)(completions=["a" * 10_001]) == [0.0]
    with pytest.raises(ConfigError, match="no regular expression"):
        make(Regex, pattern="[")
    with pytest.raises(RlxError, match="needs the option 'pattern'"):
        make(Regex)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>2 + 2</think> 4", 1.0),
        (" <think>\nlong\nreasoning\n</think>\n\n4 ", 1.0),
        ("<think>2 + 2</think>", 0.0),
        ("<think> </think> 4", 0.0),
        ("4", 0.0),
        ("well <think>a</think> 4", 0.0),
        ("<think>a</think> 4 <think>b</think>", 0.0),
        ("<think>a</think></think> 4", 0.0),
        ("</think>a<think> 4", 0.0),
        ("<think>a", 0.0),
        ("", 0.0),
    ],
)
def test_format_wants_reasoning_then_an_answer(text, score):
    assert make(Format)(completions=[text]) == [score]


def test_format_with_an_answer_tag_and_with_the_tag_in_the_prompt():
    tagged = make(Format, answer_tag="answer")
    assert tagged(completions=["<think>a</think> <answer>4</answer>", "<think>a</think> 4"]) == [1.0, 0.0]
    assert tagged(
        completions=["<think>a</think><answer>4</answer> so", "<think>a</think><answer> </answer>"]
    ) == [0, 0]
    assert make(Format, opened=True)(completions=["a</think> 4", "<think>a</think> 4"]) == [1.0, 0.0]


def by_tokens(reward, *lengths):
    return reward(completions=["x"] * len(lengths), completion_ids=[[1] * length for length in lengths])


def test_length_falls_with_the_distance_from_the_target():
    # |n - 10| · 0.25, not below -1
    assert by_tokens(make(Length, target=10, penalty=0.25), 10, 11, 8, 0, 99) == [
        0.0,
        -0.25,
        -0.5,
        -1.0,
        -1.0,
    ]
    assert by_tokens(make(Length, target=10, penalty=0.25, side="over"), 8, 11) == [0.0, -0.25]
    assert by_tokens(make(Length, target=10, penalty=0.25, side="under"), 8, 11) == [-0.5, 0.0]
    assert by_tokens(make(Length, target=10, penalty=0.25, lowest=-3), 0) == [-2.5]


def test_overlong_is_the_ramp_of_dapo():
    # longest 10, cache 4: nothing up to 6, then (6 - L) / 4, and -1 from 10 on
    assert by_tokens(make(Overlong, longest=10, cache=4), 0, 6, 7, 9, 10, 11, 99) == [
        0,
        0,
        -0.25,
        -0.75,
        -1,
        -1,
        -1,
    ]
    with pytest.raises(ConfigError, match="ramp"):
        make(Overlong, longest=4, cache=5)


def test_contains_any_or_all_keywords():
    texts = ["Yes and NO", "yes", "maybe", ""]
    assert make(Contains, keywords=["yes", "no"])(completions=texts) == [1.0, 1.0, 0.0, 0.0]
    assert make(Contains, keywords=["yes", "no"], mode="all")(completions=texts) == [1.0, 0.0, 0.0, 0.0]
    assert make(Contains, keywords=["yes"], ignore_case=False)(completions=texts) == [0.0, 1.0, 0.0, 0.0]
    assert make(Contains, keywords=["STRASSE"])(completions=["straße"]) == [1.0]
    for wrong in ([], [""]):
        with pytest.raises(ConfigError, match="not empty"):
            make(Contains, keywords=wrong)


def test_repetition_counts_repeated_n_grams():
    # a b a b a: bigrams ab ba ab ba, 2 unique of 4: 1 - 2/4
    texts = ["a b a b a", "A b a\nB a", "a b c", "a", ""]
    assert make(Repetition, n=2)(completions=texts, completion_ids=[[]] * 5) == [-0.5, -0.5, 0.0, 0.0, 0.0]
    tokens = make(Repetition, n=1, by="tokens", max_penalty=-4.0)
    assert tokens(completions=["", ""], completion_ids=[[7, 7, 7, 7], [1, 2, 3]]) == [-3.0, 0.0]


ALL = {
    "exact_match": make(ExactMatch),
    "regex": make(Regex, pattern="a+"),
    "format": make(Format),
    "length": make(Length),
    "overlong": make(Overlong, longest=10, cache=5),
    "contains": make(Contains, keywords=["a"]),
    "repetition": make(Repetition),
}


@given(
    st.lists(
        st.tuples(st.text(max_size=40), st.lists(st.integers(0, 99), max_size=8)), min_size=1, max_size=6
    )
)
def test_every_builtin_gives_one_score_a_completion_whatever_else_is_in_the_batch(items):
    runner = RewardRunner([NamedReward(name, fn) for name, fn in ALL.items()])

    def score(rows):
        prompts = Prompts(
            [[1]] * len(rows),
            ["p"] * len(rows),
            [None] * len(rows),
            {"answer": ["a"] * len(rows)},
            [*range(len(rows))],
        )
        return runner.score(prompts, [text for text, _ in rows], [ids for _, ids in rows]).rewards

    together = score(items)
    for i, item in enumerate(items):
        alone = score([item])
        assert {name: values[i].item() for name, values in together.items()} == {
            name: values[0].item() for name, values in alone.items()
        }


@pytest.mark.parametrize("reward", [type(fn) for fn in ALL.values()], ids=lambda reward: reward.__name__)
def test_every_option_is_explained(reward):
    assert reward.__doc__
    assert all(option.doc for option in options(reward.Config).values())


@pytest.mark.parametrize("name", ALL)
def test_every_builtin_is_registered_under_its_name(name):
    from rlx.plugins.references import resolve

    assert resolve("reward", name) is type(ALL[name])
