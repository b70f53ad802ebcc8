"""How a command ends: few lines, the right code, a crash report, no secret and no escape sequence."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from rlx.core import errors
from rlx.core.commands.failure import MOST_LINES, crash_report, told
from rlx.core.commands.main import main
from rlx.core.errors import ConfigError, ErrorGroup, RlxError

JOB = ["run", "--algo", "ppo", "--reward", "exact_match", "--output-dir"]


@pytest.fixture
def training(monkeypatch):
    """Puts a function in the place of the training stack: ``training(lambda config: …)``."""

    def put(body):
        module = types.ModuleType("rlx.core.run")
        module.run = lambda config, *, dry_run=False: body(config)
        module.prepare = body
        monkeypatch.setitem(sys.modules, "rlx.core.run", module)

    return put


def raising(error: BaseException):
    def body(config):
        raise error

    return body


def test_an_internal_error_leaves_a_report(training, tmp_path, capsys):
    folder = tmp_path / "run"

    def body(config):
        (folder / "checkpoint-40").mkdir(parents=True)
        raise AssertionError("impossible: token=hunter2 \x1b[2J")

    training(body)
    assert main([*JOB, str(folder)]) == 1  # fault[C15]
    err = capsys.readouterr().err
    assert "[E-INTERNAL] AssertionError: impossible" in err and "Traceback" not in err
    assert str(folder / "crash.txt") in err and str(folder / "checkpoint-40") in err and "rlx doctor" in err
    report = (folder / "crash.txt").read_text()
    assert "Traceback (most recent call last)" in report and "in body" in report
    for text in (err, report):
        assert "hunter2" not in text and "\x1b" not in text


def test_without_a_run_folder_there_is_no_report(training, tmp_path, capsys):
    training(raising(AssertionError("early")))
    assert main([*JOB, str(tmp_path / "run")]) == 1
    assert not (tmp_path / "run").exists()
    assert "--traceback" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_hides_nothing(tmp_path):
    (tmp_path / "crash.txt").mkdir()
    with pytest.raises(KeyError, match="first") as caught, crash_report(tmp_path):
        raise KeyError("first")
    assert "could not be written" in caught.value.__notes__[0]


def test_an_expected_error_needs_no_report(tmp_path):
    with pytest.raises(ConfigError), crash_report(tmp_path):
        raise ConfigError("x")
    assert list(tmp_path.iterdir()) == []


CODES = {
    "ConfigError": 2, "DataError": 3, "PluginError": 4, "MemoryExhausted": 5, "RewardError": 6,
    "DivergedError": 7,
    "CheckpointError": 8, "SaveError": 9, "PeerError": 10,
}  # fmt: skip


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_every_error_class_has_its_exit_code(name, code, training, tmp_path, capsys):
    training(raising(getattr(errors, name)("it failed", hint="do something")))
    assert main([*JOB, str(tmp_path / "x")]) == code
    assert capsys.readouterr().err.splitlines()[1] == "  do this:  do something"


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143)])
def test_signals_have_their_exit_codes(signum, code, training, tmp_path):
    training(raising(errors.Interrupted("stopped", signum=signum)))
    assert main([*JOB, str(tmp_path / "x")]) == code


def test_an_interrupt_before_training(training, tmp_path, capsys):
    training(raising(KeyboardInterrupt()))
    assert main([*JOB, str(tmp_path / "x")]) == 130
    assert capsys.readouterr().err == "[E-INTERRUPTED] interrupted; nothing was saved\n"


@pytest.mark.parametrize(
    "kind", [type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"}), MemoryError]
)
def test_memory_exhaustion_is_known_by_name(kind, training, tmp_path, capsys):
    training(raising(kind("tried to allocate 2 GiB\nmore lines")))
    assert main([*JOB, str(tmp_path / "x")]) == 5
    assert "--max-tokens-per-micro-batch" in capsys.readouterr().err


def test_another_librarys_error_of_that_name_is_none():
    error = type("OutOfMemoryError", (RuntimeError,), {"__module__": "cuda_sim"})("x")
    assert told(error)[1] == 1


def test_many_problems_fit_into_twelve_lines_and_none_is_lost():
    problems: list[RlxError] = [
        ConfigError(f"unknown option 'x{i}'", where=f"c.yaml:{i}:1") for i in range(40)
    ]
    lines, code = told(ErrorGroup(problems))
    assert len(lines) <= MOST_LINES and code == 2
    text = "\n".join(lines)
    assert "40 problems" in lines[0]
    assert all(f"c.yaml:{i}:1" in text for i in range(40))


def test_three_problems_are_a_line_each():
    problems: list[RlxError] = [
        ConfigError("unknown option 'a'", where="c.yaml:1:1", hint="rlx calls it b"),
        ConfigError("option 'seed' is wrong", where="--seed", expected="whole number"),
        ConfigError("no reward"),
    ]
    assert told(ErrorGroup(problems))[0] == [
        "[E-CONFIG] 3 problems",
        "  c.yaml:1:1: unknown option 'a' (rlx calls it b)",
        "  --seed: option 'seed' is wrong (expected whole number)",
        "  no reward",
    ]


def test_long_and_hostile_parts_stay_within_the_lines():
    error = ConfigError("x" * 5000, got="\x1b[2J\nfake line", where="https://me:pw@host", hint="a\u202eb")
    for i in range(30):
        error.add_note(f"note {i}")
    lines, _ = told(error)
    assert len(lines) <= MOST_LINES and max(map(len, lines)) < 700
    text = "\n".join(lines)
    assert (
        "\x1b" not in text
        and "\u202e" not in text
        and "pw" not in text
        and len(text.splitlines()) == len(lines)
    )


def test_notes_of_a_plugin_are_told():
    error = ZeroDivisionError("division by zero")
    error.add_note("plugin acme 1.0, hook on_step_end, step 3")
    assert "  note:     plugin acme 1.0, hook on_step_end, step 3" in told(error)[0]


def test_the_folder_of_a_test_is_left_alone(tmp_path: Path):
    with crash_report(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
