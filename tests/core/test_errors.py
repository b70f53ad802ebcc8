"""Every error class owns an exit code and tells what, where, got, expected and what to do."""

import pytest

from rlx.core import errors

CODES = {
    "RlxError": 1, "ConfigError": 2, "DataError": 3, "PluginError": 4, "MemoryExhausted": 5, "RewardError": 6,
    "DivergedError": 7, "CheckpointError": 8, "SaveError": 9, "PeerError": 10,
}  # fmt: skip


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes_are_the_documented_ones(name, code):
    assert getattr(errors, name)("x").exit_code == code


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143)])
def test_a_signal_decides_the_exit_code(signum, code):
    assert errors.Interrupted("stopped", signum=signum).exit_code == code


def test_all_parts_are_told_in_order():
    error = errors.DataError(
        "a column is missing",
        code="E-DATA-COLUMN",
        where="a.jsonl:3",
        got="q",
        expected="prompt",
        hint="--columns",
    )
    error.add_note("plugin x")
    assert error.lines() == [
        "[E-DATA-COLUMN] a column is missing",
        "  where:    a.jsonl:3",
        "  got:      q",
        "  expected: prompt",
        "  do this:  --columns",
        "  note:     plugin x",
    ]
    assert str(error) == "\n".join(error.lines()[:-1])  # Python's own traceback prints notes itself


def test_parts_that_are_empty_are_left_out():
    assert errors.ConfigError("x").lines() == ["[E-CONFIG] x"]


def test_a_group_tells_all_and_takes_the_first_code():
    group = errors.ErrorGroup([errors.DataError("a"), errors.ConfigError("b", where="here")])
    assert group.lines() == ["[E-DATA] a", "[E-CONFIG] b", "  where:    here"]
    assert group.exit_code == 3
    assert isinstance(group, errors.RlxError)
