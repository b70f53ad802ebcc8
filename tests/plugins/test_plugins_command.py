"""``rlx plugins list`` and ``info``, in fresh interpreters with plugins that are installed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time

import pytest

CLASH = """
import rlx

@rlx.hookimpl
def rlx_register(registry):
    registry.add("reward", "brevity", "rlx_clash:brevity")

def brevity(completions, **columns): ...
"""
BROKEN = "import rlx\nraise ImportError('no libfoo\\x1b[31m')\n"


@pytest.fixture
def rlx_plugins(tmp_path, site, pip_site):
    """Run ``rlx plugins …`` with a good plugin, one that clashes, a broken one and one for another API."""
    site.install("clash", CLASH)
    site.install("broken", BROKEN)
    site.install("future", "", group="rlx.v2")

    def run(*arguments, expect=0, **env):
        path = os.pathsep.join([str(site.path), str(pip_site)])
        done = subprocess.run(
            [sys.executable, "-m", "rlx", "plugins", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, **env},
            timeout=60,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout if expect == 0 else done.stderr

    return run


def test_list_shows_components_plugins_and_what_is_broken(rlx_plugins):
    shown = rlx_plugins("list")
    for part in (
        "ppo",
        "good/brevity",
        "clash/brevity",
        "rlx-good 1.2.3",
        "rlx-broken 0.1",
        "no libfoo",
        "needs plugin API 2, this rlx has 1",
        "plugin/name",
    ):
        assert part in shown
    assert "\x1b" not in shown
    only = json.loads(rlx_plugins("list", "--kind", "reward", "--json"))
    assert {entry["kind"] for entry in only["components"]} == {"reward"}
    assert {broken["name"] for broken in only["broken"]} == {"broken", "future"}
    good = next(entry for entry in only["components"] if entry["plugin"] == "good")
    assert good == {
        "kind": "reward",
        "name": "brevity",
        "plugin": "good",
        "distribution": "rlx-good",
        "version": "1.2.3",
        "summary": "shorter is better",
        "target": "rlx_good.rewards:Brevity",
    }


def test_blocked_plugins_are_said_to_be(rlx_plugins):
    shown = rlx_plugins("list", RLX_NO_PLUGINS="broken,rlx-future")
    assert "Not loaded" in shown and "broken" in shown and "no libfoo" not in shown


def test_info_shows_everything_about_an_option(rlx_plugins):
    shown = rlx_plugins("info", "good/brevity")
    for part in (
        "reward brevity",
        "rlx_good.rewards:Brevity",
        "rewards.py:",
        "rlx-good",
        "1.2.3",
        "scale",
        "number, default 0.1, > 0, 1/character",
        "what a character costs (a test)",
    ):
        assert part in shown
    data = json.loads(rlx_plugins("info", "rlx.rewards.length:Length", "--json"))
    assert data["kind"] == "reward" and data["file"].endswith("length.py:13")
    side = next(option for option in data["options"] if option["name"] == "side")
    assert side["default"] == "both" and side["choices"] == ["both", "over", "under"] and not side["required"]


def test_info_of_a_reference_names_the_distribution_that_it_leads_to(rlx_plugins, tmp_path):
    installed = json.loads(rlx_plugins("info", "reward", "rlx_good.rewards:Brevity", "--json"))
    assert (installed["distribution"], installed["version"]) == ("rlx-good", "1.2.3")
    assert installed["file"].endswith("rewards.py:7") and installed["options"][0] == {
        "name": "scale", "type": "number", "default": 0.1, "required": False, "bounds": "> 0", "choices": [],
        "unit": "1/character", "source": "a test", "doc": "what a character costs",
    }  # fmt: skip
    (tmp_path / "mine.py").write_text("def brevity(completions): ...\n")
    shown = rlx_plugins("info", "./mine.py:brevity")
    assert "mine.py:1" in shown and "distribution" not in shown and "no options" in shown


def test_info_takes_the_kind_before_the_name(rlx_plugins):
    assert rlx_plugins("info", "algorithm", "reward").startswith("algorithm reward")
    assert rlx_plugins("info", "reward", "--kind", "algorithm").startswith("algorithm reward")
    assert "there is no reward 'reward'" in rlx_plugins("info", "reward", "reward", expect=2)
    assert "there is no kind 'rewrd'; did you mean 'reward'" in rlx_plugins(
        "info", "rewrd", "length", expect=2
    )
    assert "there is no kind 'rewrd'" in rlx_plugins("info", "rewrd", "rlx.rewards.length:Length", expect=2)
    assert "[KIND] REF" in rlx_plugins("info", "reward", "length", "more", expect=2)
    assert "[KIND] REF" in rlx_plugins("info", "reward", "length", "--kind", "callback", expect=2)


def test_info_of_a_broken_plugin_shows_its_traceback(rlx_plugins):
    shown = rlx_plugins("info", "broken")
    assert "raise ImportError" in shown and "rlx_broken.py" in shown and "\x1b" not in shown


def test_info_tells_what_is_wrong_with_exit_codes(rlx_plugins):
    assert "did you mean 'length'" in rlx_plugins("info", "lenght", expect=2)
    assert "2 plugins offer" in rlx_plugins("info", "brevity", expect=2)
    assert "'broken' failed to load" in rlx_plugins("info", "broken/anything", expect=4)
    assert "no module 'nowhere'" in rlx_plugins("info", "nowhere:X", expect=4)


def test_list_answers_without_torch_and_at_once(rlx_plugins):
    def cpu(run):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    env = {**os.environ, "PYTHONPATH": ""}
    bare = min(cpu(lambda: subprocess.run([sys.executable, "-c", ""], env=env)) for _ in range(3))
    started = time.monotonic()
    spent = min(cpu(lambda: rlx_plugins("list")) for _ in range(3)) - bare
    slow = max(1.0, bare / 0.03)  # a machine on which an interpreter that does nothing takes longer
    assert spent < 0.3 * slow, f"{spent:.2f} s CPU, {time.monotonic() - started:.2f} s for three"


@pytest.mark.parametrize("command", ("list", "info", "check", "new", "schema"))
def test_help_says_what_a_command_does_and_not_how(rlx_plugins, command):
    shown = rlx_plugins(command, "--help")
    assert f"rlx plugins {command} " in shown and "Raises" not in shown and "Args" not in shown
