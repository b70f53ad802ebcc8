"""Installed plugins are found one by one; a broken one breaks nothing but itself."""

from __future__ import annotations

import sys

import pytest

import rlx
from rlx.plugins.registry import discover, registry

REWARD = "def reward(completions, **columns):\n    return [1.0] * len(completions)\n"


def registering(*components, extra=""):
    """Source of a plugin that offers ``(kind, name, target)`` components."""
    adds = "\n".join(
        f"    registry.add({kind!r}, {name!r}, {target!r}, 'made by a test')"
        for kind, name, target in components
    )
    return f"import rlx\n\n@rlx.hookimpl\ndef rlx_register(registry):\n{adds or '    pass'}\n\n{extra}"


def good(name="fine"):
    return registering(("reward", name, f"rlx_{name}:reward"), extra=REWARD)


REGISTER = "import rlx\n\n@rlx.hookimpl\ndef rlx_register(registry):\n    {}\n"

# id, source, what the reason says, what the traceback says
BROKEN = [
    ("fault[P1]-import-error", "raise ImportError('no libfoo')", "no libfoo", "raise ImportError"),
    ("fault[P1]-missing-dependency", "import no_such_library", "no_such_library", "import no_such_library"),
    ("fault[P1]-syntax-error", "def (", "SyntaxError", "def ("),
    ("fault[P2]-system-exit", "raise SystemExit(0)", "SystemExit", "raise SystemExit"),
    (
        "fault[P2]-circular-import",
        "from rlx_bad import later\nlater = 1",
        "circular import",
        "from rlx_bad import later",
    ),
    ("fault[P2]-register-exits", REGISTER.format("raise SystemExit"), "SystemExit", "raise SystemExit"),
    ("fault[P2]-register-raises", REGISTER.format("1 / 0"), "division by zero", "1 / 0"),
    (
        "fault[P3]-unknown-argument",
        "import rlx\n@rlx.hookimpl\ndef rlx_register(registri): pass",
        "no argument 'registri'; did you mean 'registry'",
        "",
    ),
    (
        "fault[P3]-any-arguments",
        "import rlx\n@rlx.hookimpl\ndef rlx_validate(**kwargs): pass",
        "**kwargs",
        "",
    ),
    (
        "fault[P4]-misspelt-hook",
        "import rlx\n@rlx.hookimpl\ndef rlx_registers(registry): pass",
        "no hook 'rlx_registers'; did you mean 'rlx_register'",
        "",
    ),
    ("fault[P4]-unmarked-hook", "def rlx_register(registry): pass", "rlx_register is not marked", ""),
    ("fault[P4]-no-hook", "x = 1", "implements no hook", ""),
    ("fault[P9]-unknown-kind", registering(("rewards", "x", "a:b")), "did you mean 'reward'", "registry.add"),
]


@pytest.mark.parametrize(
    ("source", "reason", "traceback"), [case[1:] for case in BROKEN], ids=[c[0] for c in BROKEN]
)
def test_a_broken_plugin_is_recorded_with_its_reason_and_others_load(site, source, reason, traceback):
    site.install("bad", source)
    site.install("fine", good())
    found = discover()
    assert reason in found.broken["bad"].reason
    assert traceback in found.broken["bad"].traceback
    assert [plugin.name for plugin in found.plugins()] == ["rlx", "fine"]
    assert rlx.resolve("reward", "fine")(["a"]) == [1.0]

    with pytest.raises(rlx.ConfigError) as unknown:
        rlx.resolve("reward", "toxicity")
    assert any("'bad' failed to load" in note and reason[:40] in note for note in unknown.value.__notes__)
    assert len(unknown.value.lines()) <= 12

    with pytest.raises(rlx.PluginError) as used:
        rlx.resolve("reward", "bad/toxicity")
    assert used.value.exit_code == 4
    assert "rlx-bad 0.1" in used.value.where and used.value.__cause__ is found.broken["bad"].error

    with pytest.raises(rlx.PluginError, match="'bad' failed to load"):
        discover(strict=True)


@pytest.mark.parametrize("fault", ["P2"], ids=["fault[P2]"])
def test_an_entry_point_whose_attribute_is_missing_names_the_close_match(site, fault):
    site.install("bad", "import rlx\nplugin = 1", value="rlx_bad:plugins")
    assert "no 'plugins'; did you mean 'plugin'" in discover().broken["bad"].reason


def test_a_module_that_a_package_lacks_is_told_with_those_that_it_has(site):
    site.install("bad", "x = 1", value="rlx_pack.plugins")
    (site.path / "rlx_pack").mkdir()
    for module in ("__init__", "plugin", "rewards"):
        (site.path / "rlx_pack" / f"{module}.py").write_text("")
    discover()
    with pytest.raises(rlx.PluginError) as used:
        rlx.resolve("reward", "bad/brevity")
    assert used.value.hint.startswith(
        "rlx_pack has plugin, rewards; did you mean 'plugin'?; repair or uninstall"
    )


def test_a_hook_that_is_almost_named_so_and_not_marked_is_told(site):
    site.install("bad", "def rlx_registers(registry): pass")
    reason = discover().broken["bad"].reason
    assert reason.startswith("rlx_registers is no hook; did you mean 'rlx_register'? it implements no hook")


@pytest.mark.parametrize(
    ("components", "offers"),
    [((), "nothing: its rlx_register adds nothing"), ((("reward", "brief", "a:b"),), "reward brief")],
)
def test_the_name_of_a_plugin_in_the_place_of_a_component_is_told(site, components, offers):
    site.install("polite", registering(*components))
    discover()
    with pytest.raises(rlx.ConfigError) as unknown:
        rlx.resolve("reward", "polite")
    assert f"'polite' is a plugin, and offers {offers}" in unknown.value.hint


def test_nothing_stays_of_a_plugin_that_fails_half_way(site):
    site.install(
        "bad", registering(("reward", "early", "rlx_bad:reward"), ("nonsense", "late", "rlx_bad:reward"))
    )
    found = discover()
    assert "bad" in found.broken and "early" not in rlx.available("reward")
    assert not found.manager.has_plugin("bad")


@pytest.mark.parametrize("fault", ["P5", "S7"], ids=["fault[P5]", "fault[S7]"])
def test_a_name_offered_twice_is_an_error_at_use_that_names_both(site, fault):
    site.install("one", registering(("reward", "helpfulness", "rlx_one:reward"), extra=REWARD))
    clash = ("reward", "helpfulness", "rlx_two:reward"), ("reward", "length", "rlx_two:reward")
    site.install("two", registering(*clash, extra=REWARD), version="0.2")
    assert discover().broken == {}
    for name, offers in [
        ("helpfulness", ["one/helpfulness (rlx-one 0.1)", "two/helpfulness (rlx-two 0.2)"]),
        ("length", ["rlx/length (rlx 0.1.0)", "two/length (rlx-two 0.2)"]),
    ]:
        with pytest.raises(rlx.ConfigError) as caught:
            rlx.resolve("reward", name)
        assert caught.value.got == ", ".join(offers)
    assert rlx.resolve("reward", "two/length").__module__ == "rlx_two"
    assert rlx.resolve("reward", "rlx/length").__module__ == "rlx.rewards.length"


@pytest.mark.parametrize("fault", ["P5"], ids=["fault[P5]"])
def test_two_distributions_with_one_plugin_name_are_both_refused_until_one_is_blocked(site, fault):
    site.install("same", good("one"), distribution="rlx-one")
    site.install("same", good("two"), distribution="rlx-two")
    assert "rlx-one 0.1, rlx-two 0.1" in discover().broken["same"].reason
    assert "rlx_one" not in sys.modules and "rlx_two" not in sys.modules
    found = discover(no_plugins=["rlx-two"])
    assert found.broken == {} and found.find("reward", "one").qualified == "same/one"


@pytest.mark.parametrize("fault", ["S7"], ids=["fault[S7]"])
def test_the_plugin_name_of_the_built_ins_is_taken(site, fault):
    site.install("rlx", good("evil"), distribution="rlx-evil")
    found = discover()
    assert "belongs to the built-ins" in found.broken["rlx-evil"].reason
    assert "evil" not in rlx.available("reward")


@pytest.mark.parametrize("fault", ["P6"], ids=["fault[P6]"])
def test_a_plugin_for_another_api_is_seen_without_importing_it(site, fault):
    site.install("future", "raise AssertionError('imported')", group="rlx.v2")
    found = discover()
    assert found.broken["future"].reason == "needs plugin API 2, this rlx has 1"
    assert "rlx_future" not in sys.modules


def test_a_distribution_may_serve_two_apis(site):
    site.install("both", good("both"))
    points = site.path / "rlx_both-0.1.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "[rlx.v2]\nboth = rlx_both_for_two\n")
    found = discover()
    assert found.broken == {} and found.find("reward", "both").qualified == "both/both"


def test_one_module_under_two_plugin_names_breaks_the_second_only(site):
    site.install("first", good("first"))
    site.install("second", "", value="rlx_first")
    found = discover()
    assert list(found.broken) == ["second"] and "first" in rlx.available("reward")


@pytest.mark.parametrize(
    ("names", "environment"),
    [(["bad"], ""), (["rlx-bad"], ""), (["*"], ""), ([], "bad"), ([], "other, bad"), ([], "*")],
)
def test_a_blocked_plugin_is_not_even_imported(site, monkeypatch, names, environment):
    site.install("bad", good("bad"))
    monkeypatch.setenv("RLX_NO_PLUGINS", environment)
    found = discover(no_plugins=names)
    assert (
        "rlx_bad" not in sys.modules
        and found.broken == {}
        and [plugin.name for plugin in found.blocked] == ["bad"]
    )
    with pytest.raises(rlx.ConfigError) as caught:
        rlx.resolve("reward", "bad")
    assert any("--no-plugin" in note and "bad" in note for note in caught.value.__notes__)


def test_blocking_a_plugin_that_is_not_there_is_an_error(site):
    site.install("toxicity", good("toxicity"))
    with pytest.raises(rlx.ConfigError, match="did you mean 'toxicity'"):
        discover(no_plugins=["toxicty"])


@pytest.mark.parametrize("fault", ["P16"], ids=["fault[P16]"])
def test_plugins_load_in_alphabetical_order(site, fault):
    for name in ("c", "a", "b"):
        site.install(name, good(name))
    assert [plugin.name for plugin in discover().plugins()] == ["rlx", "a", "b", "c"]


def test_entries_registered_in_this_process_survive_a_new_discovery(site):
    rlx.register("reward", "mine", lambda completions, **columns: [0.0])
    discover(no_plugins=["*"])
    assert "mine" in rlx.available("reward")


def test_a_plugin_may_register_while_it_is_imported(site):
    source = (
        "import rlx\n@rlx.hookimpl\ndef rlx_register(registry): pass\n@rlx.register('reward', 'deco')\n"
        + REWARD
    )
    site.install("deco", source)
    entry = discover().find("reward", "deco")
    assert (entry.plugin, entry.distribution) == ("deco", "rlx-deco")
    assert registry().find("reward", "deco") == entry


@pytest.mark.parametrize("fault", ["S6"], ids=["fault[S6]"])
def test_importing_rlx_imports_no_plugin_and_listing_none_that_is_blocked(site, run_python, fault, tmp_path):
    sentinel = tmp_path / "ran"
    site.install("spy", f"open({str(sentinel)!r}, 'w').close()\n" + good("spy"))
    code = "import json, rlx, rlx.core.errors; print(json.dumps(rlx.__version__))"
    assert run_python(code, path=[site.path]) == "0.1.0" and not sentinel.exists()
    code = "import json, rlx; print(json.dumps(rlx.available('reward')))"
    assert "spy" not in run_python(code, path=[site.path], RLX_NO_PLUGINS="*") and not sentinel.exists()
    assert "spy" in run_python(code, path=[site.path]) and sentinel.exists()


def test_a_package_that_pip_installed_is_found_and_used(pip_site, run_python):
    code = """
        import json, sys
        import rlx
        from rlx.plugins.references import make
        entry = rlx.registry().find("reward", "good/brevity")
        reward = make("reward", "brevity", {"scale": "0.5"})
        light = "torch" not in sys.modules
        print(json.dumps([entry.distribution, entry.version, reward(completions=["ab", ""]), light]))
        """
    assert run_python(code, path=[pip_site]) == ["rlx-good", "1.2.3", [-1.0, 0.0], True]
