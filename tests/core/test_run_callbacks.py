"""Callbacks that come and go while a run goes: what they hear, in which order, and their state."""

from __future__ import annotations

import json

import pytest

import rlx
from rlx.core.assemble import DEFAULT_CALLBACKS
from rlx.core.run import prepare, reopen, train


class Counting:
    """Writes down what it hears, and counts steps as its state."""

    def __init__(self, name="counting", heard=None):
        self.name, self.heard, self.steps = name, [] if heard is None else heard, 0

    def note(self, what):
        self.heard.append(f"{self.name} {what}")

    @rlx.hookimpl
    def on_run_start(self):
        self.note("start")

    @rlx.hookimpl
    def on_rollouts(self):
        self.note("rollouts")

    @rlx.hookimpl
    def on_loss(self):
        self.note("loss")

    @rlx.hookimpl
    def on_evaluate(self):
        self.note("evaluate")

    @rlx.hookimpl
    def on_log(self):
        self.note("log")

    @rlx.hookimpl
    def on_step_end(self):
        self.note("step")
        self.steps += 1

    @rlx.hookimpl
    def on_save(self):
        self.note("save")

    @rlx.hookimpl
    def on_run_end(self):
        self.note("end")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Other(Counting):
    pass


BUILT_IN = list(DEFAULT_CALLBACKS)
ONE = {"num_mini_batches": 1, "num_ppo_epochs": 1, "eval_steps": 1, "max_steps": 3}


def test_the_events_of_a_step_come_in_this_order(started):
    heard = []
    run = started(**ONE, callback=[Counting("a", heard), Counting("b", heard)])
    with run:
        run.step()
        run.save()
        run.stop()
    each = ["start", "rollouts", "loss", "evaluate", "log", "step", "save", "save", "end"]
    assert heard == [f"{name} {event}" for event in each for name in "ab"]


def test_callbacks_are_told_by_name_in_the_order_in_which_they_were_added(started):
    mine = Counting()
    run = started(callback=[mine])
    assert list(run.callbacks) == [*BUILT_IN, "Counting"] and run.callbacks["Counting"] is mine
    late, another = run.add_callback(Other), run.add_callback(Other("x"))
    assert list(run.callbacks)[-2:] == ["Other", "Other_2"]
    assert (run.callbacks["Other"], run.callbacks["Other_2"]) == (late, another)
    stopping = run.add_callback("early_stopping", metric="eval/reward", patience=2)
    assert run.callbacks["early_stopping"] is stopping and stopping.config.patience == 2
    with pytest.raises(rlx.ConfigError, match="did you mean 'patience'"):
        run.add_callback("early_stopping", metric="loss", patiance=2)
    with pytest.raises(rlx.PluginError, match="added before"):
        run.add_callback(late)


def test_one_that_comes_late_hears_of_the_start_and_one_that_leaves_of_the_end(started):
    heard = []
    first, late = Counting("first", heard), Counting("late", heard)
    run = started(**ONE, callback=[first])
    run.add_callback(Counting("early", heard))  # the run has not begun: it hears of the start with the others
    assert heard == []
    with run:
        assert heard == ["first start", "early start"]
        heard.clear()
        run.add_callback(late)
        assert heard == ["late start"]
        assert run.remove_callback(first) is first
        assert heard[1:] == ["first end"]
        heard.clear()
        run.step()
        run.stop()
    assert set(heard) == {f"{n} {e}" for n in ("early", "late") for e in (
        "rollouts", "loss", "evaluate", "log", "step", "save", "end")}  # fmt: skip
    assert (first.steps, late.steps) == (0, 1)


def test_one_that_fails_at_its_start_is_not_there_and_one_that_fails_at_its_end_is_gone(started):
    class Failing(Counting):
        @rlx.hookimpl
        def on_run_start(self):
            raise RuntimeError("start")

    class Holding(Counting):
        @rlx.hookimpl
        def on_run_end(self):
            raise RuntimeError("end")

    with started(**ONE) as run:
        with pytest.raises(RuntimeError, match="start"):
            run.add_callback(Failing())
        run.add_callback(Holding())
        with pytest.raises(RuntimeError, match="end"):
            run.remove_callback("Holding")
        assert list(run.callbacks) == BUILT_IN
        run.step()
        run.stop()


class Broken(Counting):
    """Fails, while it is broken, once a line of step 2 has been written."""

    broken, ends = True, []

    @rlx.hookimpl
    def on_step_end(self, run):
        self.ends.append(run.global_step)

    @rlx.hookimpl
    def on_log(self, metrics):
        if self.broken and metrics["step"] == 2 and "eval/reward" not in metrics:
            raise OSError("the disk of a callback is full")


def test_a_line_that_was_written_is_not_written_again_after_a_callback_failed(small, monkeypatch):
    monkeypatch.setattr(Broken, "ends", [])
    options = small(max_steps=3, logging_steps=2, callback=[f"{__name__}:Broken"])
    with pytest.raises(OSError, match="is full"):
        train(prepare(**options))
    assert Broken.ends == [1]
    monkeypatch.setattr(Broken, "broken", False)
    run = reopen(options["output_dir"])
    train(run)
    whole = prepare(**options | {"output_dir": "whole"})
    train(whole)

    def steps(run):
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if "time/" not in k and "second" not in k} for line in lines]

    assert [line["step"] for line in steps(run)] == [0, 2, 3] and steps(run) == steps(whole)
    assert Broken.ends == [1, 2, 3, 1, 2, 3]  # of the second step it was told, after the resume


def test_a_run_that_was_stopped_before_its_first_step_can_go_on(small):
    class Stopping:
        @rlx.hookimpl
        def on_log(self, run, metrics):
            run.stop("enough") if metrics["step"] == 0 else None

    options = small(max_steps=2, callback=[Stopping()])
    run = prepare(**options)
    train(run)
    assert (run.global_step, run.saved) == (0, 0)
    again = reopen(run.path, {"callback": []})
    train(again)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2] or [line["step"] for line in lines] == [0, 1, 2]


def test_one_may_leave_in_the_middle_of_an_event(started):
    heard = []

    class Leaving(Counting):
        @rlx.hookimpl
        def on_step_end(self, run):
            run.remove_callback(self)

    with started(**ONE, callback=[Leaving("leaving", heard), Counting("after", heard)]) as run:
        run.step()
        assert heard.count("leaving end") == 1 and heard[-1] == "after step"
        run.step()
        run.stop()
    assert heard.count("leaving rollouts") == 1 and heard.count("after rollouts") == 2


@pytest.mark.parametrize("which", ["Counting", Counting, "object"])
def test_one_is_named_by_its_name_its_class_or_itself(which, started):
    mine = Counting()
    run = started(callback=[mine])
    assert run.remove_callback(mine if which == "object" else which) is mine
    assert list(run.callbacks) == BUILT_IN and mine.heard == []  # the run had not begun
    with pytest.raises(ValueError, match="no callback of this run; there are rich_progress"):
        run.remove_callback(mine)


def test_a_class_of_several_callbacks_names_none(started):
    run = started(callback=[Counting(), Counting()])
    with pytest.raises(ValueError, match="several callbacks: Counting, Counting_2"):
        run.remove_callback(Counting)


def test_a_built_in_that_leaves_gives_back_what_it_holds(started):
    run = started(**ONE, progress="rich")
    with run:
        printers = len(run.printers)
        run.remove_callback("rich_progress")
        assert len(run.printers) == printers - 1 == 1
        run.step()
        run.stop()


def test_the_state_of_others_is_found_though_one_before_them_left(started, small):
    run = started(**ONE, callback=[Other(), Counting()])
    run.remove_callback(Other)
    run.remove_callback("health")
    run.step()
    run.save()
    run.close("interrupted", 130)
    kept = Counting()
    again = reopen(run.path, {"callback": [Other(), kept]})
    assert kept.steps == 1  # by its name; its place has changed
    assert list(again.callbacks) == [*BUILT_IN, "Other", "Counting"]  # as the configuration has them
    assert again.callbacks["Other"].steps == 0  # it was gone, and its state with it
    again.close()


def test_one_that_is_added_again_after_a_resume_takes_its_state_back(started):
    run = started(**ONE)
    run.add_callback(Counting())
    run.step()
    run.save()
    run.close("interrupted", 130)
    again = reopen(run.path)
    assert "Counting" not in again.callbacks
    assert again.add_callback(Counting()).steps == 1
    assert again.add_callback(Counting()).steps == 0  # once
    again.close()


def test_an_observer_that_fails_while_it_leaves_is_gone(started):
    class Failing(Counting):
        observer = True

        @rlx.hookimpl
        def on_run_end(self):
            raise RuntimeError("x")

    with started(**ONE, callback=[Failing()]) as run:
        run.remove_callback("Failing")
        assert "Failing" not in run.callbacks and "RuntimeError" in run.events.disabled["Failing"]
        run.stop()
        run.step()
