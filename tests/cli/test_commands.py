"""The verbs, as users type them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rlx.core.commands import train
from rlx.core.commands.app import VERBS
from rlx.core.commands.main import main
from rlx.core.commands.resume import read_overrides
from rlx.core.commands.show import summary
from rlx.core.errors import ConfigError
from rlx.core.help import run_help
from rlx.core.options import options
from rlx.core.settings import READ_BY, Settings
from rlx.core.yaml_file import parse_config, read_config

JOB = ("--algo", "ppo", "--reward", "exact_match")


def test_help_names_every_verb(rlx):
    done = rlx("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)


def test_version(rlx):
    assert rlx("--version").stdout.startswith("rlx 0.")


def test_an_unknown_verb(rlx):
    done = rlx("rnu")
    assert done.returncode == 2 and "rnu" in done.stderr and "Traceback" not in done.stderr


def test_a_config_error_is_told_on_stderr(rlx, tmp_path):
    (tmp_path / "config.yaml").write_text("algo: ppo\nreward: exact_match\n\nlearning_rte: 1e-5\n")
    done = rlx("run", "config.yaml")  # fault[C1]
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "[E-CONFIG-UNKNOWN] unknown option 'learning_rte'; did you mean 'learning_rate'?",
        "  where:    config.yaml:4:1",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", ["no.yaml", "."], ids=["fault[C7]-missing", "fault[C7]-folder"])
def test_a_config_file_that_is_none(name, rlx):
    done = rlx("run", name)
    assert done.returncode == 2 and done.stderr.startswith("[E-CONFIG-FILE]")


def test_traceback_on_request(rlx):
    assert "Traceback (most recent call last)" in rlx("run", "--traceback", "--algo", "pppo").stderr
    assert "Traceback" not in rlx("run", "--algo", "pppo").stderr


def test_the_printed_config_is_the_config(rlx, tmp_path):
    first = rlx("run", *JOB, "--learning-rate", "1e-5", "--output-dir", "runs/x", "--print-config")
    assert first.returncode == 0
    (tmp_path / "config.yaml").write_text(first.stdout)
    assert rlx("run", "config.yaml", "--print-config").stdout == first.stdout
    changed = rlx("run", "config.yaml", "--learning-rate", "2e-5", "--print-config").stdout
    values = parse_config(changed, "x")[0]
    assert float(values["learning_rate"]) == 2e-5
    assert not (tmp_path / "runs").exists()


def test_flags_replace_a_list_of_the_file_and_its_places():
    values, where = parse_config("reward:\n- name: length\n  target: 5\nseed: 1\n", "c.yaml")
    assert where["reward[0].target"] == "c.yaml:3:3"
    path = Path("c.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlx.core.yaml_file.read_config", lambda _: (values, where))
        merged, places = train.with_file({"reward": ["exact_match"]}, {"reward": "--reward"}, [str(path)])
    assert merged["reward"] == ["exact_match"] and merged["seed"] == "1"
    assert "reward[0].target" not in places and places["reward"] == "--reward"


def test_two_config_files_are_refused():
    with pytest.raises(ConfigError, match="one config file"):
        train.with_file({}, {}, ["a.yaml", "b.yaml"])


# --help


def panels(**values: object) -> dict[str, dict[str, str]]:
    return {
        panel.title: {row.flag.split()[0]: row.facts for row in panel.rows} for panel in run_help(values, {})
    }


def test_help_shows_every_option_of_the_chosen_algorithm_and_components():
    shown = panels(algo="ppo", reward="length")
    assert shown["Algorithm ppo"]["--cliprange"] == "default 0.2; > 0; arXiv:1707.06347, equation 7"
    assert "--[no-]whiten-advantages" in shown["Algorithm ppo"]
    assert {"--length.target", "--length.penalty"} <= set(shown["Reward length"])
    flat = {flag.replace("[no-]", "") for panel in shown.values() for flag in panel}
    every = {name for name in options(Settings) if "prompts" in READ_BY.get(name, ("prompts",))}
    assert {f"--{name}".replace("_", "-") for name in every} == flat & {
        f"--{name}".replace("_", "-") for name in options(Settings)
    }


def test_help_shows_the_defaults_that_the_run_would_have():
    assert panels(algo="ppo")["Training"]["--learning-rate"].startswith("default 0.0001 (recipe wordmath)")
    assert "recipe" not in panels(algo="ppo", model="other/model")["Training"]["--learning-rate"]


def test_help_leaves_out_what_means_nothing_for_the_algorithm():
    from dataclasses import dataclass

    from rlx.core.options import opt
    from rlx.plugins.contract import Algorithm

    class Imitate(Algorithm):
        """Learns from demonstrations: samples nothing, has no reference and no values."""

        eats = "demonstrations"

        @dataclass(frozen=True)
        class Config:
            """Options."""

            pack_short: bool = opt(False, "pack short rows")

        def loss(self, batch, now):
            return None

    shown = panels(algo=Imitate)
    assert "Sampling" not in shown and "--reward" not in shown["Components"]
    assert not {"--value-model", "--reference-model", "--[no-]sync-ref-model"} & set(shown["Model"])
    assert shown["Algorithm Imitate"] == {"--[no-]pack-short": ""}


@pytest.mark.parametrize(
    ("algo", "moves", "precomputes", "packs"),
    [
        ("ppo", True, False, False),
        ("grpo", True, False, False),  # without a reference by default, with one at beta above 0
        ("dpo", True, True, False),
        ("kto", True, False, False),
        ("orpo", False, False, False),
        ("sft", False, False, True),
    ],
)
def test_help_shows_no_option_that_the_algorithm_refuses(algo, moves, precomputes, packs):
    flags = {flag.replace("[no-]", "") for panel in panels(algo=algo).values() for flag in panel}
    for flag, shown in (
        ("--sync-ref-model", moves), ("--ref-model-sync-steps", moves), ("--reference-model", moves),
        ("--precompute-ref-log-probs", precomputes), ("--packing", packs),
        ("--max-length", algo not in ("ppo", "grpo")),
    ):  # fmt: skip
        assert (flag in flags) is shown, flag


def test_help_of_an_unknown_algorithm_is_an_error(rlx):
    assert rlx("run", "--algo", "pppo", "--help").returncode == 2


# run, check, resume: what they hand to the training stack


@pytest.fixture
def stack(monkeypatch):
    """Stands in for rlx.core.run, which imports torch: records what it was given."""
    calls = []

    def started(name, folder, given):
        calls.append((name, folder, given))
        return types.SimpleNamespace(plan=["a plan"], path=Path(folder), say=print)

    def train(run):
        calls.append(("train",))
        return types.SimpleNamespace(metrics=[{"eval/reward": 0.25}, {"eval/reward": 0.75}])

    module = types.ModuleType("rlx.core.run")
    module.run = lambda config, *, dry_run: started("check", config.settings.output_dir, dry_run)
    module.prepare = lambda config: started("run", config.settings.output_dir, config)
    module.reopen = lambda folder, overrides: started("resume", folder, overrides)
    module.train = train
    monkeypatch.setitem(sys.modules, "rlx.core.run", module)
    return calls


def test_run_says_its_plan_first_and_what_to_type_next_last(stack, capsys):
    assert main(["run", *JOB, "--output-dir", "my runs/x"]) == 0
    assert [name for name, *_ in stack] == ["run", "train"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["plan", "  a plan", "held-out reward 0.250 → 0.750"]
    assert lines[3].endswith("rlx show 'my runs/x'")
    assert lines[-1].endswith("rlx run 'my runs/x'/config.yaml --seed 1 --output-dir 'my runs/x-seed-1'")


@pytest.mark.parametrize("words", [["check", *JOB], ["run", "--dry-run", *JOB]])
def test_a_dry_run_prints_the_plan(words, stack, capsys):
    assert main(words) == 0
    [(verb, _, dry_run)] = stack
    assert verb == "check" and dry_run is True
    assert "a plan" in capsys.readouterr().out


def test_resume_of_a_finished_run_says_how_it_can_go_on(stack, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text('{"status": "finished"}')
    for made, said in (
        (None, f"rlx run --model {tmp_path} …"),
        ("adapter_config.json", f"rlx run --adapter {tmp_path} …"),
        ("checkpoint-3", f"rlx resume {tmp_path} --override max_steps=N"),
    ):
        if made is not None:
            (tmp_path / made).mkdir() if made.startswith("checkpoint") else (tmp_path / made).write_text("{}")
        assert main(["resume", str(tmp_path)]) == 0
        assert said in capsys.readouterr().out and stack == []


def test_resume_hands_over_folder_and_overrides(stack):
    assert main(["resume", "runs/x", "--override", "learning-rate=1e-5", "--override", "data"]) == 0
    assert stack == [("resume", Path("runs/x"), {"learning_rate": "1e-5", "data": True}), ("train",)]


def test_an_override_needs_a_value():
    with pytest.raises(ConfigError, match="no value"):
        read_overrides(["seed"])


# show


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "x"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "reward.png").write_bytes(b"")
    (folder / "config.yaml").write_text("algo: ppo\nmodel: tiny\nreward:\n- {name: exact_match, weight: 1}\n")
    lines = [
        {"step": 0, "eval/reward": 0.4},
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.75, "eval/reward": 0.9},
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "rew'
    )
    (folder / "checkpoint-2").mkdir()
    return folder


def test_show_sums_a_run_up(run_folder):
    found = summary(run_folder)
    assert found["config"] == {"algo": "ppo", "model": "tiny", "reward": "exact_match"}
    assert found["first"] == {"step": 0, "eval/reward": 0.4}
    assert found["last"] == {
        "step": 2,
        "eval/reward": 0.9,
        "reward": 0.75,
    }  # the torn last line does not count
    assert found["checkpoint"] is None and len(found["broken"]) == 1  # an empty folder is no checkpoint
    assert "plots/reward.png" in found["files"] and "metrics.jsonl" in found["files"]


def test_show_prints_and_speaks_json(run_folder, capsys):
    assert main(["show", str(run_folder)]) == 0
    assert "eval/reward 0.9" in capsys.readouterr().out
    assert main(["show", str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["last"]["reward"] == 0.75


def test_show_of_something_else(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        summary(tmp_path)


# reward, doctor (these import the training stack)


def test_reward_try(capsys):
    words = [
        "reward",
        "try",
        "exact_match",
        "--prompt",
        "2 + 3?",
        "--completion",
        "Answer: 5",
        "--completion",
        "\x1b[2J 6",
    ]
    assert main([*words, "--columns", "answer=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "0"]
    assert "\x1b" not in "".join(lines)


def test_reward_try_lets_the_reward_give_back_what_it_holds(tmp_path, capsys):
    (tmp_path / "held.py").write_text(
        "import rlx\n"
        "class Held(rlx.Reward):\n"
        "    def __call__(self, *, completions, **columns):\n"
        "        return [float(text) for text in completions]\n"
        "    def close(self):\n"
        "        print('closed')\n"
    )
    words = ["reward", "try", f"{tmp_path}/held.py:Held", "--prompt", "x", "--completion"]
    assert main([*words, "1"]) == 0 and "closed" in capsys.readouterr().out
    assert main([*words, "none"]) == 6 and "closed" in capsys.readouterr().out


def test_reward_try_names_a_missing_column(capsys):
    assert main(["reward", "try", "exact_match", "--prompt", "x", "--completion", "y"]) == 2
    assert "--columns answer=" in capsys.readouterr().err


def test_reward_try_takes_options(capsys):
    words = ["reward", "try", "length", "--prompt", "x", "--completion", "a b c", "--option"]
    assert main([*words, "target=3"]) == 0
    assert main([*words, "taget=3"]) == 2
    assert "did you mean 'target'" in capsys.readouterr().err


def test_doctor_tells_versions_and_machine(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("rlx", "torch", "memory", "device", "plugins"))


# Terminals and pipes


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m rlx run --algo ppo --help | head -1; echo codes ${{PIPESTATUS[@]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)  # fault[C13]
    assert done.stdout.splitlines()[-1] == "codes 0 0" and done.stderr == ""


def test_work_goes_on_after_the_reader_left(tmp_path):
    code = (
        "import pathlib, sys\nfrom rlx.core.commands.streams import unbreakable\nunbreakable()\n"
        "for i in range(20_000):\n    print('line', i)\nsys.stdout.flush()\npathlib.Path('done').touch()\n"
    )
    command = f'{sys.executable} -c "$CODE" | head -1; echo codes ${{PIPESTATUS[@]}}'
    env = {**os.environ, "CODE": code}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=env
    )  # fault[C13]
    assert done.stdout.splitlines() == ["line 0", "codes 0 0"] and done.stderr == ""
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "dumb"},
        {"COLUMNS": "1"},
        {"PYTHONIOENCODING": "ascii"},
    ],
    ids=lambda env: f"fault[C14]-{next(iter(env))}",
)
def test_poor_surroundings(env, rlx):
    done = rlx("run", "--algo", "ppo", "--help", env=env)
    assert done.returncode == 0 and done.stderr == "" and "--cliprange" in done.stdout
    done = rlx("run", "--algo", "пппо", env=env)
    assert done.returncode == 2 and "E-PLUGIN-UNKNOWN" in done.stderr and "Traceback" not in done.stderr


def on_a_terminal(words: list[str], cwd: Path) -> str:
    """What a command sends to a terminal."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rlx", *words], stdout=theirs, stderr=theirs, stdin=theirs, cwd=cwd, env=env
    )
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    process.wait(timeout=60)
    os.close(ours)
    return b"".join(chunks).decode()


def test_panels_on_a_terminal_plain_text_elsewhere(tmp_path, rlx):
    shown = on_a_terminal(["run", "--algo", "ppo", "--help"], tmp_path)
    assert "╭─" in shown and "Training" in shown and "\x1b[1;36m--learning-rate" in shown
    plain = rlx("run", "--algo", "ppo", "--help").stdout
    assert "╭" not in plain and "\x1b" not in plain


def test_hostile_words_are_inert_on_a_terminal(tmp_path):
    hostile = on_a_terminal(
        ["run", *JOB, "--evil\x1b]0;owned\x07\x9b2J", "1", "--seed", "\x1b[2J\u202e"], tmp_path
    )
    benign = on_a_terminal(["run", *JOB, "--evilx", "1", "--seed", "y"], tmp_path)
    escapes = [text.count("\x1b") for text in (hostile, benign)]  # rich's own colours
    assert "\x07" not in hostile and "\x9b" not in hostile and "\u202e" not in hostile
    assert escapes[0] <= escapes[1] and "\x1b]" not in hostile  # fault[S14]


def test_the_config_of_a_run_folder_is_read(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 3\n")
    assert read_config(tmp_path / "c.yaml")[0] == {"seed": "3"}
