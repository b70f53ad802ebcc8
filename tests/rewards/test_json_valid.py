"""json_valid: what is JSON by the standard, and texts made to break a parser."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.errors import ConfigError
from rlx.rewards.json_valid import JsonValid, nesting


def make(**options):
    return JsonValid(JsonValid.Config(**options))


def one(text, **options):
    return make(**options)(completions=[text])[0]


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "null", "true", "0", "-1.5e+10", '"a"', '  {"a": [1, {"b": null}]}\n', '"\\u00e9"', "1e999",
     "9" * 5000, '{"a": 1, "a": 2}', '"]]]["'],
)  # fmt: skip
def test_json_counts(text):
    assert one(text) == 1.0


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "{'a': 1}", "{a: 1}", "[1,]", "NaN", "Infinity", "-Infinity", '{"a": NaN}', "[Infinity]",
     "01", "+1", ".5", "tru", '"a', '"a\nb"', "{} {}", 'Here it is: {"a": 1}', "```json\n{}\n```",
     "\ufeff{}"],
)  # fmt: skip
def test_anything_else_does_not(text):
    assert one(text) == 0.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def depth(value):
    inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(JSON, st.booleans())
def test_whatever_json_writes_counts_and_its_depth_is_found(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert nesting(text) == depth(value)
    assert one(text) == 1.0


@pytest.mark.parametrize(
    ("text", "levels"),
    [(r'["\\", [1]]', 2), (r'["\"", [1]]', 2), (r'["[\\\"[", 1]', 1), ('"[', 0), ("]]", 0), ("[] [[]]", 2)],
)
def test_brackets_in_strings_do_not_count_whatever_is_escaped(text, levels):
    assert nesting(text) == levels


@pytest.mark.parametrize("levels", [64, 65])
def test_too_deep_is_no_json(levels):
    assert one("[" * levels + "]" * levels) == float(levels <= 64)
    assert one('{"a":' * levels + "1" + "}" * levels) == float(levels <= 64)
    assert one("[" * 3 + "]" * 3, depth=2) == 0.0


@pytest.mark.parametrize(
    "text",
    ["[" * 1_000_000, '{"a":' * 200_000, "[" * 50_000 + "]" * 50_000, '"\\' * 50_000, '\\"' * 50_000,
     "```json\n" * 10_000, "9" * 1_000_000, " " * 1_000_000, "\ud800", "\x00"],
    ids=lambda text: f"fault[S12] {text[:8]!r}",
)  # fmt: skip
def test_hostile_text_costs_no_time(text):
    began = time.process_time()  # the clock of this process: others may keep the machine busy
    assert one(text) == 0.0
    assert one(text, fenced=True, keys=["a"]) == 0.0
    assert time.process_time() - began < 1.0


KEYS = ["a:integer", "b", "c:string"]


@pytest.mark.parametrize(
    ("value", "score"),
    [
        ({"a": 1, "b": None, "c": "x"}, 1.0),
        ({"a": 1, "b": [], "c": "x", "d": 0}, 1.0),
        ({"a": 1, "c": "x"}, 0.0),
        ({"a": 1.5, "b": 0, "c": "x"}, 0.0),
        ({"a": True, "b": 0, "c": "x"}, 0.0),
        ({"a": 1, "b": 0, "c": 3}, 0.0),
        ([1], 0.0),
        (1, 0.0),
    ],
)
def test_keys_and_their_types(value, score):
    assert one(json.dumps(value), keys=KEYS) == score


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        ("number", [1, 1.5]),
        ("integer", [1]),
        ("boolean", [True, False]),
        ("string", ["x"]),
        ("array", [[]]),
        ("object", [{}]),
        ("null", [None]),
    ],
)
def test_each_type_fits_its_own_values_alone(kind, fits):
    values = [1, 1.5, True, False, "x", [], {}, None]
    scores = [one(json.dumps({"k": value}), keys=[f"k:{kind}"]) for value in values]
    # 1 == True in Python, so they are compared by type too.
    own = [any(type(value) is type(fit) and value == fit for fit in fits) for value in values]
    assert scores == [float(fit) for fit in own]


def test_only_refuses_other_keys():
    assert [one('{"a": 1}', keys=["a"], only=True), one('{"a": 1, "b": 2}', keys=["a"], only=True)] == [
        1.0,
        0.0,
    ]
    assert [one("{}", only=True), one('{"a": 1}', only=True), one("[]", only=True)] == [1.0, 0.0, 0.0]


def test_a_fenced_block_counts_where_it_may():
    texts = ['```json\n{"a": 1}\n```', "```\n[]\n```\n", "{}", "See:\n```json\n{}\n```", "```json\n{\n```"]
    assert make(fenced=True)(completions=texts) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert make()(completions=texts) == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_a_name_may_hold_a_colon_if_a_type_follows():
    assert one('{"x:y": 1}', keys=["x:y:integer"]) == 1.0


@pytest.mark.parametrize("key", ["", ":string", "a:text", "a:"])
def test_an_unfit_key_is_a_config_error(key):
    with pytest.raises(ConfigError, match="unfit key"):
        make(keys=[key])
