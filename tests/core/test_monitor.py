"""One metric watched: which way is better, what counts, and a name that no line has."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from rlx.core.errors import ConfigError
from rlx.core.monitor import Monitor, direction
from rlx.plugins.events import Events
from rlx.plugins.hookspecs import hookimpl

TRAINED, EVALUATED = {"step": 1, "loss": 0.5, "reward": 1.0}, {"step": 0, "eval/reward": 0.4}


class Judging:
    """Evaluates by itself."""

    @hookimpl
    def on_evaluate(self):
        return {"eval/win_rate": 0.5}


def a_run(eval_data=None, rewards=(), callbacks=(), evaluations=0):
    """What a monitor looks at."""
    events = Events()
    for callback in callbacks:
        events.add(callback)
    runner = SimpleNamespace(rewards=[SimpleNamespace(name=name) for name in rewards]) if rewards else None
    studio = SimpleNamespace(rewards=runner)
    return SimpleNamespace(eval_data=eval_data, events=events, studio=studio, evaluations=evaluations)


HELD_OUT, NONE = a_run([1]), a_run()


@pytest.mark.parametrize(
    ("metric", "way"),
    [
        ("reward", "max"),
        ("eval/reward", "max"),
        ("reward/exact_match", "max"),
        ("eval/rewards/accuracies", "max"),
        ("rewards/margins", "max"),
        ("mean_token_accuracy", "max"),
        ("loss", "min"),
        ("eval/loss", "min"),
        ("loss/value", "min"),
        ("time/update", None),
        ("kl", None),
        ("reward/std", None),
        ("rewards/chosen", None),
        ("reward/exact_match/errors", None),  # a reward's name, and errors
        ("completion/length", None),
    ],
)
def test_a_name_says_which_way_is_better_or_nothing(metric, way):
    assert direction(metric) == way


def test_a_name_that_says_nothing_needs_a_mode():
    with pytest.raises(ValueError, match="'kl' is better high or low is not clear"):
        Monitor("kl", "auto", "me")
    assert not Monitor("kl", "min", "me").higher and Monitor("kl", "max", "me").higher


def test_better_is_by_more_than_the_least_change_and_never_nan():
    up, down = Monitor("reward", "auto", "me"), Monitor("loss", "auto", "me")
    assert up.better(0.0, None) and up.better(0.25, 0.0) and not up.better(0.25, 0.25)
    assert up.better(0.75, 0.25, by=0.25) and not up.better(0.5, 0.25, by=0.25)  # exactly 0.25 is not more
    assert down.better(0.25, 0.75, by=0.25) and not down.better(0.75, 0.25)
    for value in (math.nan, math.inf, -math.inf):
        assert not up.better(value, None) and not down.better(value, 0.0)
    assert up.reaches(0.5, 0.5) and not up.reaches(0.4, 0.5) and down.reaches(0.4, 0.5)
    assert not up.reaches(math.nan, 0.5) and not down.reaches(math.nan, 0.5)


def test_a_line_without_the_metric_is_passed_over_as_long_as_it_may_still_come():
    watch = Monitor("eval/reward", "auto", "me")
    assert watch.read(HELD_OUT, TRAINED) is None  # by hand, nothing is evaluated before the first step
    assert watch.read(HELD_OUT, EVALUATED) == 0.4
    assert watch.read(HELD_OUT, TRAINED) is None
    watch = Monitor("loss", "auto", "me")
    assert watch.read(HELD_OUT, EVALUATED) is None
    assert watch.read(HELD_OUT, TRAINED) == 0.5


def test_a_reward_that_scored_nothing_so_far_is_waited_for():
    """A line has no mean of it then; FAULTS tolerate iterations without a score."""
    unscored = [{"step": 0, "eval/completion/length": 9.0}, {"step": 1, "completion/length": 9.0}]
    for metric in ("reward", "reward/strict", "eval/reward", "eval/reward/strict"):
        watch, run = Monitor(metric, "max", "me"), a_run([1], ["strict"])
        assert [watch.read(run, line) for line in unscored] == [None, None]
        assert watch.read(run, {"step": 2, metric: 0.5}) == 0.5
    for metric, run in (
        ("reward/strickt", a_run([1], ["strict"])),
        ("reward", a_run([1])),
        ("eval/reward", a_run(None, ["strict"])),
    ):
        watch = Monitor(metric, "max", "me")
        with pytest.raises(ConfigError, match="logs no metric"):
            [watch.read(run, line) for line in unscored]


def test_a_metric_of_an_evaluation_is_waited_for_where_a_callback_evaluates():
    watch = Monitor("eval/win_rate", "max", "me")
    assert watch.read(a_run(callbacks=[Judging()]), TRAINED) is None
    with pytest.raises(ConfigError, match="logs no metric"):  # it evaluated, and had nothing to say
        watch.read(a_run(callbacks=[Judging()], evaluations=1), TRAINED)
    with pytest.raises(ConfigError, match="logs no metric"):
        watch.read(NONE, TRAINED)


@pytest.mark.parametrize(
    ("metric", "run", "lines", "near", "hint"),
    [
        ("eval/rewrd", HELD_OUT, [EVALUATED], "did you mean 'eval/reward'?", ""),
        ("eval/loss", NONE, [TRAINED], "", "--eval-dataset"),
        ("loss/value", NONE, [TRAINED], "", ""),
        ("loss/value", HELD_OUT, [EVALUATED, TRAINED], "", ""),
        ("loss/value", HELD_OUT, [TRAINED, EVALUATED], "", ""),
    ],
)
def test_a_metric_that_no_line_has_is_an_error_that_lists_those_that_are(metric, run, lines, near, hint):
    watch = Monitor(metric, "max", "me")
    for line in lines[:-1]:
        assert watch.read(run, line) is None
    with pytest.raises(ConfigError, match="me: this run logs no metric") as caught:
        watch.read(run, lines[-1])
    seen = sorted({name for line in lines for name in line} - {"step"})
    assert caught.value.got == ", ".join(seen) and near in caught.value.what and hint in caught.value.hint
