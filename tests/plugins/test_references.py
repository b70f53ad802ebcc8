"""Every form of a reference, and what is said when a part of it is wrong."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import pytest

import rlx
from rlx.plugins.contract import NoOptions
from rlx.plugins.references import config_of, describe, make, resolve

FILE = '''
from dataclasses import dataclass
import rlx

class Brevity(rlx.Reward):
    @dataclass(frozen=True)
    class Config:
        scale: float = rlx.opt(1.0, "what a character costs", gt=0)

    def __call__(self, *, completions, **columns):
        return [-self.config.scale * len(c) for c in completions]

class Plain:
    def __init__(self, scale=1.0, *, shift=0.0):
        self.scale, self.shift = scale, shift

    def __call__(self, *, completions, **columns):
        return [self.shift - self.scale * len(c) for c in completions]

class Lacking(rlx.Reward):
    """A reward that forgot to reward."""

class Half:
    def generate(self, prompts, n, sampling, seeds): ...

class Silent(rlx.Callback):
    pass

class Typo(rlx.Callback):
    @rlx.hookimpl
    def on_step_ends(self, run): ...

def ones(completions, **columns):
    return [1.0] * len(completions)

class Fragile:
    def __init__(self):
        raise OSError("no licence file")

    def __call__(self, **columns): ...
'''


@pytest.fixture
def here(tmp_path, monkeypatch, site):
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "form", ["./mine.py:ones", "mine.py:ones", "{here}/mine.py:ones", "../{name}/mine.py:ones"]
)
def test_a_file_is_a_reference(here, form):
    reference = form.format(here=here, name=here.name)
    assert resolve("reward", reference)(["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize("fault", ["S8"], ids=["fault[S8]"])
def test_a_file_is_loaded_with_sys_path_untouched_and_hidden_from_imports(here, fault):
    (here / "json.py").write_text("raise AssertionError('the standard library is hidden')")
    (here / "mine.py").write_text(
        "import json\ndef ones(completions, **columns):\n    return json.loads('[1]')\n"
    )
    before = list(sys.path)
    function = resolve("reward", "./mine.py:ones")
    assert sys.path == before and function(["a"]) == [1]
    assert function.__module__.startswith("_rlx_file_mine_") and "mine" not in sys.modules


def test_the_same_file_is_loaded_once_and_anew_when_it_was_edited(here):
    first = resolve("reward", "./mine.py:ones")
    assert resolve("reward", f"{here}/mine.py:ones") is first
    (here / "mine.py").write_text("def ones(completions, **columns):\n    return [2.0]\n")
    assert resolve("reward", "./mine.py:ones")(["a"]) == [2.0]


def test_the_object_itself_and_an_attribute_of_a_module_are_references(here):
    def mine(completions, **columns):
        return [0.0]

    assert resolve("reward", mine) is mine
    assert resolve("reward", "rlx.rewards.length:Length").__name__ == "Length"
    assert issubclass(resolve("algorithm", "rlx.algorithms.ppo:PPO"), rlx.Algorithm)


# what is wrong, kind, reference, exit code, what the message must say
WRONG = [
    ("no-such-module", "reward", "no_such_pkg.rewards:Brevity", 4, ["no module 'no_such_pkg'"]),
    ("module-in-cwd", "reward", "mine:ones", 4, ["no module 'mine'", "./mine.py:ones"]),
    ("no-such-submodule", "reward", "rlx.rewards.nonsense:X", 4, ["no module 'rlx.rewards.nonsense'"]),
    ("no-such-file", "reward", "./nope.py:Brevity", 4, ["no file './nope.py'"]),
    (
        "no-such-attribute",
        "reward",
        "./mine.py:Brevty",
        4,
        ["no 'Brevty'", "did you mean 'Brevity'", "Plain"],
    ),
    ("no-attribute", "reward", "./mine.py", 2, ["which reward in the file", "./mine.py:Attribute"]),
    ("empty-attribute", "reward", "./mine.py:", 2, ["which attribute"]),
    ("module-fails", "reward", "./raises.py:X", 4, ["raises.py:1", "ZeroDivisionError"]),
    ("module-exits", "reward", "./exits.py:X", 4, ["exits.py:1", "SystemExit"]),
    (
        "module-lacks-library",
        "reward",
        "./needs.py:X",
        4,
        ["failed while it was imported", "no_such_library"],
    ),
    ("fault[P9]-reward-lacks-call", "reward", "./mine.py:Lacking", 4, ["lacks __call__", "mine.py:20"]),
    ("fault[P9]-generator-lacks", "generator", "./mine.py:Half", 4, ["lacks sync, close"]),
    ("fault[P9]-not-an-algorithm", "algorithm", "./mine.py:Brevity", 4, ["is no algorithm", "lacks", "loss"]),
    ("fault[P9]-function-for-class", "algorithm", "./mine.py:ones", 4, ["is no algorithm", "a function"]),
    (
        "fault[P4]-callback-typo",
        "callback",
        "./mine.py:Typo",
        4,
        ["'on_step_ends'", "did you mean 'on_step_end'"],
    ),
    ("fault[P4]-callback-silent", "callback", "./mine.py:Silent", 4, ["implements no hook"]),
    ("no-such-plugin", "reward", "nobody/length", 2, ["no reward 'nobody/length'"]),
]


@pytest.mark.parametrize(
    ("kind", "reference", "code", "said"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_a_failure_says_which_part_failed(here, kind, reference, code, said):
    (here / "raises.py").write_text("1 / 0")
    (here / "exits.py").write_text("raise SystemExit(0)")
    (here / "needs.py").write_text("import no_such_library")
    for _ in range(2):  # a failed import leaves nothing behind that a second try would find
        with pytest.raises(rlx.RlxError) as caught:
            resolve(kind, reference)
    text = "\n".join(caught.value.lines())
    assert caught.value.exit_code == code and len(caught.value.lines()) <= 12
    for part in said:
        assert part in text


def test_the_current_folder_is_not_searched_for_modules(here, run_python):
    # As the console script runs: without the empty entry that -c puts on sys.path.
    code = """
        import json, sys
        sys.path = [entry for entry in sys.path if entry not in ("", sys.argv[0])]
        import rlx
        try:
            rlx.resolve("reward", "mine:ones")
        except rlx.PluginError as error:
            print(json.dumps(error.hint))
        """
    assert "./mine.py:ones" in run_python(code)


def test_make_builds_with_options_and_checks_them(here):
    reward = make("reward", "./mine.py:Brevity", {"scale": "0.5"})
    assert reward(completions=["ab"]) == [-1.0]
    with pytest.raises(rlx.ConfigError, match="did you mean 'scale'"):
        make("reward", "./mine.py:Brevity", {"scal": 1})
    with pytest.raises(rlx.ConfigError) as caught:
        make("reward", "./mine.py:Brevity", {"scale": -1}, where={"scale": "--Brevity.scale"})
    assert "--Brevity.scale" in str(caught.value)


def test_make_passes_options_as_keywords_to_a_class_without_config(here):
    assert make("reward", "./mine.py:Plain", {"shift": 2.0})(completions=["abc"]) == [-1.0]
    with pytest.raises(rlx.ConfigError) as caught:
        make("reward", "./mine.py:Plain", {"shft": 2.0}, where={"shft": "config.yaml:3:1"})
    assert "did you mean 'shift'" in caught.value.what and caught.value.where == "config.yaml:3:1"


def test_make_refuses_options_for_a_function_and_an_object(here):
    assert make("reward", "./mine.py:ones")(["a"]) == [1.0]
    with pytest.raises(rlx.ConfigError, match="no option 'scale'"):
        make("reward", "./mine.py:ones", {"scale": 1})


def test_an_exception_while_building_keeps_its_type_and_names_the_component(here):
    with pytest.raises(OSError, match="no licence file") as caught:
        make("reward", "./mine.py:Fragile")
    assert "reward ./mine.py:Fragile" in caught.value.__notes__[0] and "mine.py:" in caught.value.__notes__[0]


def test_config_of_and_describe():
    @dataclass(frozen=True)
    class Config:
        scale: float = rlx.opt(1.0, "scale")

    def mine(completions, **columns):
        return [0.0]

    assert config_of(type("Scaled", (rlx.Reward,), {"Config": Config})) is Config
    assert config_of(mine) is NoOptions and config_of(rlx.Reward) is NoOptions
    assert describe("reward", "length") == "length" and describe("reward", "my_pkg:Mine") == "my_pkg:Mine"
    assert describe("reward", mine) == f"{__name__}:{mine.__qualname__}"


def test_paths_may_be_in_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", os.fspath(here))
    assert resolve("reward", "~/mine.py:ones")(["a"]) == [1.0]
