"""``rlx plugins check``: its table, its exit codes, and plugins that do not even load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlx.core.commands.main import main
from rlx.core.errors import ConfigError, PluginError
from rlx.plugins.kinds import kind_of
from rlx.plugins.registry import discover
from rlx.testing import check, isolated

BAD = Path(__file__).parents[1] / "conformance"


@pytest.fixture
def checked(capsys):
    """Run ``rlx plugins check …``: exit code, what it printed, and what it said of errors."""

    def run(*words):
        code = main(["plugins", "check", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_good_one_exits_with_0_and_a_line_for_each_case(checked):
    code, out, err = checked("length")
    lines = out.splitlines()
    assert (code, err, lines[0]) == (0, "", "reward length")
    table = {line.split()[0]: line for line in lines[2:-2]}
    assert "  ok  " in table["order_follows_input"] and table["order_follows_input"].endswith(" s")
    assert (
        "not applicable" in table["takes_missing_values"]
        and "needs no columns" in table["takes_missing_values"]
    )
    assert "completions a second" in table["speed"]
    assert lines[-1].startswith("12 ok, 3 not applicable, in ")


def test_a_bad_one_exits_with_4_and_says_what_is_wrong(checked):
    code, out, err = checked(f"{BAD}/bad_rewards.py:OrderFollowsInput")
    assert (code, err) == (4, "")
    assert "order_follows_input          failed" in out
    assert "\norder_follows_input:\n  completion 5 is scored 0.83, and 0.02 in another order\n" in out
    assert "1 failed" in out.splitlines()[-1]


def test_what_builds_on_a_failure_is_not_run(checked):
    code, out, _ = checked(f"{BAD}/bad_rewards.py:Builds")
    assert code == 4 and "RuntimeError: no licence" in out and "Traceback" in out
    assert out.splitlines()[-1].startswith("1 failed, 14 not run, in ")


@pytest.mark.parametrize("kind", [(), ("--kind", "reward")])
def test_the_url_of_a_reward_server_is_a_reference_here_too(checked, kind, capsys):
    words = ("http://127.0.0.1:9/score", *kind, "--only", "builds", "--option", "retries=0")
    code, out, err = checked(*words)
    assert (code, err) == (0, "") and "builds  ok" in out
    assert main(["plugins", "info", words[0], *kind]) == 0
    assert "max_wait" in capsys.readouterr().out


def test_one_case_alone_and_json(checked):
    code, out, _ = checked(f"{BAD}/bad_transforms.py:RowsNotMutated", "--only", "rows_not_mutated", "--json")
    (told,) = json.loads(out)
    assert (code, told["case"], told["status"]) == (4, "rows_not_mutated", "failed")
    assert "changes the rows" in told["note"] and told["traceback"] == told["note"]
    assert checked(f"{BAD}/bad_transforms.py:RowsNotMutated", "--only", "deterministic")[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["lenght"], 2, "did you mean 'length'"),
        (["nowhere:X"], 4, "there is no module 'nowhere'"),
        (["rlx.rewards.length:Lenght"], 4, "did you mean 'Length'"),
        (["length", "--kind", "judge"], 2, "there is no judge 'length'"),
        (["length", "--kind", "rewrad"], 2, "did you mean 'reward'"),
        (["length", "--only", "order"], 2, "there is no case 'order' for a reward"),
        (["overlong"], 2, "needs the option 'longest'"),
        (["length", "--option", "target=many"], 2, "a value that is not allowed"),
        (["length", "--option", "goal=3"], 2, "has no option 'goal'"),
        (["length", "--data", "nowhere.jsonl"], 3, "no such file"),
    ],
)
def test_what_cannot_be_checked_exits_with_its_own_code(checked, words, code, said):
    found, _, err = checked(*words)
    assert (found, said in err) == (code, True), err


def test_options_reach_the_component(checked):
    assert checked("contains", "--option", "keywords=12", "--only", "builds")[0] == 0


def test_rows_reach_the_component(checked, tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"solution": "12"}\n')
    words = ["exact_match", "--only", "columns_declared", "--data", str(tmp_path / "answers.jsonl")]
    code, out, _ = checked(*words)
    assert code == 4 and "needs the column 'answer', which the sample rows do not have" in out


BROKEN = {
    "fault[P1]": (
        "raise ImportError('no libfoo\\x1b[31m')",
        ["no libfoo\\x1b[31m", "line 1"],
        "failed while it",
    ),
    "fault[P2]-exits": ("raise SystemExit(5)", ["SystemExit: 5"], "failed while it was imported"),
    "fault[P2]-dies": ("import os; os._exit(3)", [], "ended the interpreter"),
    "fault[P2]-hangs": ("import threading\nthreading.Event().wait()", ["line 2"], "takes longer than 1 s"),
    "fault[P2]-circular": ("from plugin_under_test import X", [], "failed while it was imported"),
    "syntax": ("def f(:", ["SyntaxError"], "failed while it was imported"),
    "nothing in it": ("", [], "has no 'X'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_does_not_load_is_told_with_its_traceback(fault, checked, tmp_path, monkeypatch):
    source, shown, said = BROKEN[fault]
    (tmp_path / "plugin_under_test.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = checked("plugin_under_test:X", "--timeout", "1" if "hangs" in fault else "30")
    assert (code, said in err, "\x1b" in out + err) == (4, True, False), out + err
    assert [part for part in shown if part not in out] == []


def test_an_option_without_doc_is_shown_at_the_line_that_declares_it(checked, tmp_path):
    file = tmp_path / "costly.py"
    file.write_text("import rlx\n\nclass X:\n    class Config:\n        cost: float = rlx.opt(0.1)\n")
    code, out, err = checked(f"{file}:X")
    assert (code, f"where:    {file}:5" in err, "the doc is missing" in err) == (4, True, True), err
    assert "rlx.opt(0.1)" in out and "options.py" not in out


def test_a_case_that_builds_on_a_failure_is_told_with_it(checked):
    code, out, _ = checked(f"{BAD}/bad_rewards.py:Builds", "--only", "speed")
    lines = [re.split(r"\s\s+", line)[:2] for line in out.splitlines()[2:4]]
    assert (code, lines) == (4, [["builds", "failed"], ["speed", "not run"]]), out


def test_a_column_that_was_meant_to_be_the_completions_is_told():
    def typo(*, completion, **columns):
        return [1.0 for _ in completion]

    (outcome,) = check(typo, "reward", only=["columns_declared"])
    assert outcome.note == "it takes a column called 'completion'; did you mean 'completions'?"

    def fine(*, completions, completion, **columns):
        return [float(one == other) for one, other in zip(completions, completion, strict=True)]

    (outcome,) = check(fine, "reward", only=["columns_declared"])
    assert (outcome.status, outcome.note) == (
        "ok",
        "with the column completion, made up; --data gives rows of yours",
    )


@pytest.mark.parametrize(
    ("line", "status"),
    [("import torch", "ok"), ("from transformers import __version__", "failed")],
    ids=["put off", "at once"],
)
def test_what_registers_a_component_must_be_light_too(site, line, status):
    register = f"{line}\nimport rlx\n\n@rlx.hookimpl\ndef rlx_register(registry):\n"
    site.install("heavy", register + "    registry.add('reward', 'brief', 'rewards_of_heavy:brief')\n")
    (site.path / "rewards_of_heavy.py").write_text(
        "def brief(completions):\n    return [0.0 for _ in completions]\n"
    )
    discover()
    (outcome,) = check("brief", only=["imports_light"])
    assert outcome.status == status and ("rlx_heavy imports" in outcome.note) == (status == "failed"), outcome


def test_the_kind_is_found_from_name_base_hooks_members_and_arguments():
    import rlx

    class Listener:
        @rlx.hookimpl
        def on_log(self, metrics): ...

    def score(completions): ...

    def rows(rows, tokenizer): ...

    class Judge:
        def judge(self, prompts, pairs): ...

    found = [kind_of(thing) for thing in ("length", "rlx/dpo", rlx.Transform, Listener, score, rows, Judge())]
    assert found == ["reward", "algorithm", "transform", "callback", "reward", "transform", "judge"]


def test_a_kind_that_is_not_clear_has_to_be_said(checked):
    def either(one, other): ...

    with pytest.raises(ConfigError, match="may be of several kinds") as raised:
        check(either)
    assert raised.value.got == "reward, transform" and "--kind reward" in raised.value.hint
    with pytest.raises(ConfigError, match="'reward' may be of several kinds"):
        kind_of("reward")  # an algorithm and a judge
    with pytest.raises(PluginError, match="no component of any kind"):
        kind_of(5)


def test_pytest_runs_one_test_for_each_case(tmp_path, monkeypatch):
    (tmp_path / "test_mine.py").write_text(
        "import rlx\n"
        "from rlx.testing import conformance\n"
        "class Mine(rlx.Reward):\n"
        "    def __call__(self, completions, **columns):\n"
        "        return sorted(map(len, completions))\n"
        "test_conformance = conformance(Mine)\n"
    )
    monkeypatch.chdir(tmp_path)
    reports = {}

    class Spy:
        def pytest_runtest_logreport(self, report):
            if report.when == "call":
                reports[report.nodeid.partition("::")[2]] = report

    assert (
        pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_mine.py"], [Spy()])
        == 1
    )
    failed = [name for name, report in reports.items() if report.failed]
    assert failed == ["test_conformance[order_follows_input]"]
    assert reports["test_conformance[takes_missing_values]"].skipped
    assert reports["test_conformance[inputs_not_mutated]"].passed


def test_a_plugin_that_is_not_installed_is_checked_by_its_name():
    class Plugin:
        from rlx import hookimpl

        @hookimpl
        def rlx_register(self, registry):
            registry.add("reward", "brevity", lambda completions: [-len(text) for text in completions])

    with isolated(Plugin()):
        outcomes = check("brevity")
    # A lambda has no module to import again, so imports_light has no meaning for it.
    assert {o.case for o in outcomes if o.status == "failed"} == set()
    assert next(o for o in outcomes if o.case == "imports_light").status == "not applicable"
