"""A run ends at a step when a metric gets no better; the state survives a resume."""

from __future__ import annotations

import json
import math

import pytest

import rlx
from rlx.callbacks.early_stopping import EarlyStopping

Config = EarlyStopping.Config


def fed(run, stopping, values, name="eval/reward", start=0):
    """The step at which the run was stopped while it logged these values, one a step; None if it was not."""
    for step, value in enumerate(values, start):
        if run.stop_reason:
            return step - 1
        stopping.on_log(run, {"step": step, name: value})
    return start + len(values) - 1 if run.stop_reason else None


@pytest.mark.parametrize(
    ("options", "values", "stopped", "reason"),
    [
        ({}, [0.4, 0.5, 0.6, 0.7], None, ""),
        # Best at step 1; 2, 3 and 4 are no better: three in a row.
        (
            {},
            [0.4, 0.5, 0.5, 0.3, 0.5, 0.9],
            4,
            "3 times in a row eval/reward was no better than 0.5 of step 1",
        ),
        ({}, [0.4, 0.3, 0.3, 0.5, 0.4, 0.4], None, ""),  # step 3 begins the count anew
        ({"patience": 1}, [0.4, 0.5, 0.4], 2, "1 times in a row"),
        # 0.5 → 0.55 → 0.65: against the best one, not against the one before, 0.65 is 0.15 more.
        ({"min_delta": 0.125, "patience": 2}, [0.5, 0.55, 0.65, 0.7, 0.7], 4, "0.65 of step 2 by 0.125"),
        ({"threshold": 0.6}, [0.4, 0.5, 0.6, 0.9], 2, "eval/reward 0.6 reached the threshold 0.6"),
        ({"mode": "min", "patience": 2}, [0.4, 0.5, 0.6], 2, "0.4 of step 0"),
        ({"patience": 2}, [math.nan, math.nan], 1, "it was never finite"),
        ({"patience": 2}, [0.1, math.nan, math.inf], 2, "0.1 of step 0"),
    ],
)
def test_it_stops_at_the_step_and_says_why(make_run, options, values, stopped, reason):
    run = make_run()
    assert fed(run, EarlyStopping(Config(metric="eval/reward", **options)), values) == stopped
    assert reason in run.stop_reason


def test_what_it_counted_of_another_metric_is_forgotten():
    one = EarlyStopping(Config(metric="eval/reward"))
    one._best, one._waited = 0.9, 2
    same, other = EarlyStopping(Config(metric="eval/reward")), EarlyStopping(Config(metric="loss"))
    for callback in (same, other):
        callback.load_state_dict(one.state_dict())
    assert (same._best, same._waited) == (0.9, 2) and (other._best, other._waited) == (None, 0)


def test_a_loss_is_better_low_and_lines_without_it_do_not_count(make_run):
    run, stopping = make_run(), EarlyStopping(Config(metric="loss", patience=2))
    for step, line in enumerate(
        [{"loss": 3.0}, {"eval/x": 1.0}, {"loss": 2.0}, {"eval/x": 1.0}, {"loss": 2.5}]
    ):
        stopping.on_log(run, {"step": step, **line})
    assert not run.stop_reason
    stopping.on_log(run, {"step": 9, "loss": 2.0})
    assert "2 of step 2" in run.stop_reason


def test_the_state_of_a_resumed_run_counts_on(make_run):
    values = [0.5, 0.6, 0.5, 0.5, 0.5]
    for cut in range(len(values)):
        run, first, second = (
            make_run(),
            EarlyStopping(Config(metric="reward")),
            EarlyStopping(Config(metric="reward")),
        )
        fed(run, first, values[:cut], "reward")
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert fed(run, second, values[cut:], "reward", start=cut) == 4
        run.folder.close()


def test_a_metric_whose_name_does_not_say_which_way_is_better_is_refused_before_weights_load():
    with pytest.raises(rlx.ConfigError, match="'kl' is better high or low is not clear; set mode"):
        rlx.run(reward="length", callback={"name": "early_stopping", "metric": "kl"}, dry_run=True)
    with pytest.raises(rlx.ConfigError, match="needs the option 'metric'"):
        rlx.run(reward="length", callback="early_stopping", dry_run=True)


def run_of(folder, **changes):
    """Options of a run of tiny steps whose held-out reward nothing can raise."""
    stopping = {"name": "early_stopping", "metric": "eval/reward", "patience": 2}
    options = dict(
        reward="exact_match", max_rows=8, max_eval_rows=4, batch_size=2, num_generations=1, num_ppo_epochs=1,
        num_mini_batches=1, max_completion_length=4, max_steps=6, eval_steps=1, learning_rate=0.0,
        value_learning_rate=..., plots=False, progress="none", log_completions=0, callback=[stopping],
        output_dir=str(folder),
    )  # fmt: skip
    return {name: value for name, value in {**options, **changes}.items() if value is not ...}


def ended(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["status"], manifest["exit"], manifest.get("stopped", "")


def test_a_run_ends_well_before_its_last_step_and_stays_finished(tmp_path, capsys):
    result = rlx.run(**run_of(tmp_path / "run"))
    assert [line["step"] for line in result.metrics] == [0, 1, 2]  # 0 is best; 1 and 2 are no better
    reason = "early_stopping: 2 times in a row eval/reward was no better than 0 of step 0"
    assert capsys.readouterr().out.splitlines()[-1] == f"stopped after step 2 of 6: {reason}"
    assert ended(tmp_path / "run") == ("finished", 0, reason)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert rlx.resume(tmp_path / "run").plan[0].endswith("nothing is left to do")
    # No save_steps: the checkpoint of the step at which it was stopped is there all the same.
    further = rlx.resume(tmp_path / "run", {"max_steps": 8})
    assert [line["step"] for line in further.metrics] == [0, 1, 2, 3]


def test_a_run_that_a_callback_stops_between_evaluations_is_evaluated_at_its_end(tmp_path):
    stopping = {"name": "early_stopping", "metric": "completion/length", "mode": "max", "threshold": 1}
    result = rlx.run(**run_of(tmp_path / "run", eval_steps=..., callback=[stopping]))
    assert [line["step"] for line in result.metrics] == [0, 1, 1]
    assert "loss" in result.metrics[1] and "eval/reward" in result.final and "loss" not in result.final


def test_a_run_cut_off_anywhere_stops_at_the_same_step(tmp_path):
    whole = rlx.run(**run_of(tmp_path / "whole"))
    run = rlx.prepare(**run_of(tmp_path / "cut", save_steps=1))
    run.log({"eval/reward": 0.0})  # what rlx.run measures before the first step
    run.step()
    run.save()
    run.close("interrupted", 130)
    assert rlx.resume(tmp_path / "cut").metrics[-1]["step"] == whole.final["step"] == 2
    assert ended(tmp_path / "cut") == ended(tmp_path / "whole")


def test_a_run_that_was_interrupted_in_the_step_that_stops_it_does_not_go_on(tmp_path):
    run = rlx.prepare(**run_of(tmp_path / "run"))
    run.log({"eval/reward": 0.0})
    run.step(), run.step()
    assert run.stopping
    run.save()
    run.close("interrupted", 130)
    assert rlx.resume(tmp_path / "run").metrics[-1]["step"] == 2
    assert ended(tmp_path / "run")[2].startswith("early_stopping")
    # Asked for more, it goes on, and what it waited for is remembered: the next one is one too many.
    assert rlx.resume(tmp_path / "run", {"max_steps": 9}).metrics[-1]["step"] == 3


@pytest.mark.parametrize(
    ("metric", "changes", "near"),
    [
        ("eval/rewrd", {}, "did you mean 'eval/reward'?"),
        ("eval/reward", {"dataset": [{"prompt": "1 + 1", "answer": "2"}] * 4}, "--eval-dataset"),
    ],
)
def test_an_unknown_metric_ends_the_run_at_once_and_lists_those_that_exist(tmp_path, metric, changes, near):
    stopping = {"name": "early_stopping", "metric": metric, "mode": "max"}
    with pytest.raises(rlx.ConfigError, match="this run logs no metric") as caught:
        rlx.run(**run_of(tmp_path / "run", callback=[stopping], max_steps=2, logging_steps=1, **changes))
    assert caught.value.exit_code == 2 and near in str(caught.value)
    assert ("eval/completion/length" if "did" in near else "grad_norm") in caught.value.got
