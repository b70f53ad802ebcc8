"""For each case a component that fails that case and no other: the cases find what they are named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlx.plugins.contract import KINDS
from rlx.testing import cases, check

HERE = Path(__file__).parent
TOLD = ("repeatable", "speed", "sides")  # they report, and never fail
COSTLY = ("algorithm", "callback", "generator")  # seconds for all cases of one component


def bad(kind: str, case: str) -> str:
    """The component that fails the case."""
    if case == "imports_light":
        return f"{HERE}/bad_heavy.py:{kind.capitalize()}"
    return f"{HERE}/bad_{kind}s.py:{''.join(word.capitalize() for word in case.split('_'))}"


CASES = [(kind, case.name) for kind in KINDS for case in cases(kind) if case.name not in TOLD]
# Seen to fail in the slow test that runs all cases.
TRAINING = ("resumes_bit_for_bit", "learns_a_bandit", "two_processes_train_as_one")
FAST = [(kind, name) for kind, name in CASES if name not in TRAINING]
ALL = [pytest.param(kind, name, marks=[pytest.mark.slow] if kind in COSTLY else []) for kind, name in CASES]


@pytest.mark.parametrize(("kind", "name"), FAST)
def test_the_bad_one_fails_the_case(kind, name):
    (outcome,) = check(bad(kind, name), kind, only=[name])
    assert outcome.status == "failed" and outcome.note, outcome


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_the_bad_one_fails_no_other(kind, name):
    outcomes = check(bad(kind, name), kind, slow=name.startswith("two_"))
    failed = {outcome.case: outcome.note for outcome in outcomes if outcome.status == "failed"}
    assert list(failed) == [name], failed


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in COSTLY else []) for kind in KINDS]
)
def test_the_good_one_fails_none(kind):
    outcomes = check(f"{HERE}/bad_{kind}s.py:Good", kind)
    assert {outcome.case: outcome.note for outcome in outcomes if outcome.status == "failed"} == {}
    assert sum(outcome.status == "ok" for outcome in outcomes) >= 7


def test_what_a_generator_refuses_has_no_meaning_for_it():
    only = ["draws_as_told", "logprobs_equal_recomputed"]
    told = {o.case: o for o in check(f"{HERE}/bad_generators.py:Refuses", "generator", only=only)}
    assert told["draws_as_told"].status == "not applicable"
    assert told["draws_as_told"].note == "it refuses top_k, top_p, min_p"
    assert told["logprobs_equal_recomputed"].status == "ok"


def test_what_varies_is_told():
    told = {o.case: o for o in check(f"{HERE}/bad_rewards.py:Noisy", "reward")}
    assert told["repeatable"].status == "ok" and "varies by up to 0." in told["repeatable"].note
    assert told["order_follows_input"].note == "its scores vary from call to call"
    assert {o.case for o in told.values() if o.status == "failed"} == set()
