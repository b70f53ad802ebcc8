"""``rlx plugins new``: a package that installs, is found, and passes its own tests."""

from __future__ import annotations

import ast

import pytest

from rlx.core import scaffold
from rlx.core.commands.main import main
from rlx.core.errors import ConfigError
from rlx.plugins.contract import KINDS
from rlx.plugins.registry import Registry
from rlx.testing import isolated


@pytest.fixture(autouse=True)
def only_builtins():
    with isolated():
        yield


def names(kind: str, name: str) -> scaffold.Names:
    with isolated() as registry:
        return scaffold.check_names(kind, name, registry)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_template_that_is_filled_in(kind):
    texts = scaffold.files(names(kind, "my-own_thing"))
    module = "rlx_my_own_thing"
    assert set(texts) == {
        "pyproject.toml", "README.md", f"{module}/__init__.py", f"{module}/plugin.py", f"{module}/{kind}.py",
        f"tests/test_{module}.py",
    }  # fmt: skip
    for path, text in texts.items():
        assert "$" not in text
        if path.endswith(".py"):
            ast.parse(text)
    assert "class MyOwnThing" in texts[f"{module}/{kind}.py"]
    assert (
        f'"{kind}",\n        "my-own_thing",\n        "{module}.{kind}:MyOwnThing"'
        in texts[f"{module}/plugin.py"]
    )


UNFIT = [
    "../x",
    "/etc/x",
    "a/../../b",
    "a\0b",
    "..",
    ".",
    "",
    "-x",
    "x-",
    "x--y",
    "X",
    "ünder",
    "1st",
    "a b",
    "a\n",
]


@pytest.mark.parametrize(
    "name", [*UNFIT, "a" * 61, "none", "rlx-x", "rlx"], ids=lambda name: f"fault[S18] {name!r}"
)
def test_an_unfit_name_is_refused_and_nothing_is_written(name, tmp_path):
    """Letters, digits and single separators; nothing that leads elsewhere."""
    code = main(["plugins", "new", "reward", "--path", str(tmp_path / "in"), "--", name])
    assert code == 2 and not (tmp_path / "in").exists()


def test_a_fit_name_is_taken_up_to_sixty_characters():
    assert names("reward", "a" * 60).distribution == "rlx-" + "a" * 60
    assert names("reward", "f1-score_2").cls == "F1Score2"


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ConfigError, match="taken") as caught:
        names("reward", "length")
    assert "rlx/length" in caught.value.got
    assert names("callback", "length").name == "length"  # another kind's


def test_an_unknown_kind_is_refused_with_the_one_that_was_meant():
    with pytest.raises(ConfigError, match="did you mean 'reward'"):
        scaffold.check_names("rewrd", "x", Registry())


@pytest.mark.parametrize("there", ["folder", "file", "dangling link"])
def test_a_folder_that_exists_is_refused_and_left_alone(there, tmp_path, capsys):
    target = tmp_path / "rlx-x"
    if there == "folder":
        target.mkdir()
    elif there == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    assert main(["plugins", "new", "reward", "x", "--path", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == [target]


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["plugins", "new", "reward", "x", "--path", str(tmp_path / "file" / "in")]) == 9
    assert "cannot be written" in capsys.readouterr().err


def test_the_last_lines_say_what_to_type(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "reward", "brevity"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rlx-brevity: 6 files. Now type",
        "  cd rlx-brevity",
        '  pip install --editable ".[test]"',
        "  python -m pytest",
        "  rlx plugins check brevity --kind reward",
        "  rlx run --reward exact_match --reward brevity",
        "The reward is in rlx_brevity/reward.py.",
    ]


@pytest.fixture(scope="module")
def installed(tmp_path_factory, install):
    """A package of every kind, written by the command and installed by pip."""
    made = tmp_path_factory.mktemp("made")
    for kind in KINDS:
        assert main(["plugins", "new", kind, f"own-{kind}", "--path", str(made)]) == 0
    return install(*sorted(made.iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_package_is_found_and_passes(kind, installed):
    """It is listed, its own tests pass, and its README's command lines run."""
    listed = installed.run("rlx", "plugins", "list", "--kind", kind)
    assert f"own-{kind}" in listed and "failed to load" not in listed
    passed = installed.run("pytest", "-q", "-p", "no:cacheprovider", f"rlx-own-{kind}/tests")
    assert "passed" in passed and "failed" not in passed
    # The package's tests went through all cases already.
    installed.run("rlx", "plugins", "check", f"own-{kind}", "--kind", kind, "--only", "builds")
    line = scaffold.TRY[kind][0].replace("$name", f"own-{kind}").split()[1:]
    short = "--max-steps 2 --batch-size 4 --max-rows 8 --max-eval-rows 4 --max-completion-length 8"
    installed.run("rlx", *line, *short.split())


@pytest.mark.slow
def test_the_package_is_formatted(installed):
    own = ["--exclude", "build", "--config", "line-length=110"]
    own += ["--config", 'lint.isort.known-first-party=["rlx_own_*"]']
    installed.run("ruff", "format", "--check", *own, ".")
    installed.run("ruff", "check", "--select", "E,F,I,B,UP", *own, ".")
