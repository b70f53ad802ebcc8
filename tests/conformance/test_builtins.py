"""Every built-in component passes the cases of its kind."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from rlx.plugins.contract import KINDS
from rlx.plugins.registry import registry
from rlx.testing import cases, check

DIALOGUE = [
    {
        "chosen": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "no"}],
    }
    for n in range(4)
]
# What a component is built with, where that is not nothing; two folders are made for the test.
CLASSIFIER = "the folder of a classifier"
ADAPTER = "the folder of a classifier's adapter"
GIVEN = {
    "reward contains": {"options": {"keywords": ["12"]}},
    "reward regex": {"options": {"pattern": r"\d+"}},
    "reward overlong": {"options": {"longest": 60, "cache": 20}},
    "reward cosine_length": {"options": {"longest": 60}},
    "reward reward_model": {"options": {"model": CLASSIFIER}},
    "reward lora": {"options": {"path": ADAPTER}},
    "judge reward": {"options": {"rewards": ["length"]}},
    "transform extract_prompt": {"rows": DIALOGUE},
    "transform packing": {"rows": [{"length": length} for length in (7, 5, 3, 9)]},
    "callback best_checkpoint": {"options": {"metric": "eval/loss"}},
    "callback early_stopping": {"options": {"metric": "eval/loss", "patience": 9}},
    "callback win_rate": {"options": {"judge": "random"}},
    "callback sync_ref_model": {"run": {"sync_ref_model": True, "ref_model_sync_steps": 1}},
}
# What speaks to a server is tested where there is one.
ELSEWHERE = {"reward http", "judge openai"}
FAST = {  # of the kinds whose cases train
    "algorithm": lambda case: (
        case not in ("resumes_bit_for_bit", "learns_a_bandit", "two_processes_train_as_one")
    ),
    "callback": lambda case: case in ("hooks_known", "builds", "config_documented", "imports_light"),
}
BUILTINS = [
    f"{kind} {entry.name}"
    for kind in KINDS
    for entry in registry().list(kind)
    if entry.plugin == "rlx" and f"{kind} {entry.name}" not in ELSEWHERE
]


def failures(builtin: str, folders: Mapping[str, str], only: list[str]) -> dict[str, str]:
    kind, name = builtin.split()
    given = GIVEN.get(builtin, {})
    options = {
        key: folders.get(value, value) if isinstance(value, str) else value
        for key, value in given.get("options", {}).items()
    }
    outcomes = check(name, kind, **{**given, "options": options}, only=only)
    assert sum(outcome.status == "ok" for outcome in outcomes) >= min(5, len(only) // 2)
    return {o.case: o.note for o in outcomes if o.status == "failed"}


@pytest.fixture
def folders(classifier: str, adapter: str) -> dict[str, str]:
    """What stands for a folder in ``GIVEN`` → the folder."""
    return {CLASSIFIER: classifier, ADAPTER: adapter}


@pytest.mark.parametrize("builtin", BUILTINS)
def test_it_passes(builtin, folders):
    kind = builtin.split()[0]
    only = [case.name for case in cases(kind) if FAST.get(kind, lambda name: True)(case.name)]
    assert failures(builtin, folders, only) == {}


@pytest.mark.slow
@pytest.mark.parametrize("builtin", [name for name in BUILTINS if name.split()[0] in FAST])
def test_it_passes_those_that_train_too(builtin, folders):
    kind = builtin.split()[0]
    # That two processes train as one is seen of all algorithms at once in tests/algorithms; here of one.
    only = [
        case.name
        for case in cases(kind)
        if not FAST[kind](case.name) and (not case.slow or builtin == "algorithm rloo")
    ]
    assert failures(builtin, folders, only) == {}
