"""The JSON schema of run files says what rlx itself says of a file: the same verdict, option by option."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema
import pytest

import rlx
from rlx.core.commands.main import main
from rlx.core.config import from_mapping
from rlx.core.errors import RlxError
from rlx.core.options import Option, options, parse
from rlx.core.plain import Plain
from rlx.core.schema import option_schema, run_schema
from rlx.core.settings import Settings
from rlx.core.yaml_file import parse_config
from rlx.plugins.references import config_of
from rlx.plugins.registry import registry
from rlx.testing import isolated

ROOT = Path(__file__).resolve().parents[2]
INT = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def yaml_1_2(value: Any) -> Any:
    """What a reader of YAML 1.2 makes of values whose scalars are still text."""
    if isinstance(value, dict):
        return {key: yaml_1_2(item) for key, item in value.items()}
    if isinstance(value, list):
        return [yaml_1_2(item) for item in value]
    if not isinstance(value, Plain):
        return value
    if INT.fullmatch(value):
        return int(value)
    return float(value) if FLOAT.fullmatch(value) else str(value)


def validator() -> jsonschema.Draft202012Validator:
    said: list[str] = []
    schema = json.loads(json.dumps(run_schema(registry(), said.append)))
    assert said == []
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def builtin() -> Iterator[jsonschema.Draft202012Validator]:
    with isolated():
        yield validator()


def verdicts(text: str, schema: jsonschema.Draft202012Validator) -> tuple[bool, bool]:
    """Whether rlx takes the file, and whether the schema does."""
    values, places = parse_config(text, "file")
    try:
        from_mapping(values, places)
        taken = True
    except RlxError:
        taken = False
    return taken, schema.is_valid(yaml_1_2(values))


GOOD = [
    "reward: exact_match",
    "{algo: ppo, reward: [exact_match, {name: length, weight: 0.2, target: 12}], learning_rate: 1e-4}",
    "{algo: rlx/ppo, reward: rlx/exact_match, kl_coef: 0.05}",
    "{reward: length, length.target: 12}",
    "{reward: [length, {name: length, target: 3}], length_2.side: over}",
    "{reward: {name: exact_match, weight: 2}, reward_weight: []}",
    "{algo: dpo, beta: 0.2, max_length: 64, loss_type: [sigmoid, ipo]}",
    "{algo: dpo, max_prompt_length: 512}",
    "{algo: dpo, lora_target_modules: 'q_proj,v_proj', lora_r: 4}",
    "{reward: exact_match, columns: {prompt: question}, eval_steps: none, shuffle: false, plots: no}",
    "{reward: exact_match, generator: [transformers], save_total_limit: null, model: 7, warmup_steps: 1e1}",
    "{reward: exact_match, dataset: {name: wordmath, train_rows: 64, split: train}}",
    "{reward: exact_match, transform: {name: column_map, columns: {prompt: question}}}",
    "{algo: sft, packing: true, packing_strategy: wrapped}",
    "{algo: sft, gradient_checkpointing: true}",
    "{algo: sft, gradient_checkpointing: No}",
    "{algo: sft, gradient_checkpointing: auto}",
    "{algo: online_dpo, judge: {name: random, no_verdict: 0.5}, random.seed: 3}",
    "{algo: dpo, judge: null}",
]
BAD = [
    "{reward: exact_match, learning_rte: 1}",
    "{reward: exact_match, learning_rate: fast}",
    "{reward: exact_match, learning_rate: -1e-4}",
    "{reward: exact_match, learning_rate: '-1'}",
    "{reward: exact_match, top_p: 1.5}",
    "{reward: exact_match, batch_size: 0}",
    "{reward: exact_match, batch_size: 2.5}",
    "{reward: exact_match, batch_size: true}",
    "{reward: exact_match, batch_size: null}",
    "{reward: exact_match, shuffle: maybe}",
    "{reward: exact_match, dtype: float8}",
    "{reward: exact_match, stop_strings: {a: b}}",
    "{reward: exact_match, columns: prompt}",
    "{algo: sft, gradient_checkpointing: maybe}",
    "{algo: pppo, reward: exact_match}",
    "{algo: [ppo], reward: exact_match}",
    "{reward: exact_macth}",
    "{reward: ''}",
    "{reward: {weight: 1}}",
    "{reward: {name: exact_match, weight: much}}",
    "{reward: {name: length, tagret: 12}}",
    "{reward: {name: length, target: -1}}",
    "{reward: {name: length, side: left}}",
    "{reward: exact_match, length.target: 12}",
    "{reward: length, length.tagret: 12}",
    "{reward: length, length.target: -1}",
    "{reward: exact_match, lenght.target: 12}",
    "{reward: ppo}",
    "{reward: exact_match, beta: 0.2}",
    "{algo: dpo, kl_coef: 0.2}",
    "{algo: dpo, loss_type: sigmod}",
    "{algo: dpo, max_prompt_length: 64}",
    "{reward: exact_match, max_length: 64}",
    "{reward: exact_match, packing: true}",
    "{reward: exact_match, generator: [native, transformers]}",
    "{reward: exact_match, generator: natvie}",
    "{reward: exact_match, judge: random}",
    "{algo: online_dpo, judge: rnadom}",
    "{algo: online_dpo, judge: [random, random]}",
    "{reward: exact_match, callback: {name: health, loud: true}}",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_good_file_is_taken_by_both(text, builtin):
    assert verdicts(text, builtin) == (True, True), list(builtin.iter_errors(parse_config(text, "")[0]))


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_file_is_refused_by_both(text, builtin):
    assert verdicts(text, builtin) == (False, False)


def every_option() -> Iterator[Any]:
    with isolated() as found:
        owners = {"core": Settings} | {
            f"{entry.kind} {entry.name}": config_of(found.get(entry.kind, entry.name))
            for entry in found.list()
        }
    for owner, config in owners.items():
        for option in options(config).values():
            yield pytest.param(option, id=f"{owner}: {option.name}")


# Not 0.0: JSON has no other zero than 0, which is a way to say false.
PROBES = [
    *(-1e9, -2.5, -1, -0.5, 0, 0.25, 0.5, 0.999, 1, 1.5, 2, 3, 64, 1e9, True, False, None, [], {}),
    *("", "none", "None", "null", "true", "no", "word", "1e-4", "-1e-4", "1_000", "3", "-3", "0.5", "1e3"),
    *(
        [0.5],
        [1, 2],
        ["word"],
        ["a", 1],
        [None],
        [[1]],
        [True],
        {"a": "b"},
        {"a": 1},
        {"a": None},
        {"a": [1]},
    ),
]


@pytest.mark.parametrize("option", [*every_option()])
def test_of_one_value_it_says_what_rlx_says(option: Option):
    """Every option of every built-in component, on values of every sort, its bounds and its choices."""
    schema = jsonschema.Draft202012Validator(json.loads(json.dumps(option_schema(option))))
    bounds = [b for b in (option.gt, option.ge, option.lt, option.le) if b is not None]
    near = [n for b in bounds for n in (b, b + 1, b - 1, b + 1e-9, b - 1e-9)]
    differ = []
    for value in [*PROBES, *near, *option.choices, *([c] for c in option.choices)]:
        if option.name in (
            "algo",
            "dataset",
            "eval_dataset",
            "generator",
            "reward",
            "transform",
            "callback",
            "judge",
        ):
            continue  # these name components
        if bounds and isinstance(value, str) and FLOAT.fullmatch(value.replace("_", "")):
            continue  # of a number in quotes the sign alone is checked
        try:
            # Numbers and truth values reach rlx as the text that stands in the file.
            parse(option, Plain(json.dumps(value)) if type(value) in (int, float) else value)
            taken = True
        except ValueError:
            taken = False
        if taken != schema.is_valid(value):
            differ.append((value, "taken" if taken else "refused"))
    assert differ == [], f"{differ}"


def test_of_a_number_in_quotes_the_sign_is_checked(builtin):
    """Readers of YAML 1.1 make text of 1e-4; a schema cannot compare text with bounds."""
    for value, valid in (("1e-4", True), ("-1e-4", False), ("0.1.2", False), ("", False)):
        assert builtin.is_valid({"learning_rate": value}) == valid
    for value, valid in (("12", True), ("1e3", True), ("1.5", False), ("-12", False)):
        assert builtin.is_valid({"batch_size": value}) == valid


def test_every_yaml_file_of_the_pages_is_valid(builtin):
    fence = re.compile(r"^```yaml[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    texts = [
        text
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for text in fence.findall(page.read_text(encoding="utf-8"))
    ]
    assert len(texts) >= 4
    for text in texts:
        builtin.validate(yaml_1_2(parse_config(text, "page")[0]))


@pytest.mark.parametrize(
    "algo", [entry.name for entry in registry().list("algorithm") if entry.plugin == "rlx"]
)
def test_a_config_that_was_written_out_is_valid(algo, builtin):
    """Every option of a run with its value, as ``config.yaml`` of a run folder has it."""
    reward = (
        ["exact_match", {"name": "length", "weight": 0.5}]
        if rlx.get("algorithm", algo).eats == "prompts"
        else []
    )
    written = from_mapping({"algo": algo, "reward": reward}).to_yaml()
    builtin.validate(yaml_1_2(parse_config(written, "config.yaml")[0]))


class Politer(rlx.Reward):
    """Counts what is polite."""

    @dataclass(frozen=True)
    class Config:
        most: int = rlx.opt(2, "words that count", gt=0, unit="words", source="a book")

    def __call__(self, *, completions, **columns):
        return [0.0 for _ in completions]


class Gentle(rlx.Algorithm):
    """Learns gently."""

    @dataclass(frozen=True)
    class Config:
        gentleness: float = rlx.opt(0.5, "how gently", ge=0, le=1)

    defaults = MappingProxyType({"learning_rate": 1e-3})

    def loss(self, batch, now):
        return rlx.Loss({"tokens": -now.logps})


class Plugin:
    """Offers both."""

    @rlx.hookimpl
    def rlx_register(self, registry):
        registry.add("reward", "politer", Politer)
        registry.add("algorithm", "gentle", Gentle)


def test_the_options_of_a_plugin_are_in_it():
    with isolated(Plugin()):
        schema = validator()
        for text, expected in (
            ("{algo: gentle, gentleness: 0.2, reward: {name: politer, most: 3}}", True),
            ("{algo: gentle, reward: Plugin/politer, politer.most: 3}", True),
            ("{algo: gentle, gentleness: 2, reward: politer}", False),
            ("{algo: ppo, gentleness: 0.2, reward: politer}", False),
            ("{algo: gentle, kl_coef: 0.2, reward: politer}", False),
            ("{algo: gentle, reward: {name: politer, most: 0}}", False),
            ("{algo: gentle, reward: {name: politer, least: 1}}", False),
        ):
            assert verdicts(text, schema) == (expected, expected), text
    rules = schema.schema["$defs"]["reward"]["anyOf"][1]["allOf"]
    most = next(r for r in rules if r["if"] == {"properties": {"name": {"const": "politer"}}})["then"]
    assert most["properties"]["most"] == {
        "anyOf": [{"type": "integer", "exclusiveMinimum": 0}, most["properties"]["most"]["anyOf"][1]],
        "description": "words that count", "default": 2, "x-unit": "words", "x-source": "a book",
    }  # fmt: skip
    algo = next(r for r in schema.schema["allOf"] if r["if"]["properties"]["algo"] == {"const": "gentle"})
    assert algo["then"]["properties"]["learning_rate"] == {"default": 1e-3}


def test_names_that_two_plugins_offer_are_written_with_the_plugin():
    class Rude:
        @rlx.hookimpl
        def rlx_register(self, registry):
            registry.add("reward", "politer", Politer)

    with isolated(Plugin(), Rude()):
        schema = validator()
        assert verdicts("{reward: politer}", schema) == (False, False)
        assert verdicts("{reward: Rude/politer}", schema) == (True, True)


def test_a_component_that_does_not_load_is_told_and_left_open():
    class Broken:
        @rlx.hookimpl
        def rlx_register(self, registry):
            registry.add("reward", "absent", "no_such_module:Absent")

    said: list[str] = []
    with isolated(Broken()) as found:
        schema = jsonschema.Draft202012Validator(run_schema(found, said.append))
    assert len(said) == 1 and "reward Broken/absent does not load" in said[0]
    assert schema.is_valid({"reward": {"name": "absent", "whatever": 1}, "absent.other": 2})
    assert not schema.is_valid({"reward": {"name": "length", "whatever": 1}})


def test_what_a_reference_brings_is_left_open(builtin):
    assert builtin.is_valid({"algo": "./reinforce.py:Reinforce", "reward": "exact_match", "whatever": 3})
    assert builtin.is_valid({"reward": {"name": "my_pkg:MyReward", "partial": 0.2}, "MyReward.half_life": 3})
    assert not builtin.is_valid({"reward": "exact_match", "MyReward.half_life": 3})
    assert not builtin.is_valid({"reward": "my_pkg:MyReward", "whatever": 3})


def test_the_command_writes_it(tmp_path, capsys):
    file = tmp_path / "rlx.json"
    with isolated():
        assert main(["plugins", "schema", "--output", str(file)]) == 0
        assert "# yaml-language-server: $schema=" in capsys.readouterr().out
        assert main(["plugins", "schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text()) and printed["$schema"].endswith("2020-12/schema")
    jsonschema.Draft202012Validator.check_schema(printed)
    assert main(["plugins", "schema", "--output", str(tmp_path / "no" / "rlx.json")]) == 9
    assert "cannot be written" in capsys.readouterr().err
