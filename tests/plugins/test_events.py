"""Callbacks are told in order, get what they ask for, and fail as they declared."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import rlx
from rlx.core.settings import Settings
from rlx.plugins.events import Events, global_hooks
from rlx.testing import isolated

RUN = SimpleNamespace(global_step=3)


class Recorder:
    """Notes what it is told."""

    def __init__(self, name, heard):
        self.name, self.heard = name, heard

    @rlx.hookimpl
    def on_step_end(self, metrics):
        self.heard.append((self.name, metrics))


class Everything(rlx.Callback):
    """Implements every event with all, some or none of its arguments."""

    heard = ()

    @rlx.hookimpl
    def on_run_start(self, run):
        return "start", run

    @rlx.hookimpl
    def on_rollouts(self, rollouts, run):
        return rollouts, run

    @rlx.hookimpl
    def on_loss(self, loss):
        return loss

    @rlx.hookimpl
    def on_step_end(self):
        return "no arguments"

    @rlx.hookimpl
    def on_log(self, run, metrics=None):
        return metrics

    @rlx.hookimpl
    def on_evaluate(self, run):
        return {"x": 1.0}

    @rlx.hookimpl
    def on_save(self, path):
        return path

    @rlx.hookimpl
    def on_error(self, error):
        return error

    @rlx.hookimpl
    def on_run_end(self, run):
        return None


@pytest.fixture(autouse=True)
def fresh():
    with isolated():
        yield


def test_a_callback_gets_the_arguments_that_it_names():
    events, error = Events(), ValueError("x")
    events.add(Everything(None))
    assert events.emit("on_run_start", run=RUN) == [("start", RUN)]
    assert events.emit("on_rollouts", run=RUN, rollouts="r") == [("r", RUN)]
    assert events.emit("on_loss", run=RUN, batch="b", loss="l") == ["l"]
    assert events.emit("on_step_end", run=RUN, metrics={}) == ["no arguments"]
    assert events.emit("on_log", run=RUN, metrics={"loss": 1.0}) == [{"loss": 1.0}]  # despite its default
    assert events.emit("on_evaluate", run=RUN) == [{"x": 1.0}]
    assert events.emit("on_save", run=RUN, path="p") == ["p"]
    assert events.emit("on_error", run=RUN, error=error) == [error]
    assert events.emit("on_run_end", run=RUN) == []  # None is left out


@pytest.mark.parametrize("fault", ["P16"], ids=["fault[P16]"])
def test_callbacks_are_called_in_the_order_in_which_they_were_added(fault):
    events, heard = Events(), []

    class First(Recorder):
        @rlx.hookimpl(tryfirst=True)
        def on_step_end(self):
            heard.append(("first", None))

    class Last(Recorder):
        @rlx.hookimpl(trylast=True)
        def on_step_end(self):
            heard.append(("last", None))

    for callback in (Last("", heard), *(Recorder(name, heard) for name in "bac"), First("", heard)):
        events.add(callback)
    events.emit("on_step_end", run=RUN, metrics={})
    assert [name for name, _ in heard] == ["first", "b", "a", "c", "last"]
    assert len(events.callbacks) == 5


@pytest.mark.parametrize("fault", ["P11"], ids=["fault[P11]"])
def test_what_a_callback_does_to_the_metrics_stays_with_it(fault):
    events, heard, line = Events(), [], {"step": 1, "reward": 0.5}

    class Greedy:
        observer = True

        @rlx.hookimpl
        def on_step_end(self, metrics):
            metrics.clear()

    events.add(Greedy())
    events.add(Recorder("next", heard))
    events.emit("on_step_end", run=RUN, metrics=line)
    assert heard == [("next", {"step": 1, "reward": 0.5})] and line == {"step": 1, "reward": 0.5}


def test_processes_agree_around_callbacks_that_wait_for_each_other():
    heard = []

    @contextmanager
    def agreed(run, what):
        heard.append((what, "("))
        yield
        heard.append((what, ")"))

    class Waiting(Recorder):
        collective = True

    alone, several = Events(agreed=agreed), Events(agreed=agreed)
    for callback in (Recorder("a", heard), Waiting("w", heard), Recorder("b", heard), Recorder("c", heard)):
        several.add(callback)
    alone.add(Waiting("w", heard))
    several.emit("on_step_end", run=RUN, metrics={})
    what = "a callback, in on_step_end"
    shown = [name if name != what else given for name, given in heard]
    assert shown == ["(", "a", ")", "w", "(", "b", "c", ")"]
    heard.clear()
    alone.emit("on_step_end", run=RUN, metrics={})  # where the others are missing it is asked as often
    assert [given if name == what else name for name, given in heard] == ["(", ")", "w", "(", ")"]
    heard.clear()
    several.emit("on_save", run=RUN, path="p")  # told on one process alone
    several.emit("on_run_end", run=RUN)
    assert what not in {name for name, _ in heard} and "(" not in {given for _, given in heard}


def test_callbacks_are_added_and_removed_while_a_run_goes():
    events, heard = Events(), []
    late = Recorder("late", heard)

    class Opener:
        @rlx.hookimpl
        def on_step_end(self, run):
            events.remove(self)
            events.add(late)

    events.add(Opener())
    for _ in range(2):
        events.emit("on_step_end", run=RUN, metrics={})
    assert [name for name, _ in heard] == ["late"] and events.callbacks == [late]
    events.remove(late)
    events.emit("on_step_end", run=RUN, metrics={})
    assert len(heard) == 1
    with pytest.raises(ValueError, match="no callback of this run"):
        events.remove(late)


class Misspelt:
    @rlx.hookimpl
    def on_step_edn(self, run):
        pass


class WrongArgument:
    @rlx.hookimpl
    def on_step_end(self, metric):
        pass


class AnyArguments:
    @rlx.hookimpl
    def on_step_end(self, **given):
        pass


class Unmarked:
    def on_step_end(self, run):
        pass


class Wrapper:
    @rlx.hookimpl(wrapper=True)
    def on_step_end(self, run):
        yield


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (Misspelt(), "no hook 'on_step_edn'; did you mean 'on_step_end'?"),
        (WrongArgument(), "no argument 'metric'; did you mean 'metrics'? (it may take run, metrics)"),
        (AnyArguments(), "**given"),
        (Unmarked(), "on_step_end is not marked; write @rlx.hookimpl above it"),
        (Wrapper(), "is a wrapper"),
        (object(), "implements no hook"),
        (Everything, "it is a class; add Everything(…)"),
    ],
    ids=[
        "fault[P4]-event",
        "fault[P3]-argument",
        "fault[P3]-any",
        "fault[P4]-unmarked",
        "wrapper",
        "empty",
        "class",
    ],
)
def test_a_callback_that_could_never_be_called_is_refused(callback, said):
    events = Events()
    with pytest.raises(rlx.PluginError) as caught:
        events.add(callback)
    assert said in caught.value.what and caught.value.exit_code == 4 and events.callbacks == []


def test_the_same_object_is_not_added_twice_but_two_of_a_class_are():
    events, heard = Events(), []
    one, two = Recorder("one", heard), Recorder("two", heard)
    events.add(one)
    events.add(two)
    with pytest.raises(rlx.PluginError, match="added before"):
        events.add(one)
    events.emit("on_step_end", run=RUN, metrics={})
    assert [name for name, _ in heard] == ["one", "two"]


class Failing:
    def __init__(self, error):
        self.error, self.calls = error, 0

    @rlx.hookimpl
    def on_step_end(self, run):
        self.calls += 1
        raise self.error


class Watching(Failing):
    observer = True


@pytest.mark.parametrize("fault", ["P7"], ids=["fault[P7]"])
@pytest.mark.parametrize("error", [KeyError("x"), rlx.DataError("bad row"), AssertionError()], ids=repr)
def test_a_failure_keeps_its_type_and_names_plugin_hook_and_step(fault, error):
    events = Events()
    events.add(Failing(error), "mine")
    with pytest.raises(type(error)) as caught:
        events.emit("on_step_end", run=RUN, metrics={})
    assert caught.value is error
    assert caught.value.__notes__[0].startswith("callback 'mine' of ")
    assert (
        "hook on_step_end, step 3" in caught.value.__notes__[0]
        and "test_events.py" in caught.value.__notes__[0]
    )


def test_the_note_names_the_distribution_of_a_registered_callback():
    rlx.registry().add("callback", "failing", Failing)
    events = Events()
    events.add(Failing(ValueError("x")))
    with pytest.raises(ValueError, match="x") as caught:
        events.emit("on_step_end", run=RUN, metrics={})
    assert f"plugin {__name__.partition('.')[0]!r}" in caught.value.__notes__[0]


@pytest.mark.parametrize("fault", ["P8"], ids=["fault[P8]"])
def test_an_observer_that_fails_is_logged_once_switched_off_and_listed(fault, caplog):
    events, heard, watching = Events(), [], Watching(ValueError("broken pipe\n[31m"))
    events.add(watching, "watching")
    events.add(Recorder("after", heard))
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            events.emit("on_step_end", run=RUN, metrics={})
    assert watching.calls == 1 and len(heard) == 5  # the others go on
    assert len(caplog.records) == 1 and "\n" not in caplog.text.rstrip("\n")
    assert list(events.disabled) == ["watching"] and "ValueError: broken pipe" in events.disabled["watching"]
    assert "step 3" in events.disabled["watching"]


def test_an_interrupt_is_never_swallowed():
    events = Events()
    events.add(Watching(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        events.emit("on_step_end", run=RUN, metrics={})


@pytest.mark.parametrize(
    ("event", "given"),
    [
        ("on_stepend", {"run": RUN}),
        ("on_step_end", {"run": RUN}),
        ("on_save", {"run": RUN, "path": "p", "x": 1}),
    ],
)
def test_emitting_an_event_that_is_not_there_is_a_type_error(event, given):
    with pytest.raises(TypeError, match="emit"):
        Events().emit(event, **given)


class Vetoing:
    @rlx.hookimpl
    def rlx_validate(self, config):
        if config.settings.seed == 13:
            raise rlx.ConfigError("not with me")

    @rlx.hookimpl
    def rlx_load_model(self, spec):
        return None


class Loading:
    @rlx.hookimpl
    def rlx_load_model(self, spec):
        return f"model of {spec}"


class LoadingToo(Loading):
    @rlx.hookimpl
    def rlx_load_model(self, spec):
        raise AssertionError("the first result was not enough")


def test_global_hooks_veto_and_give_the_first_model():
    with isolated(Vetoing(), Loading(), LoadingToo()):
        assert global_hooks().rlx_load_model(spec="s") == "model of s"
        native = SimpleNamespace(ref="native")
        config = SimpleNamespace(
            settings=Settings(seed=12), rewards=[], judge=None, callbacks=[], generator=native
        )
        global_hooks().rlx_validate(config=config)
        config.settings = Settings(seed=13)
        with pytest.raises(rlx.ConfigError, match="not with me") as caught:
            global_hooks().rlx_validate(config=config)
        assert "plugin 'Vetoing'" in caught.value.__notes__[0] and "rlx_validate" in caught.value.__notes__[0]
    assert global_hooks().rlx_load_model(spec="s") is None
