"""cosine_length: hand-derived values, and the reward that tells right from wrong."""

from __future__ import annotations

import math

import pytest

from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, RewardError
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.plugins.contract import Failed, Rewarded
from rlx.rewards.cosine_length import CosineLength

WORTH = {"right_short": 2.0, "right_long": 1.0, "wrong_short": -10.0, "wrong_long": 0.0, "exceeded": -20.0}


def make(correct="exact_match", longest=12, **options):
    return CosineLength(CosineLength.Config(longest=longest, correct=correct, **{**WORTH, **options}))


def score(reward, texts, lengths, answer="5"):
    count = len(texts)
    rows = Prompts([[1]] * count, ["?"] * count, [None] * count, {"answer": [answer] * count}, [0] * count)
    runner = RewardRunner([NamedReward("cosine_length", reward)])
    return runner.score(rows, texts, [[7] * length for length in lengths])


# cos(0) = 1, cos(pi/3) = 1/2, cos(pi/2) = 0, cos(2 pi/3) = -1/2 at 0, 4, 6 and 8 of 12 tokens: the weight of
# the short value is (1 + cos)/2 = 1, 3/4, 1/2, 1/4; from 12 tokens on the value is that of too long a text.
@pytest.mark.parametrize(
    ("length", "right", "wrong"),
    [
        (0, 2.0, -10.0),
        (4, 1.75, -7.5),
        (6, 1.5, -5.0),
        (8, 1.25, -2.5),
        (12, -20.0, -20.0),
        (99, -20.0, -20.0),
    ],
)
def test_values_by_hand(length, right, wrong):
    scored = score(make(), ["Answer: 5", "Answer: 6"], [length, length])
    assert scored.score.tolist() == pytest.approx([right, wrong], abs=1e-6)


def test_the_reward_that_is_asked_is_told_the_step_too(tmp_path):
    (tmp_path / "late.py").write_text(
        "def late(completions, run_step):\n    return [float(run_step > 3) for _ in completions]\n"
    )
    runner = RewardRunner([NamedReward("cosine_length", make(correct=f"{tmp_path}/late.py:late"))])
    rows = Prompts([[1]], ["?"], [None], {}, [0])
    assert [runner.score(rows, ["x"], [[]], step).score.item() for step in (3, 4)] == [-10.0, 2.0]


def test_just_below_the_longest_the_long_value_is_near():
    (right, wrong) = score(make(longest=10_000), ["Answer: 5", "no"], [9999, 9999]).score.tolist()
    assert right == pytest.approx(1.0, abs=1e-6) and wrong == pytest.approx(0.0, abs=1e-6)


def test_right_answers_lose_and_wrong_ones_gain_with_length():
    lengths = list(range(12))
    right = score(make(), ["Answer: 5"] * 12, lengths).score.tolist()
    wrong = score(make(), ["Answer: 6"] * 12, lengths).score.tolist()
    assert right == sorted(right, reverse=True) and wrong == sorted(wrong)
    assert min(right) > max(wrong)


def write(tmp_path, body):
    file = tmp_path / "mine.py"
    file.write_text("import rlx\n" + body)
    return f"{file}:right"


def test_any_reward_may_tell_what_is_right(tmp_path):
    ref = write(tmp_path, "def right(completions, gold):\n    return [0.5, 0.51]\n")
    reward = make(ref, longest=12)
    assert reward.columns == ("gold",)
    values = reward(completions=["a", "b"], completion_ids=[[1] * 6] * 2, gold=[1, 1], other=[1, 1])
    assert values == pytest.approx([-5.0, 1.5])  # 0.5 is not above the threshold


def test_an_async_reward_may_tell_what_is_right(tmp_path):
    ref = write(tmp_path, "async def right(completions):\n    return [1.0 for _ in completions]\n")
    assert score(make(ref), ["a"], [6]).score.tolist() == [1.5]


def test_what_does_not_apply_or_failed_stays_so_and_what_else_is_told_is_told_on(tmp_path):
    body = (
        "def right(completions):\n"
        "    values = [None, rlx.Failed('no'), 1.0]\n"
        "    return rlx.Rewarded(values, {'m': 1.0}, {'c': [1, 2, 3]})\n"
    )
    reward = make(write(tmp_path, body))
    told = reward(completions=["a"] * 3, completion_ids=[[1] * 6] * 3)
    assert told == Rewarded([None, Failed("no"), 1.5], {"m": 1.0}, {"c": [1, 2, 3]})


@pytest.mark.parametrize("returned", ["[float('nan')]", "[[1.0, 2.0]]", "[1.0, 1.0]", "1.0"])
def test_what_cannot_tell_right_from_wrong_is_an_error(tmp_path, returned):
    ref = write(tmp_path, f"def right(completions):\n    return {returned}\n")
    with pytest.raises(RewardError, match="cosine_length"):
        score(make(ref), ["a"], [6])


def test_it_cannot_ask_itself(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from rlx.rewards.cosine_length import CosineLength as Base\nright = Base(Base.Config(longest=5))\n"
    )
    with pytest.raises(ConfigError, match="cannot ask this reward"):
        make(f"{file}:right")


def test_the_other_reward_keeps_its_state_and_is_closed(tmp_path):
    body = (
        "class Right:\n"
        "    seen = 0\n    closed = False\n"
        "    def __call__(self, *, completions):\n        self.seen += 1\n        return [1.0]\n"
        "    def state_dict(self):\n        return {'seen': self.seen}\n"
        "    def load_state_dict(self, state):\n        self.seen = state['seen']\n"
        "    def close(self):\n        self.closed = True\n"
        "right = Right()\n"
    )
    reward = make(write(tmp_path, body))
    reward(completions=["a"], completion_ids=[[1]])
    assert reward.state_dict() == {"seen": 1}
    reward.load_state_dict({"seen": 7})
    assert reward.state_dict() == {"seen": 7}
    reward.close()
    assert reward._correct.closed
    assert make().state_dict() == {}


def test_the_default_values_rank_short_right_over_long_right_over_long_wrong_over_short_wrong():
    reward = CosineLength(CosineLength.Config(longest=100))
    values = reward(
        completions=["Answer: 5", "Answer: 5", "x", "x"],
        completion_ids=[[1] * n for n in (10, 90, 90, 10)],
        answer=["5"] * 4,
    )
    assert values == sorted(values, reverse=True) and len(set(values)) == 4
    assert math.isclose(values[0], 0.5 + 0.5 * (1 + math.cos(0.1 * math.pi)) / 2)
