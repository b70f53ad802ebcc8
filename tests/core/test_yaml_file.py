"""Configs are read strictly: a fault is one line with its place, nothing is constructed or takes long."""

import os
import time

import pytest

from rlx.core.errors import ConfigError
from rlx.core.plain import Plain
from rlx.core.yaml_file import MAX_BYTES, parse_config, read_config

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FAULTS = {
    "tab": ("a: 1\nb:\n\tc: 2\n", "config.yaml:3:1: found character that cannot start any token"),
    "duplicate": ("seed: 1\nmodel: x\nseed: 2\n", "config.yaml:3:1: duplicate key 'seed', first in line 1"),
    "duplicate spelling": (
        "max-steps: 1\nmax_steps: 2\n",
        "config.yaml:2:1: duplicate key 'max_steps', first in line 1",
    ),
    "nested duplicate": ("columns:\n  a: x\n  a: y\n", "config.yaml:3:3: duplicate key 'a', first in line 2"),
    "unclosed": ("a: [1,\nb: 2\n", "config.yaml:3:1: did not find expected ',' or ']'"),
    "two values": ("a: b: c\n", "config.yaml:1:5: mapping values are not allowed in this context"),
    "python object": (
        "a: !!python/object/apply:os.system ['touch owned']\n",
        "config.yaml:1:4: tags are not allowed: tag:yaml.org,2002:python/object/apply:os.system",
    ),
    "own tag": ("a: !env HOME\n", "config.yaml:1:4: tags are not allowed: !env"),
    "alias bomb": (BOMB, "too many or too deeply nested values"),
    "alias to itself": ("a: &a [*a]\n", "config.yaml:1:4: too many or too deeply nested values"),
    "unknown alias": ("a: *b\n", "config.yaml:1:4: found undefined alias"),
    "deep brackets": ("[" * 500_000, "too many or too deeply nested values"),
    "deep dashes": ("- " * 300_000 + "x", "too many or too deeply nested values"),
    "many values": ("a:\n" + "- x\n" * 200_000, "too many or too deeply nested values"),
    "merge key": ("<<: {a: 1}\n", "config.yaml:1:1: merge keys (<<) are not supported"),
    "two documents": (
        "a: 1\n---\nb: 2\n",
        "expected a single document in the stream, but found another document",
    ),
    "list": ("- a\n- b\n", "config.yaml:1:1: a config is a mapping"),
    "text": ("hello\n", "config.yaml:1:1: a config is a mapping"),
    "list as key": ("[a, b]: c\n", "config.yaml:1:1: a key is a single word"),
    "control character": ("a: \x01\n", "config.yaml: a character that YAML does not allow"),
}


@pytest.mark.parametrize(("text", "message"), FAULTS.values(), ids=[f"fault[C6]-{name}" for name in FAULTS])
def test_a_fault_is_one_line_with_its_place(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    os.chdir(tmp_path)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_config("config.yaml")
    assert time.process_time() - start < 1
    assert message in caught.value.what
    assert len(caught.value.what.splitlines()) == 1
    assert caught.value.exit_code == 2
    assert os.listdir(tmp_path) == ["config.yaml"]  # nothing was executed


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a: " + b"x" * MAX_BYTES, "too large"),
        (b"a: 1\nb: caf\xe9\n", "not UTF-8"),
    ],
    ids=["fault[C6]-2 MiB", "fault[C6]-latin-1"],
)
def test_bytes_that_are_no_config(raw, message, tmp_path):
    (tmp_path / "c.yaml").write_bytes(raw)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "c.yaml")


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "c.yaml")
    assert caught.value.where.endswith("c.yaml:2") and caught.value.got == "byte 0xe9"


@pytest.mark.parametrize(
    "raw", [b"", b"\n\n# only a comment\n", b"\xef\xbb\xbf"], ids=lambda _: "fault[C6]-empty"
)
def test_an_empty_file_is_an_empty_config(raw, tmp_path):
    (tmp_path / "c.yaml").write_bytes(raw)
    assert read_config(tmp_path / "c.yaml") == ({}, {})


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "c.yaml").write_bytes("\ufeffseed: 3\r\n".encode())
    assert read_config(tmp_path / "c.yaml")[0] == {"seed": "3"}


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file") as caught:
        read_config(tmp_path / "no.yaml")  # fault[C7]
    assert caught.value.exit_code == 2


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        read_config(tmp_path)  # fault[C7]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("a: 1")
    file.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        read_config(file)  # fault[C7]


def test_every_key_and_item_has_its_place():
    values, where = parse_config(
        "a: 1\nreward:\n  - name: length\n    target: 5\n  - exact_match\n", "c.yaml"
    )
    assert values == {"a": "1", "reward": [{"name": "length", "target": "5"}, "exact_match"]}
    assert where == {
        "a": "c.yaml:1:1",
        "reward": "c.yaml:2:1",
        "reward[0]": "c.yaml:3:5",
        "reward[0].name": "c.yaml:3:5",
        "reward[0].target": "c.yaml:4:5",
        "reward[1]": "c.yaml:5:5",
    }


def test_scalars_keep_their_text_until_an_option_takes_them():
    text = "a: 1e-5\nb: 'true'\nc: true\nd: null\ne: no\nf: 1_000\ng: 0x10\nh: 12:30\ni:\nj: |\n  x\n"
    values, _ = parse_config(text, "c")
    assert values == {
        "a": "1e-5", "b": "true", "c": True, "d": None, "e": "no",
        "f": "1_000", "g": "0x10", "h": "12:30", "i": None, "j": "x\n",
    }  # fmt: skip
    assert isinstance(values["a"], Plain) and not isinstance(values["b"], Plain)


def test_nothing_is_interpolated(monkeypatch):
    monkeypatch.setenv("SECRET", "leaked")
    assert parse_config("a: ${env:SECRET}\nb: $SECRET\n", "c")[0] == {
        "a": "${env:SECRET}",
        "b": "$SECRET",
    }  # fault[S19]
