"""The built-ins: everything on offer imports and is what its kind asks for."""

from __future__ import annotations

import pytest

import rlx
from rlx.core.options import options
from rlx.plugins.catalogue import COMPONENTS
from rlx.plugins.references import config_of
from rlx.testing import isolated

EVERY = [(kind, name) for kind, components in COMPONENTS.items() for name in components]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{kind}-{name}" for kind, name in EVERY])
def test_a_built_in_imports_and_keeps_its_contract(kind, name):
    with isolated() as registry:
        entry = registry.find(kind, name)
        component = rlx.resolve(kind, name)  # checks the members that the kind asks for
        assert (entry.plugin, entry.distribution) == ("rlx", "rlx") and entry.summary
        assert component.__doc__
        assert all(option.doc for option in options(config_of(component)).values())


def test_reading_every_option_of_every_built_in_imports_nothing_heavy(run_python):
    code = """
        import json, sys
        import rlx
        from rlx.core.options import options
        from rlx.plugins.references import config_of
        for entry in rlx.registry().list():
            options(config_of(rlx.resolve(entry.kind, entry.qualified)))
        from rlx.plugins.light import HEAVY
        print(json.dumps(sorted({"numpy", *HEAVY} & set(sys.modules))))
        """
    assert run_python(code, RLX_NO_PLUGINS="*") == []


def test_every_public_name_of_rlx_is_there_and_importing_rlx_imports_nothing_heavy(run_python):
    assert set(rlx.__all__) <= set(dir(rlx))
    forbidden = {"plugins", "rewards", "callbacks", "algorithms", "core"}  # subpackages would overwrite them
    assert not forbidden & set(rlx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        rlx.nonsense  # noqa: B018
    code = """
        import json, sys
        import rlx
        before = sorted({"typing", "importlib.metadata", "torch", "pluggy"} & set(sys.modules))
        rlx.opt, rlx.hookimpl, rlx.RlxError, rlx.Algorithm, rlx.Registry, rlx.__version__
        print(json.dumps([before, "torch" in sys.modules]))
        """
    before, torch = run_python(code)
    assert not {"torch", "pluggy"} & set(before) and torch is False


def test_every_public_name_of_rlx_can_be_had():
    for name in rlx.__all__:
        assert getattr(rlx, name) is not None
