from __future__ import annotations

import math

import pytest

from rlx.callbacks.completions import LogCompletions
from rlx.callbacks.trackers import Trackers, check_trackers
from rlx.core.errors import ConfigError


@pytest.mark.parametrize("fault", [pytest.param("S16", id="fault[S16]")])
def test_numbers_and_options_go_out_and_no_text_of_a_completion(make_run, rollouts, monkeypatch, fault):
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    calls = []

    class Fake(GeneralTracker):
        name, requires_logging_directory, tracker = "fake", False, None

        def store_init_configuration(self, values):
            calls.append(values)

        def log(self, values, step=None, **kwargs):
            calls.append({"at": step, **values})

        def finish(self):
            calls.append("finished")

    monkeypatch.setattr("accelerate.tracking.filter_trackers", lambda names, folder: [Fake()])
    monkeypatch.setattr("rlx.callbacks.trackers.check_trackers", lambda names: None)
    run = make_run(report_to=["fake"])
    run.accelerator, run.rollouts = Accelerator(), rollouts(["SECRET-COMPLETION"], prompt="SECRET-PROMPT")
    trackers = Trackers(None)
    trackers.on_run_start(run)
    for callback in (trackers, LogCompletions(None)):
        callback.on_log(run, {"step": 3, "reward": 0.5, "kl": math.nan})
    trackers.on_run_end(run)
    assert calls[0]["learning_rate"] == run.config.settings.learning_rate
    assert calls[1:] == [{"at": 3, "reward": 0.5}, "finished"]
    assert "SECRET" not in repr(calls)
    assert "SECRET-COMPLETION" in (run.folder.path / "completions.jsonl").read_text()


def test_nothing_is_tracked_by_default(make_run):
    run = make_run()  # has no accelerator: touching it would fail
    trackers = Trackers(None)
    trackers.on_run_start(run)
    trackers.on_log(run, {"step": 1})
    trackers.on_run_end(run)


def test_an_unknown_or_missing_tracker_is_a_config_error():
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    from accelerate.tracking import get_available_trackers

    missing = [
        name
        for name in ("aim", "swanlab", "dvclive", "clearml")
        if name not in map(str, get_available_trackers())
    ]
    with pytest.raises(ConfigError, match="not installed"):
        check_trackers(missing[:1])
