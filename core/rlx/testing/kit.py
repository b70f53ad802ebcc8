"""The conformance kit: named cases for each kind of component, run one by one or through pytest.

A case is a function that takes the ``Subject`` and raises ``AssertionError`` where the subject does not keep
the contract, ``NotApplicable`` where the case has no meaning for it; what it returns is a note for the table.
A case that builds on another one (``after``) is not run where that one failed: one fault, one failure.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlx.core.errors import ConfigError, ErrorGroup, PluginError
from rlx.core.options import build, close
from rlx.plugins import references
from rlx.plugins.contract import KINDS
from rlx.plugins.kinds import kind_of

Rows = Sequence[Mapping[str, Any]]
Check = Callable[["Subject"], "str | None"]
USAGE = ("E-CONFIG-MISSING", "E-CONFIG-UNKNOWN", "E-CONFIG-VALUE")


class NotApplicable(Exception):
    """A case has no meaning for a component; the text says why."""


@dataclass(frozen=True)
class Case:
    """One thing that holds of every component of a kind.

    Attributes:
        kind: of the components that it is for.
        name: what it checks, in snake case; the id of its test.
        doc: one sentence.
        run: raises AssertionError where it does not hold, NotApplicable where it has no meaning.
        after: cases that it builds on.
        slow: it takes seconds, or processes of its own; run only when asked for.
    """

    kind: str
    name: str
    doc: str
    run: Check = field(repr=False)
    after: tuple[str, ...] = ()
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        case: its name.
        status: ``ok``, ``failed``, ``not applicable``, or ``not run``: slow, or it builds on one that failed.
        note: why, or a figure that the case reports.
        seconds: that it took.
        error: what was raised, of a case that failed.
    """

    case: str
    status: str
    note: str
    seconds: float
    error: BaseException | None = None


class Subject:
    """A component under test.

    Args:
        thing: a reference, a class, a function or an instance.
        kind: one of ``rlx.plugins.contract.KINDS``.
        options: those it is built with.
        rows: sample rows with the columns that it reads, for a reward or transform whose columns the kit
            cannot make up.
        run: core options of the runs that an algorithm or callback is tried in.
    """

    def __init__(
        self,
        thing: Any,
        kind: str,
        options: Mapping[str, Any] | None = None,
        rows: Rows | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self.thing, self.kind, self.options, self.run = thing, kind, dict(options or {}), dict(run or {})
        self.rows = None if rows is None else [dict(row) for row in rows]
        self._kept: dict[Any, Any] = {}
        self._outcomes: dict[str, Outcome] = {}

    @property
    def shown(self) -> str:
        """Its name for messages."""
        return references.describe(self.kind, self.thing)

    def component(self) -> Any:
        """The class, function or instance itself."""
        return references.resolve(self.kind, self.thing)

    def check_options(self) -> None:
        """Refuse options that the component does not have, or lacks: that is no fault of the component.

        Raises:
            ConfigError: with every such option.
        """
        component = self.component()
        if not isinstance(component, type) or not hasattr(component, "Config"):
            return
        try:
            build(component.Config, self.options, owner=f"{self.kind} {self.shown}")
        except ConfigError as error:
            found = error.problems if isinstance(error, ErrorGroup) else [error]
            for problem in found:
                if problem.code == "E-CONFIG-MISSING" and not problem.hint:
                    problem.hint = "give it: --option NAME=VALUE, or options={…} in Python"
            if any(problem.code in USAGE for problem in found):
                raise
        except (TypeError, NameError, PluginError):
            return  # Config is not declared properly: a case of its own

    def make(self) -> Any:
        """A new one, built with its options."""
        return references.make(self.kind, self.thing, self.options)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for all cases."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def outcome(self, case: Case) -> Outcome:
        """Run a case, and before it those that it builds on; each once."""
        if case.name not in self._outcomes:
            began = time.perf_counter()
            status, note, error = self._run(case)
            self._outcomes[case.name] = Outcome(case.name, status, note, time.perf_counter() - began, error)
        return self._outcomes[case.name]

    def failures(self) -> list[Outcome]:
        """The cases that failed so far."""
        return [outcome for outcome in self._outcomes.values() if outcome.status == "failed"]

    def _run(self, case: Case) -> tuple[str, str, BaseException | None]:
        for name in case.after:
            before = self.outcome(find(self.kind, name))
            if before.status == "failed":
                return "not run", f"{name} failed", None
            if before.status == "not run":
                return before.status, before.note, None
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a run's hints about its options are of no interest here
                return "ok", case.run(self) or "", None
        except NotApplicable as reason:
            return "not applicable", str(reason), None
        except (Exception, SystemExit) as error:  # a plugin may raise anything; it is what is looked for
            if printed.getvalue():
                error.add_note(f"it printed:\n{printed.getvalue()[-2000:]}")
            first = str(error).strip().splitlines() or [""]
            note = first[0] if isinstance(error, AssertionError) else f"{type(error).__name__}: {first[0]}"
            return "failed", note, error


_CASES: dict[str, list[Case]] = {kind: [] for kind in KINDS}


def case(*kinds: str, after: Sequence[str] = ("builds",), slow: bool = False) -> Callable[[Check], Check]:
    """Make a function a case of some kinds, in the order of definition.

    Args:
        kinds: of the components.
        after: cases that it builds on.
        slow: run it only when asked for.
    """

    def add(run: Check) -> Check:
        doc = (run.__doc__ or "").strip().splitlines()[0]
        for kind in kinds:
            _CASES[kind].append(Case(kind, run.__name__, doc, run, tuple(after), slow))
        return run

    return add


def cases(kind: str) -> list[Case]:
    """The named cases of a kind, in the order in which they run.

    Args:
        kind: one of ``algorithm, reward, transform, callback, generator, judge, dataset``.

    Raises:
        ConfigError: for another kind.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"there is no kind {kind!r}{close(kind, KINDS)}", code="E-CONFIG-KIND", expected=", ".join(KINDS)
        )
    for module in ("every", kind, *(["run"] if kind == "algorithm" else [])):
        importlib.import_module(f"rlx.testing.{module}_cases")
    return list(_CASES[kind])


def find(kind: str, name: str) -> Case:
    """The case of a kind called ``name``.

    Raises:
        ConfigError: there is none.
    """
    found = {one.name: one for one in cases(kind)}
    if name not in found:
        raise ConfigError(
            f"there is no case {name!r} for a {kind}{close(name, list(found))}",
            code="E-CONFIG-CASE",
            expected=", ".join(found),
        )
    return found[name]


def check(
    thing: Any,
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    rows: Rows | None = None,
    run: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
    slow: bool = False,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the cases of a component's kind on it.

    Args:
        thing: a reference, a class, a function or an instance.
        kind: its kind; by default found from its name or its shape.
        options: those it is built with.
        rows: sample rows with the columns that a reward or transform reads; by default the kit makes some up.
        run: core options of the runs that an algorithm or callback is tried in.
        only: names of the cases to run; by default all.
        slow: run the slow ones too.
        told: called after each case.

    Returns:
        One outcome a case; slow ones that were not asked for are ``not run``. With ``only``, also that of a
        case which one of them builds on, if it failed.

    Raises:
        ConfigError: the kind is not clear, a case does not exist, or the name is unknown.
        PluginError: the reference does not load.
    """
    kind = kind or kind_of(thing)
    chosen = [find(kind, name) for name in only] or cases(kind)
    subject, outcomes = _subject(Subject(thing, kind, options, rows, run)), []
    for one in chosen:
        if one.slow and not (slow or only):
            outcomes.append(Outcome(one.name, "not run", "slow; --slow or --only runs it", 0.0))
        else:
            mine, names = subject.outcome(one), {outcome.case for outcome in outcomes}
            before = [o for o in subject.failures() if o.case not in names and o.case != one.name]
            outcomes += [*before, mine]
            for outcome in before:
                told(outcome)
        told(outcomes[-1])
    return outcomes


def _subject(subject: Subject) -> Subject:
    with contextlib.suppress(PluginError):  # it does not load, or lacks a member: a case of its own
        subject.check_options()
    return subject


def conformance(
    thing: Any,
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    rows: Rows | None = None,
    run: Mapping[str, Any] | None = None,
    slow: bool = False,
) -> Callable[..., None]:
    """A parametrised pytest function with one test a case, for a module-level ``test_conformance``.

    The tests are called after the cases: ``test_conformance[order_follows_input]``. Those that have no
    meaning for the component are skipped with the reason.

    Args:
        thing: a reference, a class, a function or an instance.
        kind: its kind; by default found from its name or its shape.
        options: those it is built with.
        rows: sample rows with the columns that a reward or transform reads; by default the kit makes some up.
        run: core options of the runs that an algorithm or callback is tried in.
        slow: with the slow cases.

    Raises:
        ConfigError: the kind is not clear, or the name is unknown.
        PluginError: the reference does not load.
    """
    import pytest

    kind = kind or kind_of(thing)
    subject = _subject(Subject(thing, kind, options, rows, run))
    chosen = [one for one in cases(kind) if slow or not one.slow]

    @pytest.mark.parametrize("case", chosen, ids=[one.name for one in chosen])
    def test_conformance(case: Case) -> None:
        outcome = subject.outcome(case)
        if outcome.error is not None:
            raise outcome.error
        if outcome.status != "ok":
            pytest.skip(outcome.note)

    return test_conformance
