"""What holds of a component of any kind: it builds, its options are documented, it imports lightly."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from rlx.core.options import MISSING, options, parse
from rlx.core.settings import Settings
from rlx.plugins.contract import KINDS
from rlx.plugins.light import HEAVY
from rlx.plugins.references import config_of
from rlx.plugins.registry import registry
from rlx.testing.kit import NotApplicable, Subject, case

OTHERS = tuple(kind for kind in KINDS if kind != "callback")  # whose hooks are looked at first
FORBIDDEN = tuple(name for name in HEAVY if name != "torch")
# A test file that holds the component makes no tests here.
PROBE = """
import json, sys
import rlx.testing
from rlx.plugins import loading
from rlx.plugins.light import HEAVY
rlx.testing.conformance = lambda *words, **options: None
loaded = []
for reference in sys.argv[1:]:
    (loading.load if ":" in reference else loading.load_module)(reference)
    loaded.append([name for name in HEAVY if name in sys.modules])
print(json.dumps(loaded))
"""


@case(*OTHERS, after=())
def builds(subject: Subject) -> None:
    """It loads, has the members of its kind, and is built with its options."""
    component = subject.component()
    if subject.kind == "transform":
        missing = [name for name in ("takes", "gives") if not hasattr(component, name)]
        assert not missing, f"it lacks {', '.join(missing)}: the columns that it needs and adds"
    built = subject.make()
    assert not isinstance(built, type), f"building it gave the class {built.__name__}, not an object"


@case(*OTHERS)
def config_documented(subject: Subject) -> None:
    """Config is a frozen dataclass of rlx.opt fields, with defaults that its own bounds allow."""
    config = config_of(subject.component())
    try:
        found = options(config)
    except (TypeError, NameError) as error:  # NameError: an annotation that does not resolve
        raise AssertionError(f"its options are not declared properly: {error}") from error
    parameters: Any = config.__dataclass_params__  # type: ignore[attr-defined]  # options() saw that it is one
    assert parameters.frozen, f"{config.__qualname__} is not frozen: write @dataclass(frozen=True)"
    core = {field.name for field in dataclasses.fields(Settings)}
    for option in found.values():
        named = f"option {option.name}"
        if subject.kind == "algorithm":
            assert option.name not in core, f"{named} is a core option already; give it another name"
        if option.default is MISSING or option.default is None:
            continue
        try:
            parse(option, option.default)
        except ValueError as allowed:
            raise AssertionError(
                f"{named} has the default {option.default!r}, which is not allowed: {allowed}"
            ) from None


@case(*OTHERS)
def imports_light(subject: Subject) -> None:
    """Its module imports, in a fresh interpreter, without transformers, accelerate, peft and datasets."""
    target = reference(subject)
    registering = _registering(subject.kind, target)
    *plugin, component = json.loads(_in_fresh_interpreter(*registering, target))
    for heavy in filter(None, plugin):
        raise AssertionError(
            f"{registering[0]} imports {', '.join(heavy)}, and is imported for every command of rlx: leave "
            "nothing there but rlx_register, with targets that are strings"
        )
    loaded = [name for name in component if name in FORBIDDEN]
    assert not loaded, f"importing it imports {', '.join(loaded)}: move that into the function that needs it"


def _registering(kind: str, target: str) -> list[str]:
    """The module of the installed plugin that offers the component; none for one that nobody registered."""
    names = {entry.plugin for entry in registry().list(kind) if entry.target == target}
    offering = [p for p in registry().plugins() if p.name in names and p.distribution]
    return [plugin.value for plugin in offering[:1]]


def reference(subject: Subject) -> str:
    """``module:Attribute`` or ``file.py:Attribute`` under which a fresh interpreter finds the component."""
    if isinstance(subject.thing, str):
        if ":" in subject.thing:
            return subject.thing
        target = registry().find(subject.kind, subject.thing).target
        if isinstance(target, str):
            return target
    component = subject.component()
    owner = component if inspect.isroutine(component) or isinstance(component, type) else type(component)
    top = owner.__qualname__.partition(".")[0]
    module = sys.modules.get(owner.__module__)
    file = getattr(module, "__file__", None)  # none in an interactive session
    if file is None or "<locals>" in owner.__qualname__:
        raise NotApplicable("it was not defined at the top of a module")
    try:
        importable = owner.__module__ != "__main__" and find_spec(owner.__module__) is not None
    except (ImportError, ValueError):
        importable = False
    return f"{owner.__module__ if importable else file}:{top}"


def _in_fresh_interpreter(*references: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *references],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=300,
    )
    if done.returncode != 0:
        raise AssertionError(f"importing {' and '.join(references)} alone failed:\n{done.stderr[-4000:]}")
    return done.stdout.splitlines()[-1]
