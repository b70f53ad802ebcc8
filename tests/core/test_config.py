"""From flags, files and keywords to one checked config: precedence, sources, all problems, round trips."""

import dataclasses
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.core.config import RunConfig, from_mapping, parse_arguments
from rlx.core.errors import ConfigError, ErrorGroup, PluginError, RlxError
from rlx.core.foreign_names import FOREIGN_NAMES, REMARKS, our_name
from rlx.core.options import opt, options
from rlx.core.settings import Settings
from rlx.core.yaml_file import parse_config
from rlx.plugins.contract import Algorithm, Reward
from rlx.plugins.registry import Registry, discover, using

BASE = {"algo": "ppo", "reward": "exact_match", "output_dir": "runs/x"}


def flags(*words: str) -> RunConfig:
    values, where, positional = parse_arguments([*words, "--output-dir", "runs/x"])
    assert not positional
    return from_mapping(values, where)


def problems(values: dict, where: dict | None = None) -> list[RlxError]:
    with pytest.raises(RlxError) as caught:
        from_mapping(values, where)
    error = caught.value
    return error.problems if isinstance(error, ErrorGroup) else [error]


def said(values: dict, where: dict | None = None) -> str:
    return "\n".join(line for problem in problems(values, where) for line in problem.lines())


class Sum(Algorithm):
    """An algorithm for tests."""

    @dataclass(frozen=True)
    class Config:
        """Options."""

        beta: float = opt(0.1, "a weight", gt=0)
        parts: int = opt(1, "mini-batches", gt=0)
        loud: bool = opt(False, "a switch")
        names: list[str] = opt([], "names")
        max_seconds: int = opt(64, "longest step", gt=0)

        def __post_init__(self) -> None:
            if self.parts > 1 and self.beta > 1:
                raise ConfigError("parts > 1 needs beta <= 1", expected="parts 1, or beta at most 1")

    defaults = {"learning_rate": 0.25, "warmup_steps": 5}  # noqa: RUF012  # as plugin authors write it

    @property
    def mini_batches(self) -> int:
        return self.config.parts

    def loss(self, batch, now):
        return None


class Target(Reward):
    """A reward for tests."""

    @dataclass(frozen=True)
    class Config:
        """Options."""

        target: int = opt(50, "length", ge=0)
        pattern: str = opt("a,b", "a regular expression")

    def __call__(self, *, completions, **columns):
        return [0.0 for _ in completions]


class Bare:
    """A reward without Config: its constructor is its interface."""

    def __init__(self, size=1, mode="x"):
        self.size, self.mode = size, mode

    def __call__(self, *, completions, **columns):
        return [0.0 for _ in completions]


def brevity(completions, **columns):
    """A reward that is a function."""
    return [0.0 for _ in completions]


@pytest.fixture
def registered():
    """The built-ins, and the components above."""
    fresh = Registry()
    with using(fresh):
        found = discover()
        found.add("algorithm", "sum", Sum)
        found.add("reward", "target", Target)
        found.add("reward", "bare", Bare)
        yield found


def test_the_one_line_of_the_readme_is_a_config():
    config = flags("--algo", "ppo", "--reward", "exact_match")
    assert config.algorithm.name == "ppo"
    assert [(component.name, weight) for component, weight in config.rewards] == [("exact_match", 1.0)]
    assert config.generator.name == "native"
    assert config.settings.model == "tiny" and config.settings.dataset == "wordmath"


def test_nothing_given_needs_a_reward():
    [problem] = problems({"output_dir": "runs/x"})
    assert problem.hint == "rlx run --algo ppo --reward exact_match"


# Precedence: core defaults < algorithm < recipe < file < flags


def test_later_layers_win_and_are_recorded(registered):
    values, where = parse_config("seed: 7\nlearning_rate: 1e-3\nalgo: sum\nreward: target\n", "c.yaml")
    given_, places, _ = parse_arguments(["--learning-rate", "1e-2", "--output-dir", "runs/x", "--model", "m"])
    config = from_mapping({**values, **given_}, {**where, **places})
    assert config.settings.learning_rate == 0.01 and config.sources["learning_rate"] == "--learning-rate"
    assert config.settings.seed == 7 and config.sources["seed"] == "c.yaml:1:1"
    assert config.settings.warmup_steps == 5 and config.sources["warmup_steps"] == "algorithm sum"
    assert config.settings.top_p == 1.0 and config.sources["top_p"] == "default"
    assert config.algorithm_config.beta == 0.1 and config.sources["beta"] == "default"
    assert from_mapping({**BASE, "seed": 1}).sources["seed"] == "argument"


def test_the_recipe_is_for_the_embedded_pair_only():
    with_recipe, without = from_mapping(BASE), from_mapping({**BASE, "model": "some/model"})
    assert with_recipe.sources["learning_rate"] == "recipe wordmath"
    assert with_recipe.sources["num_ppo_epochs"] == "recipe wordmath"
    assert without.sources["learning_rate"] != "recipe wordmath"
    assert without.settings.learning_rate != with_recipe.settings.learning_rate
    given_ = from_mapping({**BASE, "learning_rate": 0.5})
    assert (
        given_.settings.learning_rate == 0.5 and given_.settings.batch_size == with_recipe.settings.batch_size
    )


def test_a_given_value_sets_aside_the_default_of_its_alternative(registered):
    config = from_mapping({**BASE, "algo": "sum", "reward": "target", "warmup_ratio": 0.1})
    assert (config.settings.warmup_steps, config.settings.warmup_ratio) == (0, 0.1)
    assert config.sources["warmup_steps"] == "default"
    assert "warmup_steps and warmup_ratio" in said(
        {**BASE, "warmup_steps": 3, "warmup_ratio": 0.1}
    )  # fault[C4]


def test_epochs_set_aside_the_recipes_steps():
    config = from_mapping({**BASE, "num_train_epochs": 3})
    assert config.settings.max_steps is None and config.settings.num_train_epochs == 3


# Strictness


@pytest.mark.parametrize("key", ["learning_rte"], ids=["fault[C1]"])
def test_unknown_options_are_told_with_place_and_suggestion(key):
    values, where = parse_config(
        f"algo: ppo\nreward: exact_match\n{key}: 1e-5\nkl_coeff: 1\nzzzz: 1\n", "config.yaml"
    )
    first, second, third = problems(values, where)
    assert first.lines() == [
        "[E-CONFIG-UNKNOWN] unknown option 'learning_rte'; did you mean 'learning_rate'?",
        "  where:    config.yaml:3:1",
    ]
    assert second.lines() == [
        "[E-CONFIG-UNKNOWN] unknown option 'kl_coeff'; did you mean 'kl_coef'?",
        "  where:    config.yaml:4:1",
    ]
    assert third.lines() == ["[E-CONFIG-UNKNOWN] unknown option 'zzzz'", "  where:    config.yaml:5:1"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_steps", "ten", "whole number or none"),
        ("seed", 1.5, "whole number"),
        ("shuffle", "perhaps", "true or false"),
        ("columns", "prompt", "mapping"),
        ("num_ppo_epochs", "many", "whole number"),
    ],
    ids=lambda value: f"fault[C2]-{value}",
)
def test_wrong_types(name, value, message):
    [problem] = problems({**BASE, name: value}, {name: "config.yaml:9:1"})
    assert (problem.where, problem.expected, problem.exit_code) == ("config.yaml:9:1", message, 2)
    assert problem.got == repr(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1), ("learning_rate", "nan"), ("kl_coef", float("nan")), ("cliprange", 0),
        ("max_completion_length", 0), ("temperature", "inf"), ("top_p", 1.5), ("reward_weight", "inf"),
        ("warmup_ratio", float("-inf")), ("lam", 1.01),
    ],
    ids=lambda value: f"fault[C3]-{value}",
)  # fmt: skip
def test_out_of_range(name, value):
    [problem] = problems({**BASE, name: value})
    assert problem.code == "E-CONFIG-VALUE" and "finite number" in problem.expected


def test_no_option_with_numbers_takes_one_that_is_not_finite(registered):
    config = from_mapping({**BASE, "algo": "sum", "reward": "target"})
    for name, value in config.to_mapping().items():
        if isinstance(value, float):
            assert "finite" in said({**BASE, "algo": "sum", "reward": "target", name: float("nan")}), name


@pytest.mark.parametrize(
    "values",
    [
        {"algo": "sum", "reward": "target", "parts": 2, "beta": 2},
        {"reference_model": "a", "reference_adapter": "b"},
        {"adapter": "a", "lora_r": 8},
        {"stop_token": "eos", "stop_token_id": 3},
    ],
    ids=lambda _: "fault[C4]",
)
def test_conflicts(values, registered):
    [problem] = problems({**BASE, **values})
    assert problem.exit_code == 2 and (problem.hint or problem.expected)


@pytest.mark.parametrize("completions", [1, 2], ids=["fault[C5]", "fault[C5]-two completions"])
def test_sizes_that_do_not_divide(completions, monkeypatch):
    # 10 rows in 4 mini-batches: 2.5 rows each. With two completions a prompt, 20 / 4 = 5 is fine; 3 is not.
    pieces = 4 if completions == 1 else 3
    values = {**BASE, "batch_size": 10, "num_mini_batches": pieces, "num_generations": completions}
    [problem] = problems(values)
    assert problem.exit_code == 2
    expected = {
        1: ("10 rows × 1 completions / (4 mini-batches × 1 processes) = 2.5",
            "batch_size 8 or 12 with 4 mini-batches; batch_size 10 with 2 or 5 mini-batches"),
        2: ("10 rows × 2 completions / (3 mini-batches × 1 processes) = 6.66667",
            "batch_size 9 or 12 with 3 mini-batches; batch_size 10 with 2 or 4 mini-batches"),
    }  # fmt: skip
    assert (problem.got, problem.expected) == expected[completions]
    assert from_mapping({**values, "num_mini_batches": 5}).algorithm_config.num_mini_batches == 5


def test_a_batch_divides_into_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    [problem] = problems({**BASE, "batch_size": 10, "num_mini_batches": 1, "num_generations": 1})
    assert problem.expected.startswith("batch_size 9 or 12")


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../b", "x\0y", "a b", "run\nname", "x" * 101, "runs/ü", "runs/..", "runs/x;rm", "\x1b[2J"],
    ids=lambda name: f"fault[C10]-{name[:6]!r}",
)
def test_unfit_run_names(name):
    [problem] = problems({**BASE, "output_dir": name})
    assert problem.code == "E-CONFIG-NAME" and "letters, digits" in problem.expected
    assert "\x1b" not in problem.what and "\n" not in problem.what


@pytest.mark.parametrize("name", ["runs/x", "/tmp/some where/run-1", "./a.b_c"])
def test_fit_run_names(name):
    assert from_mapping({**BASE, "output_dir": name}).settings.output_dir == name


def test_the_default_run_folder_names_algorithm_and_model(registered):
    values = {"algo": "sum", "reward": "target", "model": "org/My Model"}
    folder = from_mapping(values).settings.output_dir
    assert folder.startswith("runs/sum-My-Model-20")


def test_runs_begun_in_the_same_second_get_folders_of_their_own(registered, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlx.core.geometry.time.strftime", lambda form: "20260101-000000")
    found = []
    for _ in range(3):
        found.append(from_mapping({"algo": "sum", "reward": "target", "model": "m"}).settings.output_dir)
        (tmp_path / found[-1]).mkdir(parents=True)
    assert found == [f"runs/sum-m-20260101-000000{number}" for number in ("", "-2", "-3")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algo": "pppo"}, "there is no algorithm 'pppo'; did you mean 'ppo'?"),
        ({"reward": "exact_mach"}, "there is no reward 'exact_mach'; did you mean 'exact_match'?"),
        ({"callback": "nothing_like_it"}, "there is no callback 'nothing_like_it'"),
        ({"generator": "natve"}, "there is no generator 'natve'; did you mean 'native'?"),
    ],
    ids=lambda value: f"fault[C11]-{value}",
)
def test_unknown_names(values, message):
    [problem] = problems({**BASE, **values}, {next(iter(values)): "config.yaml:2:1"})
    assert problem.what == message and problem.exit_code == 2 and problem.where == "config.yaml:2:1"


def test_a_broken_plugin_is_mentioned_where_a_name_is_unknown(registered):
    from rlx.plugins.registry import Broken, Plugin

    registered.broken["acme"] = Broken(Plugin("acme", "rlx-acme", "1", "acme"), "no module named acme")
    assert "plugin 'acme' failed to load: no module named acme" in said({**BASE, "reward": "acme_reward"})


def test_a_missing_module_is_a_plugin_error():
    [problem] = problems({**BASE, "reward": "no_such_pkg.x:Y"})
    assert isinstance(problem, PluginError) and problem.exit_code == 4


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model_name_or_path", "model"), ("lr", "learning_rate"), ("cutoff_len", "max_prompt_length"),
        ("lora_rank", "lora_r"), ("response_length", "max_completion_length"), ("init_kl_coef", "kl_coef"),
        ("ppo_epochs", "num_ppo_epochs"), ("num_epochs", "num_train_epochs"), ("stage", "algo: ppo"),
        ("micro_batch_size", "per_device_train_batch_size"), ("base_model", "model"),
    ],
    ids=lambda name: f"fault[C12]-{name}",
)  # fmt: skip
def test_names_of_other_trainers_are_answered_with_ours(theirs, ours):
    [problem] = problems({**BASE, theirs: "1"}, {theirs: "llama_factory.yaml:4:1"})
    assert problem.lines() == [
        f"[E-CONFIG-UNKNOWN] unknown option {theirs!r}",
        "  where:    llama_factory.yaml:4:1",
        f"  do this:  rlx calls it {ours}",
    ]


def test_foreign_names_lead_to_names_that_exist(registered):
    known = {*options(Settings), "resume"}
    for algorithm in registered.list("algorithm"):
        known |= set(options(registered.get("algorithm", algorithm.name).Config))
    dangling = {
        name: ours for name, ours in FOREIGN_NAMES.items() if name not in REMARKS and not known & set(ours)
    }
    assert dangling == {}
    assert not set(FOREIGN_NAMES) & set(options(Settings))
    assert len(FOREIGN_NAMES) >= 40


def test_the_answer_depends_on_what_the_algorithm_has():
    assert our_name("cutoff_len", {"max_length", "max_prompt_length"}) == "max_length"
    assert our_name("cutoff_len", {"max_prompt_length"}) == "max_prompt_length"
    assert our_name("never_heard", set()) == ""


def test_everything_wrong_is_told_at_once(registered):
    values = {
        "reward": ["target", "nope"], "seed": "x", "beta": -1, "lr": 1, "algo": "sum",
        "target.colour": 1, "missing.x": 1, "output_dir": "runs/x",
    }  # fmt: skip
    text = said(values)
    for part in ("reward 'nope'", "'seed'", "'beta'", "learning_rate", "'colour'", "'missing'"):
        assert part in text, part
    assert len(problems(values)) == 6


# Components


def test_options_of_a_component_from_flags_and_from_yaml_agree(registered):
    by_flag = flags("--algo", "sum", "--reward", "target", "--target.target", "5", "--reward-weight", "0.5")
    text = "algo: sum\noutput_dir: runs/x\nreward: {name: target, weight: 0.5, target: 5}\n"
    by_file = from_mapping(*parse_config(text, "c.yaml"))
    assert by_flag == by_file
    assert by_flag.rewards[0][0].options == {"target": 5, "pattern": "a,b"} and by_flag.rewards[0][1] == 0.5


def test_several_rewards_get_their_weights_in_order(registered):
    config = flags(
        "--reward", "target", "--reward", "exact_match", "--reward-weight", "2", "--reward-weight", "0.5"
    )
    assert [(component.name, weight) for component, weight in config.rewards] == [
        ("target", 2.0),
        ("exact_match", 0.5),
    ]
    assert from_mapping(
        {**BASE, "reward": [{"name": "target", "weight": 3}, "bare"]}
    ).settings.reward_weight == [3.0, 1.0]


def test_weights_that_do_not_match():
    assert "one number a reward" in said({**BASE, "reward_weight": [1, 2]})
    assert "given twice" in said(
        {**BASE, "reward": {"name": "exact_match", "weight": 1}, "reward_weight": [1]}
    )
    assert "expected: a finite number" in said({**BASE, "reward": {"name": "exact_match", "weight": "nan"}})


def test_the_same_reward_twice_gets_two_names(registered):
    config = flags("--reward", "target", "--reward", "target", "--target_2.target", "9")
    assert [component.name for component, _ in config.rewards] == ["target", "target_2"]
    assert [component.options["target"] for component, _ in config.rewards] == [50, 9]


def test_dotted_options_of_something_that_was_not_chosen(registered):
    [problem] = problems({**BASE, "reward": "target", "taget.target": 1}, {"taget.target": "--taget.target"})
    assert problem.lines() == [
        "[E-CONFIG-UNKNOWN] option 'taget.target': no component called 'taget' is chosen; "
        "did you mean 'target'?",
        "  where:    --taget.target",
        "  expected: one of target, native",
        "  do this:  choose it too, for example --reward taget",
    ]


def test_places_inside_a_component_are_told(registered):
    text = "reward:\n  - name: target\n    taget: 5\n"
    [problem] = problems(*parse_config(text, "c.yaml"))
    assert problem.where == "c.yaml:3:5" and "did you mean 'target'" in problem.what


def test_a_class_without_config_takes_its_options_as_they_look(registered):
    config = flags("--reward", "bare", "--bare.size", "3", "--bare.mode", "x")
    assert config.rewards[0][0].options == {"size": 3, "mode": "x"}
    made = config.rewards[0][0].make()
    assert (made.size, made.mode) == (3, "x")


def test_a_function_takes_no_options():
    config = from_mapping({**BASE, "reward": brevity})
    assert config.rewards[0][0].make() is brevity and config.rewards[0][0].name == "brevity"
    assert "no options at all" in said({**BASE, "reward": {"name": brevity, "x": 1}})


def test_an_algorithm_that_reuses_a_core_name_is_refused(registered):
    class Greedy(Sum):
        """Takes a core name."""

        @dataclass(frozen=True)
        class Config:
            """Options."""

            learning_rate: float = opt(1.0, "mine now")

    [problem] = problems({**BASE, "algo": Greedy, "reward": "target"})
    assert isinstance(problem, PluginError) and "learning_rate" in problem.what


def test_an_algorithm_default_for_nothing_is_refused(registered):
    class Wrong(Sum):
        """Sets a default of an option that is not there."""

        defaults = {"learning_rte": 1}  # noqa: RUF012

    assert "learning_rte" in said({**BASE, "algo": Wrong, "reward": "target"})


# Batch size in parts


def test_batch_size_in_parts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = from_mapping({**BASE, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8})
    assert config.settings.batch_size == 4 * 8 * 2
    assert config.sources["batch_size"] == "argument"


def test_batch_size_and_parts_that_disagree():
    [problem] = problems(
        {**BASE, "batch_size": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    )
    assert problem.got == "4 a device × 2 accumulation steps × 1 processes = 8, batch_size = 32"
    assert "says nothing without" in said({**BASE, "gradient_accumulation_steps": 2})


# Flags


def test_flags_in_all_their_forms():
    words = "--learning-rate=1e-5 --no-shuffle --plots false --trust-remote-code c.yaml --columns prompt=q"
    values, where, positional = parse_arguments([*words.split(), "--columns", "answer=a=b"])
    assert values == {
        "learning_rate": "1e-5", "shuffle": "false", "plots": "false", "trust_remote_code": "true",
        "columns": {"prompt": "q", "answer": "a=b"},
    }  # fmt: skip
    assert positional == ["c.yaml"]
    assert where["learning_rate"] == "--learning-rate" and where["shuffle"] == "--no-shuffle"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gradient-checkpointing", True),
        ("--gradient-checkpointing --plots", True),
        ("--gradient-checkpointing true", True),
        ("--gradient-checkpointing=off", False),
        ("--no-gradient-checkpointing", False),
        ("--gradient-checkpointing auto", "auto"),
        ("", "auto"),
    ],
)
def test_a_switch_that_may_be_left_to_the_run(words, expected):
    config = flags("--reward", "exact_match", *words.split())
    assert config.settings.gradient_checkpointing is expected
    assert reloaded(config).settings.gradient_checkpointing is expected


@pytest.mark.parametrize(
    ("written", "expected"), [("true", True), ("no", False), ('"true"', True), ("auto", "auto")]
)
def test_such_a_switch_in_a_file(written, expected):
    values, where = parse_config(f"{{reward: exact_match, gradient_checkpointing: {written}}}", "file")
    assert from_mapping(values, where).settings.gradient_checkpointing is expected


def test_a_switch_leaves_other_words_alone():
    assert parse_arguments(["--gradient-checkpointing", "config.yaml"])[2] == ["config.yaml"]
    [problem] = problems({**BASE, "gradient_checkpointing": "maybe"}, {})
    assert problem.expected == "auto | true | false"


def test_flags_of_the_algorithm(registered):
    config = flags(
        "--algo", "sum", "--reward", "target", "--loud", "--names", "a", "--names", "b", "--beta", "1e-1"
    )
    assert config.algorithm_config == Sum.Config(loud=True, names=["a", "b"])
    assert flags("--algo", "sum", "--reward", "target", "--no-loud").algorithm_config.loud is False


def test_a_negative_number_is_a_value():
    values, _, _ = parse_arguments(["--reward-error-value", "-1"])
    assert values == {"reward_error_value": "-1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-x"], "'-x' is no flag"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--plots"], "--seed needs a value"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["--columns", "prompt"], "--columns prompt: no mapping"),
        (["--no-seed"], "--no-seed: seed is no switch"),
        (["--loss-weights", "1", "0.5"], "'0.5' after --loss-weights is neither its value nor a config file"),
    ],
)
def test_flags_that_are_wrong(words, message):
    with pytest.raises(ConfigError) as caught:
        parse_arguments(words)
    assert caught.value.what == message and caught.value.exit_code == 2


def test_a_repeated_flag_of_a_plain_option_is_refused(registered):
    [problem] = problems(
        *parse_arguments(["--algo", "sum", "--reward", "target", "--beta", "1", "--beta", "2"])[:2]
    )
    assert problem.got == "['1', '2']"


# Round trip


def reloaded(config: RunConfig) -> RunConfig:
    return from_mapping(*parse_config(config.to_yaml(), "config.yaml"))


def test_the_resolved_config_loads_back():
    config = flags(
        "--reward", "exact_match", "--reward", "length", "--length.target", "7", "--stop-strings", "a, b"
    )
    assert reloaded(config) == config
    assert reloaded(config).sources["learning_rate"].startswith("config.yaml:")


numbers = st.floats(min_value=1e-12, max_value=1e12, allow_nan=False)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20)


@settings(max_examples=50)
@given(
    learning_rate=numbers,
    beta=numbers,
    texts_=st.lists(texts, max_size=3),
    model_revision=st.one_of(
        st.none(), st.sampled_from(["1e5", "007", "null", "true", "0x1f", "12:30", "no", "~"]), texts
    ),
    system_prompt=st.one_of(st.none(), texts),
    columns=st.dictionaries(texts.filter(lambda t: t not in ("", "<<")), texts, max_size=3),
    shuffle=st.booleans(),
    max_steps=st.one_of(st.none(), st.integers(1, 10**18)),
)
def test_any_config_loads_back(
    learning_rate, beta, texts_, model_revision, system_prompt, columns, shuffle, max_steps
):
    config = from_mapping({
        "algo": Sum, "reward": Target, "learning_rate": learning_rate, "beta": beta, "stop_strings": texts_,
        "names": texts_, "model_revision": model_revision, "system_prompt": system_prompt,
        "columns": columns, "shuffle": shuffle, "max_steps": max_steps, "output_dir": "runs/x",
    })  # fmt: skip
    values, where = parse_config(config.to_yaml(), "config.yaml")
    again = from_mapping({**values, "algo": Sum, "reward": Target}, where)
    ours, theirs = again.to_mapping(), config.to_mapping()
    assert {k: v for k, v in ours.items() if k != "reward"} == {
        k: v for k, v in theirs.items() if k != "reward"
    }
    assert again.settings == dataclasses.replace(config.settings, reward=again.settings.reward)


def test_a_stray_word_may_be_too_long_for_a_file_name():
    with pytest.raises(ConfigError, match="after --loss-weights is neither"):
        parse_arguments(["--loss-weights", "1", "x" * 5000])


def test_a_path_from_python_is_its_text(tmp_path):
    config = from_mapping({**BASE, "output_dir": tmp_path / "run", "model": tmp_path / "model"})
    assert config.settings.output_dir == f"{tmp_path}/run" and config.settings.model == f"{tmp_path}/model"
    again, where = parse_config(config.to_yaml(), "config.yaml")
    assert from_mapping(again, where).settings == config.settings


def test_secrets_are_not_written():
    config = from_mapping({**BASE, "dataset": "https://me:hunter2@host/data.jsonl"})
    assert "hunter2" not in config.to_yaml()  # fault[S17]


def test_objects_are_written_as_references_or_marked():
    local = from_mapping({**BASE, "reward": lambda completions, **columns: [0.0] * len(completions)})
    assert "<object given in Python: function>" in local.to_yaml()
    assert f"{__name__}:brevity" in from_mapping({**BASE, "reward": brevity}).to_yaml()


# The surface

CORE_FLAGS = """
algo reward reward_weight reward_on_error reward_error_value overlap_rewards judge transform callback
generator no_plugin strict_plugins model model_revision tokenizer trust_remote_code dtype attn_implementation
reference_model reference_adapter sync_ref_model ref_model_mixup_alpha ref_model_sync_steps value_model
value_learning_rate gradient_checkpointing upcast_norms generation_dtype disable_dropout lora_r lora_alpha
lora_dropout lora_target_modules adapter dataset dataset_config dataset_split eval_dataset columns
system_prompt chat_template precompute_ref_log_probs max_prompt_length prompt_overflow max_length
truncation_mode packing packing_strategy completion_only_loss assistant_only_loss on_bad_row max_bad_rows
max_rows max_eval_rows shuffle max_completion_length temperature top_p top_k min_p repetition_penalty
stop_strings generation_batch_size recompute_logps learning_rate batch_size per_device_train_batch_size
gradient_accumulation_steps max_tokens_per_micro_batch share_prefix max_steps num_train_epochs
lr_scheduler_type warmup_steps warmup_ratio optim adam_beta1 adam_beta2 adam_epsilon weight_decay
max_grad_norm nonfinite mixed_precision seed output_dir overwrite_output_dir logging_steps eval_steps
save_steps save_total_limit log_completions report_to track_completions plots progress
""".split()


def test_core_flags_are_frozen():
    assert list(options(Settings)) == CORE_FLAGS


@pytest.mark.parametrize(
    ("option", "value"), [("max_length", 77), ("packing", True), ("assistant_only_loss", True)]
)
def test_an_option_for_other_data_is_refused(option, value):
    [problem] = problems({**BASE, option: value}, {option: "c.yaml:2:1"})
    assert problem.what.startswith(f"{option} is an option for ")
    assert problem.what.endswith(" eats prompts") and problem.where == "c.yaml:2:1"
    # A config that was written out names every option with its default.
    default = options(Settings)[option].default
    assert getattr(from_mapping({**BASE, option: default}).settings, option) == default


def test_the_chat_template_none_is_plain_text_and_not_an_option_left_out():
    from rlx.plugins.transforms.chat import ChatTemplate

    assert from_mapping(BASE).settings.chat_template == "auto"
    for config in (
        flags("--algo", "sft", "--chat-template", "none"),
        from_mapping({**BASE, "chat_template": "none"}),
    ):
        template = config.settings.chat_template
        assert template == "none"
        assert not ChatTemplate(ChatTemplate.Config(template=template)).templated(Templated())


class Templated:
    """A tokenizer with a chat template."""

    chat_template = "{{ messages[0].content }}"
