"""Errors that users see: what failed, where, got versus expected, what to do next.

Each error class owns one exit code of the command line; each raise site names a stable code such as
``E-DATA-COLUMN``. Imports nothing but the standard library, so that a config error never waits for torch.
"""

from __future__ import annotations

from typing import ClassVar

from rlx.core.text import safe_text

LONGEST_LINE = 2000  # characters


class RlxError(Exception):
    """An expected failure, told in at most a few lines.

    Args:
        what: one sentence, what failed.
        code: stable identifier, ``E-<AREA>-<FAULT>``.
        where: file and line, data row, plugin and distribution, step, process.
        got: what was found.
        expected: what was needed instead.
        hint: what to do next, a command where one exists.
    """

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "E-INTERNAL"

    def __init__(
        self, what: str, *, code: str = "", where: str = "", got: str = "", expected: str = "", hint: str = ""
    ) -> None:
        self.what = what
        self.code = code or self.default_code
        self.where = where
        self.got = got
        self.expected = expected
        self.hint = hint
        super().__init__(what)

    def lines(self) -> list[str]:
        """The error as the command line prints it, one entry a line; what acts on a terminal is shown."""
        out = [f"[{self.code}] {self.what}"]
        if self.where:
            out.append(f"  where:    {self.where}")
        if self.got:
            out.append(f"  got:      {self.got}")
        if self.expected:
            out.append(f"  expected: {self.expected}")
        if self.hint:
            out.append(f"  do this:  {self.hint}")
        out.extend(f"  note:     {note}" for note in getattr(self, "__notes__", ()))
        return [safe_text(line, LONGEST_LINE) for line in out]

    def __str__(self) -> str:
        return "\n".join(self.lines()[: 1 + sum(map(bool, (self.where, self.got, self.expected, self.hint)))])


class ConfigError(RlxError):
    """A wrong flag, key, value or combination; an unknown registered name; a missing model."""

    exit_code = 2
    default_code = "E-CONFIG"


class DataError(RlxError):
    """A data set that is missing or unfit."""

    exit_code = 3
    default_code = "E-DATA"


class PluginError(RlxError):
    """A plugin that does not import, register or keep its contract."""

    exit_code = 4
    default_code = "E-PLUGIN"


class MemoryExhausted(RlxError):
    """Out of memory at the smallest possible piece of work."""

    exit_code = 5
    default_code = "E-MEMORY"


class RewardError(RlxError):
    """A reward or judge that failed or returned something unusable."""

    exit_code = 6
    default_code = "E-REWARD"


class DivergedError(RlxError):
    """A loss, gradient, weight or log-prob that is not finite."""

    exit_code = 7
    default_code = "E-NONFINITE"


class CheckpointError(RlxError):
    """A checkpoint that does not verify, or a resume that is refused."""

    exit_code = 8
    default_code = "E-CHECKPOINT"


class SaveError(RlxError):
    """Something could not be written: disk full, no permission."""

    exit_code = 9
    default_code = "E-SAVE"


class PeerError(RlxError):
    """Another process of the same run failed."""

    exit_code = 10
    default_code = "E-PEER"


class Interrupted(RlxError):
    """SIGINT or SIGTERM arrived; the run saved a checkpoint first.

    Args:
        what: one sentence.
        signum: the signal's number; the exit code is 128 plus it.
        hint: how to resume.
        where: the checkpoint that was written.
    """

    default_code = "E-INTERRUPTED"

    def __init__(self, what: str, *, signum: int, hint: str = "", where: str = "") -> None:
        super().__init__(what, hint=hint, where=where)
        self.signum = signum
        self.exit_code = 128 + signum  # type: ignore[misc]  # one class, two exit codes: 130 and 143


class ErrorGroup(ConfigError):
    """Several problems found in one pass, told together.

    Args:
        problems: at least one; the exit code is the first one's.
    """

    def __init__(self, problems: list[RlxError]) -> None:
        self.problems = problems
        super().__init__(f"{len(problems)} problems", code=problems[0].code)
        self.exit_code = problems[0].exit_code  # type: ignore[misc]  # the first problem decides

    def lines(self) -> list[str]:
        """All problems, one after another."""
        return [line for problem in self.problems for line in problem.lines()]

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)
