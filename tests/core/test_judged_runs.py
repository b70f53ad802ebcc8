"""Runs that learn from a judge: what is refused, what is logged, and that a resume goes on exactly."""

from __future__ import annotations

import shutil

import pytest
import torch

import rlx
from rlx.core.config import from_mapping
from rlx.core.errors import ConfigError, DataError, RewardError
from rlx.core.run import prepare, reopen, train

BY_ANSWER = {"name": "reward", "rewards": ["exact_match"]}
SMALL = {
    "algo": "online_dpo", "judge": BY_ANSWER, "max_steps": 4, "batch_size": 8, "num_generations": 3,
    "max_completion_length": 24, "max_rows": 32, "max_eval_rows": 2, "progress": "none", "plots": False,
    "logging_steps": 1, "learning_rate": 1e-3,
}  # fmt: skip


class Alternating:
    """Remembers how often it was asked: the first wins, then the second, and so on."""

    def __init__(self):
        self.asked = 0

    def judge(self, prompts, pairs):
        self.asked += len(pairs)
        return [(self.asked - i) % 2 for i in range(len(pairs))]

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


@pytest.fixture
def options(tmp_path):
    torch.set_num_threads(1)
    return lambda name="run", **more: {**SMALL, **more, "output_dir": str(tmp_path / name)}


def told(result):
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and "second" not in k}
        for line in result.metrics
    ]


def test_a_judge_stands_in_for_a_reward_where_the_algorithm_can_learn_from_it():
    config = from_mapping({"algo": "online_dpo", "judge": "random", "random.first": "0.25"})
    assert config.judge.name == "random" and config.judge.options["first"] == 0.25 and config.rewards == []
    assert config.settings.judge == {"name": "random", "first": 0.25, "no_verdict": 0.0, "seed": 0}
    assert from_mapping({"algo": "online_dpo", "reward": "exact_match"}).judge is None
    with pytest.raises(ConfigError, match="ppo does not learn from comparisons") as caught:
        from_mapping({"algo": "ppo", "reward": "exact_match", "judge": "random"}, {"judge": "--judge"})
    assert caught.value.where == "--judge" and "online_dpo" in caught.value.hint
    with pytest.raises(ConfigError, match="learns from a reward, and none is given"):
        from_mapping({"algo": "online_dpo"})
    with pytest.raises(ConfigError, match="there is one judge"):
        from_mapping({"algo": "online_dpo", "judge": ["random", "reward"]})


def test_the_config_with_a_judge_loads_back():
    from rlx.core.yaml_file import parse_config

    config = from_mapping(
        {"algo": "online_dpo", "judge": {"name": "openai", "model": "m", "key_variable": "K"}}
    )
    again = from_mapping(parse_config(config.to_yaml(), "x")[0])
    assert again.judge == config.judge and again.settings == config.settings


def test_a_run_learns_from_what_the_judge_says_and_measures_the_rest(options):
    with prepare(**options(reward="exact_match", max_steps=1, batch_size=16)) as run:
        rollouts = run.roll_out()
        score, groups = rollouts.score.reshape(-1, 3), rollouts.sequences.groups.reshape(-1, 3)
        assert bool((groups == groups[:, :1]).all())
        # Right beats wrong, and nothing else is decided: share of the comparisons won among those decided.
        for right, wins in zip(score.tolist(), rollouts.wins.reshape(-1, 3).tolist(), strict=True):
            decided = sum(right) in (1, 2)
            assert wins == pytest.approx(right if decided else [float("nan")] * 3, nan_ok=True)
        texts = [rollouts.texts[i : i + 3] for i in range(0, 48, 3)]
        same = [float(g[a] == g[b]) for g in texts for a, b in ((0, 1), (0, 2), (1, 2))]
        assert rollouts.metrics["judge/ties"].tolist() == same
        run.step()
    assert {"judge/ties", "judge/no_verdict", "time/judge", "reward"} <= run.metrics_history[-1].keys()


def test_without_a_reward_nothing_is_measured_and_a_resume_goes_on_exactly(options, tmp_path):
    judge = Alternating()
    result = rlx.run(**options(judge=judge, save_steps=2))
    assert judge.asked > 0 and not any("reward" in line for line in told(result))
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    again = train(reopen(tmp_path / "cut", {"judge": Alternating()}))
    assert told(again) == told(result)
    for one, other in zip(again.policy.model.parameters(), result.policy.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_without_any_verdict_moves_nothing(options):
    start = prepare(**options("start"))
    before = [p.detach().clone() for p in start.policy.model.parameters()]
    start.close()
    result = rlx.run(**options(judge={"name": "random", "no_verdict": 1.0}, max_steps=2))
    assert all(map(torch.equal, before, result.policy.model.parameters()))
    assert result.metrics[1]["judge/no_verdict"] + result.metrics[1]["judge/ties"] == pytest.approx(1.0)


def test_columns_are_checked_before_weights_and_a_failure_is_told(options, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1?"}\n' * 8)
    with pytest.raises(DataError, match="judge 'reward' needs the column 'answer'"):
        rlx.run(**options(dataset=str(path)), dry_run=True)

    class Broken:
        def judge(self, prompts, pairs):
            return [2] * len(pairs)

    with pytest.raises(RewardError, match="judge 'Broken' returned int for pair 0") as caught:
        rlx.run(**options(judge=Broken()))
    assert "data row" in caught.value.where and caught.value.exit_code == 6
