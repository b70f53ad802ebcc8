"""Names, who offers them, and what happens when two do."""

from __future__ import annotations

import pytest

import rlx
from rlx.plugins.registry import registry
from rlx.testing import isolated


def brevity(completions, **columns):
    """Shorter is better."""
    return [-len(c) for c in completions]


@pytest.fixture(autouse=True)
def fresh():
    with isolated() as registry:
        yield registry


def test_register_as_a_call_and_as_a_decorator():
    rlx.register("reward", "brevity", brevity)

    @rlx.register("reward", "zeros", summary="nothing")
    def zeros(completions, **columns):
        return [0.0] * len(completions)

    assert rlx.get("reward", "brevity") is brevity
    assert rlx.resolve("reward", "zeros") is zeros
    assert {"brevity", "zeros"} <= set(rlx.available("reward"))
    entries = {entry.name: entry for entry in registry().list("reward")}
    assert entries["brevity"].summary == "Shorter is better." and entries["zeros"].summary == "nothing"
    assert entries["brevity"].plugin == __name__.partition(".")[0]


def test_entries_are_frozen(fresh):
    entry = fresh.list("algorithm")[0]
    with pytest.raises(AttributeError):
        entry.target = "evil:Target"


def test_a_cell_that_is_run_again_replaces_its_definition(fresh):
    def make():
        @rlx.register("reward", "again")
        def again(completions, **columns):
            return [0.0] * len(completions)

        return again

    make()
    second = make()
    assert rlx.get("reward", "again") is second


def test_another_definition_under_the_same_name_is_refused(fresh):
    rlx.register("reward", "mine", brevity)
    with pytest.raises(rlx.PluginError, match="offered twice"):
        rlx.register("reward", "mine", lambda completions, **columns: completions)


@pytest.mark.parametrize("fault", ["S7"], ids=["fault[S7]"])
def test_a_name_of_a_built_in_offered_again_is_an_error_at_use_and_not_before(fresh, fault):
    rlx.register("reward", "length", brevity)
    with pytest.raises(rlx.ConfigError) as caught:
        rlx.resolve("reward", "length")
    mine = f"{__name__.partition('.')[0]}/length"
    assert caught.value.code == "E-PLUGIN-AMBIGUOUS"
    assert "rlx/length" in str(caught.value) and mine in str(caught.value)
    assert rlx.resolve("reward", mine) is brevity
    assert rlx.resolve("reward", "rlx/length").__name__ == "Length"


@pytest.mark.parametrize(
    ("kind", "name", "target", "match"),
    [
        ("rewards", "x", brevity, "did you mean 'reward'"),
        ("reward", "a/b", brevity, "not a component's name"),
        ("reward", "", brevity, "not a component's name"),
        ("reward", "x", "my_pkg.Thing", "which attribute"),
    ],
)
def test_add_refuses_what_could_never_be_used(kind, name, target, match):
    with pytest.raises(rlx.PluginError, match=match):
        rlx.register(kind, name, target)


@pytest.mark.parametrize("fault", ["C11"], ids=["fault[C11]"])
def test_an_unknown_name_gets_a_suggestion_and_the_choices(fault):
    with pytest.raises(rlx.ConfigError) as caught:
        rlx.resolve("algorithm", "pppo")
    assert caught.value.exit_code == 2
    assert "did you mean 'ppo'" in caught.value.what and "ppo" in caught.value.expected


def test_a_name_of_another_kind_and_a_dotted_path_are_explained():
    with pytest.raises(rlx.ConfigError) as caught:
        rlx.resolve("reward", "ppo")
    assert caught.value.hint == "'ppo' is of kind algorithm"
    with pytest.raises(rlx.ConfigError) as caught:
        rlx.resolve("reward", "my_pkg.rewards.MyReward")
    assert "my_pkg.rewards:MyReward" in caught.value.hint


def test_isolated_gives_the_old_registry_back_also_after_an_exception():
    before = registry()
    with pytest.raises(ZeroDivisionError), isolated() as inner:
        rlx.register("reward", "brevity", brevity)
        assert registry() is inner and "brevity" in rlx.available("reward")
        raise ZeroDivisionError
    assert registry() is before and "brevity" not in rlx.available("reward")


def test_isolated_takes_plugins_as_if_they_were_installed():
    class Mine:
        @rlx.hookimpl
        def rlx_register(self, registry):
            registry.add("reward", "brevity", brevity)

    with isolated(Mine()) as inner:
        assert inner.find("reward", "brevity").plugin == "Mine"
        assert [plugin.name for plugin in inner.plugins()] == ["rlx", "Mine"]
