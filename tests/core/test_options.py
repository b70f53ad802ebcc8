"""Options: declared once, parsed from text, YAML and Python alike, checked against their bounds."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.core.errors import ConfigError, ErrorGroup
from rlx.core.options import Option, build, close, is_list, opt, options, parse, type_name
from rlx.core.plain import Plain, scalar


def option(kind: Any, default: Any = None, **more: Any) -> Option:
    return Option("x", kind, default, "doc", **more)


SWITCH = Literal["auto", True, False]
PARSED = [
    (float, "1e-5", 1e-5), (float, 3, 3.0), (float, "1_000.5", 1000.5), (float, "-2", -2.0),
    (int, "7", 7), (int, "1e3", 1000), (int, 5.0, 5), (int, "1_000", 1000),
    (int, "12345678901234567891", 12345678901234567891),
    (bool, "yes", True), (bool, "off", False), (bool, True, True), (bool, "0", False),
    (str, "1e-5", "1e-5"), (str, 5, "5"),
    (int | None, "none", None), (int | None, None, None), (int | None, "4", 4), (int | None, "null", None),
    (int | str, Plain("4"), 4), (int | str, "4", "4"), (int | str, "a", "a"),
    (float | str, Plain("0.5"), 0.5), (str | int, 3, 3),
    (list[int], "1,2,3", [1, 2, 3]), (list[int], ["1", "2,3"], [1, 2, 3]), (list[float], 2, [2.0]),
    (list[str], "a,b", ["a,b"]), (list[str], ["a", "b"], ["a", "b"]), (tuple[int, ...], [1], (1,)),
    (dict[str, str], {"a": "b"}, {"a": "b"}), (dict[str, int], {"a": "3"}, {"a": 3}),
    (dict, {"a": Plain("3")}, {"a": 3}),
    (Literal["a", "b"], "b", "b"), (Literal[1, 2], "2", 2), (Any, Plain("1e-5"), 1e-5), (Any, "1e-5", "1e-5"),
    (list[str] | None, ["a"], ["a"]),
    *((SWITCH, given, True) for given in (True, "true", Plain("True"), "yes", Plain("on"), Plain("1"))),
    *((SWITCH, given, False) for given in (False, "false", Plain("no"), "off")),
    (SWITCH, "auto", "auto"), (SWITCH, Plain("auto"), "auto"), (Literal[0, 1], 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given_", "expected"), PARSED)
def test_values_become_what_the_annotation_says(kind, given_, expected):
    got = parse(option(kind), given_)
    assert got == expected and type(got) is type(expected)


WRONG = [
    (float, "ten", "number"), (float, True, "number"), (int, "1.5", "whole number"),
    (int, None, "whole number"), (bool, "maybe", "true or false"), (bool, 1, "true or false"),
    (str, None, "text"), (str, True, "text"), (str, ["a"], "text"),
    (int | None, "x", "whole number or none"), (list[int], "1,x", "whole number"),
    (dict[str, str], "a=b", "mapping"), (Literal["a", "b"], "c", "a | b"), (float, [1.0, 2.0], "number"),
    (SWITCH, "maybe", "auto | true | false"), (SWITCH, 1, "auto | true | false"), (SWITCH, None, "auto"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "given_", "message"), WRONG, ids=lambda v: "fault[C2]" if isinstance(v, str) else None
)
def test_wrong_types_say_what_is_wanted(kind, given_, message):
    with pytest.raises(ValueError) as caught:
        parse(option(kind), given_)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, "nan", "inf", "-inf", "1e999", ".nan"], ids=lambda v: f"fault[C3]-{v}"
)
def test_no_option_takes_a_number_that_is_not_finite(value):
    for kind in (float, int, float | None, list[float], dict[str, float]):
        inside = {"a": value} if kind == dict[str, float] else value
        with pytest.raises(ValueError):
            parse(option(kind), inside)


@pytest.mark.parametrize(
    "value", [math.nan, [1.0, math.inf], {"a": [math.nan]}, Plain("inf")], ids=lambda _: "fault[C3]"
)
def test_not_even_one_without_a_type(value):
    with pytest.raises(ValueError, match="finite"):
        parse(option(Any), value)


def test_bounds_are_kept_and_told():
    bounded = option(float, gt=0, le=1)
    assert parse(bounded, "1") == 1.0
    for outside in ("0", "1.01", "-1"):
        with pytest.raises(ValueError, match="a finite number > 0, <= 1"):
            parse(bounded, outside)
    with pytest.raises(ValueError, match=">= 0, < 5"):
        parse(option(list[int], ge=0, lt=5), "1,5")


def test_choices_are_told_with_the_near_one():
    with pytest.raises(ValueError, match=r"one of cosine, linear; did you mean 'linear'\?"):
        parse(option(str, choices=("cosine", "linear")), "linaer")


def test_names_split_at_commas_only_where_declared():
    assert parse(option(list[str], commas=True), "a, b,") == ["a", "b"]
    assert parse(option(list[str], commas=True), ["a,b", "c"]) == ["a", "b", "c"]
    assert parse(option(list[str]), ["x{1,2}", "./a,b.py:C"]) == ["x{1,2}", "./a,b.py:C"]


def test_plain_text_reads_as_what_it_looks_like():
    given_ = {"a": [Plain("1"), Plain("0.5"), Plain("true"), Plain("none"), Plain("x"), "1"]}
    assert scalar(given_) == {"a": [1, 0.5, True, None, "x", "1"]}
    assert all(type(item) is not Plain for item in scalar(given_)["a"])


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example."""

    rate: float = opt(0.1, "a rate", gt=0, unit="1/s", source="somewhere")
    names: list[str] = opt(["a"], "names")
    needed: int = opt(doc="must be given")
    hidden: int = dataclasses.field(init=False, default=3)

    def __post_init__(self) -> None:
        if self.rate > self.needed:
            raise ValueError("rate must not pass needed")


def test_declarations_are_read_back():
    found = options(Example)
    assert list(found) == ["rate", "names", "needed"]
    assert found["rate"].bounds == "> 0" and found["rate"].unit == "1/s" and found["rate"].doc == "a rate"


def test_an_option_without_a_doc_is_refused():
    with pytest.raises(TypeError, match="doc is missing"):
        opt(3)


def test_a_field_without_opt_is_refused():
    @dataclass
    class Bad:
        x: int = 3

    with pytest.raises(TypeError, match=r"Bad\.x is declared without"):
        options(Bad)
    with pytest.raises(TypeError, match="no dataclass"):
        options(int)


def test_list_defaults_are_not_shared():
    build(Example, {"needed": 1}, owner="x").names.append("b")
    assert build(Example, {"needed": 1}, owner="x").names == ["a"]


def test_all_problems_are_told_at_once():
    with pytest.raises(ErrorGroup) as caught:
        build(
            Example,
            {"rte": 1, "rate": "-1"},
            owner="reward x",
            where={"rte": "c.yaml:1:1", "rate": "--x.rate"},
        )
    assert caught.value.lines() == [
        "[E-CONFIG-UNKNOWN] reward x has no option 'rte'; did you mean 'rate'?",
        "  where:    c.yaml:1:1",
        "  expected: rate, names, needed",
        "[E-CONFIG-VALUE] option 'rate' of reward x has a value that is not allowed",
        "  where:    --x.rate",
        "  got:      '-1'",
        "  expected: a finite number > 0",
        "[E-CONFIG-MISSING] reward x needs the option 'needed': must be given",
    ]


def test_a_rule_between_options_is_a_config_error():
    with pytest.raises(ConfigError, match="rate must not pass needed"):
        build(Example, {"rate": 2, "needed": 1}, owner="reward x")  # fault[C4]


def test_a_secret_value_is_not_told():
    @dataclass(frozen=True)
    class Remote:
        """Options."""

        api_token: int = opt(0, "a number")

    with pytest.raises(ConfigError) as caught:
        build(Remote, {"api_token": "hunter2"}, owner="x")  # fault[S17]
    assert "hunter2" not in "\n".join(caught.value.lines())


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
def test_numbers_survive_the_way_through_text(number):
    kind = type(number)
    assert parse(option(kind), str(number)) == number


@given(st.text())
def test_text_survives(text):
    assert parse(option(str), text) == text
    assert parse(option(list[str]), [text]) == [text]


def test_types_are_named_for_people():
    assert type_name(float | None) == "number or none"
    assert type_name(list[int]) == "list of whole number"
    assert type_name(dict[str, str]) == "mapping"


def test_which_options_may_be_repeated():
    kinds = (list[str], list[int] | None, dict[str, str], str, int | None)
    assert [is_list(option(kind)) for kind in kinds] == [True, True, True, False, False]


def test_suggestions():
    assert close("learning-rte", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert close("zzz", ["learning_rate"]) == ""
