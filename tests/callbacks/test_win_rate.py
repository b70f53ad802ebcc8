"""The callback win_rate: what it reports, that nothing else changes by it, and that it survives a resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import rlx
from rlx.core.config import from_mapping
from rlx.core.errors import ConfigError, DataError
from rlx.core.run import reopen, train
from rlx.plugins.datasets.wordmath import WordMath
from rlx.plugins.references import make

SMALL = {
    "algo": "rloo", "reward": "exact_match", "max_steps": 2, "batch_size": 4, "num_generations": 2,
    "num_mini_batches": 1, "max_completion_length": 24, "max_eval_rows": 2, "progress": "none",
    "plots": False, "learning_rate": 1e-3,
}  # fmt: skip
NAMES = {
    "eval/win_rate",
    "eval/win_rate/low",
    "eval/win_rate/high",
    "eval/win_rate/ties",
    "eval/win_rate/no_verdict",
}


def winning(**options):
    return {"name": "win_rate", "rewards": ["exact_match"], "num_prompts": 40, **options}


@pytest.fixture
def go(tmp_path):
    """A function that trains; the folder is named."""
    torch.set_num_threads(1)

    def run(name="run", **options):
        return rlx.run(**{**SMALL, **options}, output_dir=str(tmp_path / name))

    return run


def evaluations(result):
    return [
        {k: v for k, v in line.items() if "win_rate" in k}
        for line in result.metrics
        if "eval/win_rate" in line
    ]


@pytest.fixture
def answered(tmp_path):
    """The held-out problems with a wrong and a right answer beside each."""
    rows = WordMath().rows("test")[:40]
    path = tmp_path / "answered.jsonl"
    for row in rows:
        right = f"Answer: {row['answer']}"
        row |= {"wrong": "Answer: none", "right": [{"role": "assistant", "content": right}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_policy_beats_a_wrong_baseline_and_loses_to_a_right_one(go, answered):
    better = winning(dataset=answered, baseline_column="wrong")
    worse = winning(dataset=answered, baseline_column="right", metric="against_right")
    result = go(max_steps=1, callback=[better, worse])
    for line in (line for line in result.metrics if "eval/win_rate" in line):
        assert line["eval/win_rate"] == 1.0 and line["eval/win_rate/low"] > 0.6
        assert line["eval/against_right"] == 0.0 and line["eval/against_right/high"] < 0.4
        assert line["eval/against_right/no_verdict"] + line["eval/win_rate/no_verdict"] == pytest.approx(1.0)
    kept = (result.folder / "baselines" / "against_right.jsonl").read_text().splitlines()
    assert json.loads(kept[0])["completion"].startswith("Answer: ") and len(kept) == 40


def test_a_policy_against_itself_is_even_and_a_biased_judge_decides_nothing(go):
    itself = winning(num_prompts=200)
    biased = {
        "name": "win_rate",
        "judge": {"name": "random", "first": 1.0},
        "num_prompts": 200,
        "metric": "biased",
    }
    first = go(max_steps=1, callback=[itself, biased]).metrics[0]
    assert first["eval/win_rate/low"] < 0.5 < first["eval/win_rate/high"]
    assert first["eval/biased/low"] < 0.5 < first["eval/biased/high"]
    assert first["eval/biased/no_verdict"] == 0 and first["eval/biased/ties"] == first["eval/win_rate/ties"]


def test_nothing_else_changes_and_a_resume_goes_on_exactly(go, tmp_path):
    def told(result):
        return [
            {k: v for k, v in line.items() if not k.startswith("time/") and "second" not in k}
            for line in result.metrics
        ]

    every = {"eval_steps": 1, "save_steps": 1, "logging_steps": 1}
    without = go("without", **every)
    result = go("with", callback=[winning()], **every)
    assert [{k: v for k, v in line.items() if "win_rate" not in k} for line in told(result)] == told(without)
    for one, other in zip(result.policy.model.parameters(), without.policy.model.parameters(), strict=True):
        assert torch.equal(one, other)
    found = evaluations(result)
    assert len(found) == 3 and all(set(line) == NAMES for line in found)
    assert len({line["eval/win_rate"] for line in found}) > 1  # the policy moved

    shutil.copytree(tmp_path / "with", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-2")
    kept = (tmp_path / "cut" / "baselines" / "win_rate.jsonl").read_text()
    again = train(reopen(tmp_path / "cut"))
    assert told(again) == told(result)
    assert (tmp_path / "cut" / "baselines" / "win_rate.jsonl").read_text() == kept


def test_a_baseline_of_the_first_policy_cannot_be_made_later(go, tmp_path):
    go(max_steps=1, save_steps=1)
    late = {"callback": [winning()], "max_steps": 2}
    with pytest.raises(ConfigError, match="the policy before its first step") as caught:
        rlx.resume(tmp_path / "run", late)
    assert caught.value.got == "step 1" and "baseline_model" in caught.value.hint
    late["callback"] = [winning(baseline_model="tiny")]
    assert "eval/win_rate" in rlx.resume(tmp_path / "run", late).final


def test_another_model_is_the_baseline_and_data_of_other_kinds_have_prompts(go, tmp_path):
    result = go(max_steps=1, callback=[winning(baseline_model="tiny", greedy=True)])
    drawn = (result.folder / "baselines" / "win_rate.jsonl").read_text()
    # At the start the policy is that model: taking the likeliest token, all texts are equal.
    assert evaluations(result)[0] == {
        "eval/win_rate": 0.5, "eval/win_rate/low": 0.0, "eval/win_rate/high": 1.0, "eval/win_rate/ties": 1.0,
        "eval/win_rate/no_verdict": 0.0,
    }  # fmt: skip
    options = {"algo": "dpo", "reward": [], "max_steps": 1, "batch_size": 4, "max_rows": 8}
    pairs = {
        name: value for name, value in SMALL.items() if name not in ("num_generations", "num_mini_batches")
    }
    pairs = rlx.run(**{**pairs, **options}, output_dir=str(tmp_path / "dpo"), callback=[winning(greedy=True)])
    assert len(evaluations(pairs)) == 2
    assert (pairs.folder / "baselines" / "win_rate.jsonl").read_text() == drawn


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"rewards": []}, ConfigError, "nothing says which answer is better"),
        ({"judge": "random"}, ConfigError, "a judge and rewards are both given"),
        ({"rewards": ["exact_matc"]}, ConfigError, "exact_match"),
        ({"baseline_column": "a", "baseline_model": "b"}, ConfigError, "both set"),
        ({"metric": "../x"}, ConfigError, "no name"),
        ({"num_prompts": 0}, ConfigError, "num_prompts"),
    ],
)
def test_options_that_cannot_work_are_refused(options, error, what):
    with pytest.raises(error, match=what):
        make("callback", "win_rate", {key: v for key, v in winning(**options).items() if key != "name"})


def test_wrong_options_are_refused_before_weights_load():
    for options in ({"rewards": []}, {"rewards": ["length"], "judge": "random"}, {"metric": "../x"}):
        with pytest.raises(ConfigError) as caught:
            from_mapping({**SMALL, "callback": [winning(**options)]})
        assert "win_rate" in str(caught.value)


def test_where_training_samples_nothing_answers_are_drawn_at_the_temperature_that_was_asked_for(tmp_path):
    """And log-probs, which no sampling has tempered, are those of the model."""
    pairs = [{"prompt": f"{i} + 1?", "chosen": str(i), "rejected": "no"} for i in range(4)]
    run = rlx.prepare(
        algo="dpo",
        dataset=pairs,
        temperature=0.5,
        progress="none",
        plots=False,
        output_dir=str(tmp_path / "run"),
    )
    assert (run.studio.sampling.temperature, run.studio.temperature) == (0.5, 1.0)
    assert run.updater.settings.temperature == 1.0
    run.close()


def test_two_sources_of_one_metric_are_an_error_of_the_config(go):
    with pytest.raises(ConfigError, match="two report the metric 'eval/reward'"):
        go(callback=[winning(metric="reward", num_prompts=1)])


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"baseline_model": "rows.jsonl"}, ConfigError, "baseline_model of win_rate is a file"),
        ({"baseline_column": "chosen"}, DataError, "needs the column 'chosen'"),
        ({"baseline_column": "number"}, DataError, "holds no answer"),
        ({"rewards": [{"name": "exact_match", "column": "gold"}]}, DataError, "needs the column 'gold'"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_first_step(go, tmp_path, options, error, what):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1?", "answer": "2", "number": 3, "completion": "3"}\n')
    if "baseline_model" in options:
        options = {"baseline_model": str(path)}
    with pytest.raises(error, match=what) as caught:
        go(callback=[winning(dataset=str(path), **options)])
    assert "win_rate" in str(caught.value) + str(caught.value.__notes__)


def test_a_run_without_evaluation_data_has_no_prompts(go, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1?", "answer": "2"}\n' * 4)
    with pytest.raises(ConfigError, match="win_rate has no prompts"):
        go(dataset=str(path), callback=[winning()])


@pytest.mark.slow
def test_two_processes_report_what_one_reports(go, tmp_path):
    words = """run --algo rloo --reward exact_match --callback win_rate --win_rate.rewards exact_match
        --max-steps 1 --win_rate.num-prompts 15 --batch-size 4 --num-generations 2 --num-mini-batches 1
        --max-eval-rows 2 --max-completion-length 24 --plots false --progress none
        --learning-rate 1e-3 --output-dir""".split()
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "rlx",
    ]
    words, env = [*launch, *words, str(tmp_path / "two")], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = go("one", max_steps=1, callback=[winning(num_prompts=15)])
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    both = [{k: v for k, v in line.items() if "win_rate" in k} for line in lines if "eval/win_rate" in line]
    assert both == evaluations(alone) and len(both) == 2
    one, two = (tmp_path / name / "baselines" / "win_rate.jsonl" for name in ("one", "two"))
    assert one.read_text() == two.read_text()
