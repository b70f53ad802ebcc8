"""The example package: chosen by reference, built with options, run by the runner."""

import sys
from pathlib import Path

import pytest

from rlx.core.batch import Prompts
from rlx.core.errors import RlxError
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.plugins.references import make

PACKAGE = Path(__file__).parents[2] / "examples" / "my_pkg"


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.syspath_prepend(str(PACKAGE))
    yield
    sys.modules.pop("my_pkg", None)


def score(reward):
    runner = RewardRunner([NamedReward("MyReward", reward)])
    assert runner.columns_needed == {"MyReward": ("answer",)}
    prompts = Prompts(
        [[1]] * 3, ["p"] * 3, [None] * 3, {"answer": ["3 * 6 = 18\n#### 18"] * 2 + [None]}, [0, 1, 2]
    )
    return runner.score(prompts, ["Answer: 18", "#### 28", "18"], [[1]] * 3).score.tolist()


def test_it_is_chosen_by_reference_and_built_with_options(installed):
    # 10 away: half of partial
    scores = score(make("reward", "my_pkg:MyReward", {"partial": 0.2}))
    assert scores[:2] == pytest.approx([1.0, 0.1], abs=1e-7)
    assert scores[2] != scores[2]


def test_it_is_chosen_by_file():
    scores = score(make("reward", f"{PACKAGE / 'my_pkg' / '__init__.py'}:MyReward"))
    assert scores[:2] == [1.0, 0.25]


def test_a_wrong_option_is_told(installed):
    with pytest.raises(RlxError, match="half_life") as caught:
        make("reward", "my_pkg:MyReward", {"half_lif": 3})
    assert caught.value.exit_code == 2
