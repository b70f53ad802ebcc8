from __future__ import annotations

import pytest

from rlx.callbacks.health import CHECKS, Health

HEALTHY = {
    "kl": 0.01, "reward": 0.5, "reward/std": 0.3, "completion/eos_rate": 0.9, "reward/unscorable": 0.0,
    "completion/length": 12.0, "entropy": 1.0, "policy/ratio": 1.0, "policy/clip_fraction": 0.1,
}  # fmt: skip
SICK = {
    "negative_kl": {"kl": -0.2},
    "equal_rewards": {"reward/std": 0.0},
    "no_stop": {"completion/eos_rate": 0.0},
    "unscorable": {"reward/unscorable": 0.6},
    "entropy_collapse": {"entropy": 0.01},
    "ratio": {"policy/ratio": 2.0},
    "clipping": {"policy/clip_fraction": 0.7},
}


def log(health, run, times, **changes):
    for step in range(times):
        health.on_log(run, {"step": step, **HEALTHY, **changes})


def test_a_healthy_run_hears_nothing(make_run):
    run, health = make_run(), Health(None)
    log(health, run, 50)
    log(health, run, 50, kl=-0.01)  # noise
    for _ in range(10):
        health.on_log(run, {"step": 1, "eval/reward": 0.0})
    assert run.said == []


def test_entropy_may_fall_where_nothing_is_sampled(make_run):
    run, health = make_run(), Health(None)
    for step in range(10):
        health.on_log(run, {"step": step, "loss": 1.0, "entropy": 1.0 if step == 0 else 0.01})
    assert run.said == []


def test_every_check_has_a_case():
    assert set(SICK) == set(CHECKS)


@pytest.mark.parametrize("name", SICK, ids=lambda name: f"fault[W5] {name}" if name == "unscorable" else name)
def test_each_hint_comes_after_enough_lines_in_a_row_and_only_once(make_run, name):
    run, health, lines = make_run(), Health(None), CHECKS[name].lines
    log(health, run, 1)
    log(health, run, lines - 1, **SICK[name])
    log(health, run, 1)  # healthy again: the count begins anew
    log(health, run, lines - 1, **SICK[name])
    assert run.said == []
    log(health, run, 1, **SICK[name])
    assert len(run.said) == 1 and run.said[0].startswith("hint: ") and "{" not in run.said[0]
    log(health, run, 20, **SICK[name])
    resumed = Health(None)
    resumed.load_state_dict(health.state_dict())
    log(resumed, run, 20, **SICK[name])
    assert len(run.said) == 1


def test_a_metric_that_is_missing_is_no_sickness(make_run):
    run, health = make_run(), Health(None)
    for _ in range(20):
        health.on_log(run, {"step": 1, "loss": 0.0})
    assert run.said == []


def test_the_state_of_a_resumed_run_counts_on(make_run):
    run, health = make_run(), Health(None)
    log(health, run, CHECKS["no_stop"].lines - 1, **SICK["no_stop"])
    resumed = Health(None)
    resumed.load_state_dict(health.state_dict())
    log(resumed, run, 1, **SICK["no_stop"])
    assert len(run.said) == 1
