"""Load a component from ``pkg.mod:Attribute`` or ``file.py:Attribute``, and check that it is usable.

A failure says which part failed: the module, the attribute, or the member that is missing. Modules are
imported with the heavy libraries deferred, so that reading a component's options never waits for torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from rlx.core.errors import ConfigError, PluginError, RlxError
from rlx.core.options import close
from rlx.core.text import safe_text
from rlx.plugins import contract
from rlx.plugins.hookspecs import RunEvents, check_hooks
from rlx.plugins.light import deferred

# What the loop calls or reads, for a class that does not inherit rlx's base of its kind.
MEMBERS: dict[str, tuple[str, ...]] = {
    "algorithm": ("Config", *(name for name in vars(contract.Algorithm) if not name.startswith("_"))),
    "reward": ("__call__",),
    "transform": ("__call__",),
    "callback": (),
    "generator": ("generate", "sync", "close"),
    "judge": ("judge",),
    "dataset": ("rows",),
}
# What the bases and protocols of rlx only hold a place for: inheriting it is not enough.
OPEN = ("__call__", "loss", "generate", "sync", "close", "judge", "rows")
EATS = ("prompts", "pairs", "labeled", "demonstrations")
# Where the frames of a traceback are rlx's, or of what it imports modules with.
OURS = (*(str(Path(__file__).parents[1] / room) + os.sep for room in ("core", "plugins")), importlib.__file__)


def load(target: str) -> Any:
    """The object behind ``pkg.mod:Attribute`` or ``path/file.py:Attribute``, where Attribute may have dots.

    Raises:
        ConfigError: if the text is no such reference.
        PluginError: if the module or file is missing or fails while it is imported, or lacks the attribute.
    """
    module_name, _, attribute = target.rpartition(":")
    if not module_name or not attribute:
        raise ConfigError(
            f"{target!r} does not say which attribute",
            code="E-REFERENCE",
            expected="pkg.module:Attribute or ./file.py:Attribute",
        )
    module = load_file(module_name) if module_name.endswith(".py") else load_module(module_name, target)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")]
            raise PluginError(
                f"{module_name!r} has no {attribute!r}{close(part, names)}",
                code="E-PLUGIN-ATTRIBUTE",
                where=str(getattr(module, "__file__", "")),
                expected=_defined(module, names),
            )
        found = getattr(found, part)
    return found


def load_module(name: str, target: str = "") -> ModuleType:
    """Import a module by its dotted name.

    Args:
        name: dotted name.
        target: the reference that it is part of, for messages.

    Raises:
        PluginError: if there is no such module, or it fails while it is imported.
    """
    try:
        with deferred():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise import_failure(name, error) from error
        file = Path(*name.split(".")).with_suffix(".py")
        hint = f"install the package that has it, or name a file: ./{file}:Attribute"
        parent, _, missing = error.name.rpartition(".")
        if parent in sys.modules:
            names = [found.name for found in pkgutil.iter_modules(sys.modules[parent].__path__)]
            hint = f"{parent} has {', '.join(names) or 'no modules'}{close(missing, names)}"
        if file.is_file():
            attribute = target.rpartition(":")[2] or "Attribute"
            hint = f"the current folder is not searched for modules; write ./{file}:{attribute}"
        raise PluginError(
            f"there is no module {error.name!r}",
            code="E-PLUGIN-MODULE",
            where=f"reference {target or name!r}",
            hint=hint,
        ) from error
    except (Exception, SystemExit) as error:
        raise import_failure(name, error) from error


def load_file(path: str) -> ModuleType:
    """Import a Python file under a private module name; ``sys.path`` stays as it is.

    The same unchanged file gives the same module; a file that was edited is imported anew.

    Raises:
        PluginError: if there is no such file, or it fails while it is imported.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise PluginError(f"there is no file {path!r}", code="E-PLUGIN-MODULE", where=str(file))
    digest = hashlib.sha256(str(file).encode() + b"\0" + file.read_bytes()).hexdigest()
    name = f"_rlx_file_{file.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    try:
        with deferred():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise import_failure(str(file), error) from error
    return module


def import_failure(name: str, error: BaseException) -> RlxError:
    """The PluginError for a module that raised while it was imported, naming its line that led to it."""
    if isinstance(error, RlxError):
        return error
    lines = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
    ]
    # rlx.opt and the like refuse what a plugin's line gives them: that line is to be mended, not rlx's own.
    lines = [frame for frame in lines if not frame.filename.startswith(OURS)] or lines
    where = f"{lines[-1].filename}:{lines[-1].lineno}" if lines else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    return PluginError(
        f"{name!r} failed while it was imported",
        code="E-PLUGIN-IMPORT",
        where=where,
        got=f"{type(error).__name__}: {safe_text(error)}",
    )


def check(kind: str, component: Any, shown: str) -> Any:
    """The component, if it has what its kind asks for.

    Args:
        kind: one of ``KINDS``.
        component: a class, a function or an instance.
        shown: how the user referred to it.

    Raises:
        PluginError: naming the member that is missing, or what is wrong with one.
    """
    where = f"{kind} {shown} ({source(component)})" if source(component) else f"{kind} {shown}"
    if inspect.ismodule(component):
        raise PluginError(
            f"{shown!r} is a module, not a {kind}",
            code="E-PLUGIN-PROTOCOL",
            hint=f"name the {kind} in it: {component.__name__}:Attribute",
        )
    missing = [name for name in MEMBERS[kind] if not _has(component, name)]
    if missing:
        raise PluginError(
            f"{shown!r} is no {kind}: it lacks {', '.join(missing)}",
            code="E-PLUGIN-PROTOCOL",
            where=where,
            got=_what(component),
            expected=f"the members of rlx.{kind.capitalize()}: {', '.join(MEMBERS[kind])}",
        )
    problems = check_hooks(component, RunEvents) if kind == "callback" else []
    if kind == "algorithm" and component.eats not in EATS:
        problems = [f"it eats {component.eats!r}, which is none of {', '.join(EATS)}"]
    if problems:
        raise PluginError(
            f"{shown!r} cannot be used: {'; '.join(problems)}", code="E-PLUGIN-PROTOCOL", where=where
        )
    return component


def source(component: Any) -> str:
    """``file:line`` of a class, a function or an instance's class; empty where Python cannot tell."""
    target = component if isinstance(component, type) or inspect.isroutine(component) else type(component)
    try:
        return f"{inspect.getsourcefile(target)}:{inspect.getsourcelines(target)[1]}"
    except (TypeError, OSError):  # built-in, or defined in an interactive session
        return ""


def _has(component: Any, name: str) -> bool:
    """Whether the component itself has the member; ``dir`` leaves out what a class has from its metaclass."""
    if inspect.isroutine(component) or name not in dir(component):
        return inspect.isroutine(component) and name == "__call__"
    bases = component.__mro__ if isinstance(component, type) else type(component).__mro__
    home = next((base for base in bases if name in vars(base)), None)
    return not (name in OPEN and home is not None and home.__module__ == contract.__name__)


def _what(component: Any) -> str:
    if inspect.isroutine(component):
        return "a function"
    if not isinstance(component, type):
        return f"an object of type {type(component).__qualname__}"
    own = [name for name in vars(component) if not name.startswith("__") or name == "__call__"]
    return f"a class with {', '.join(own) or 'no members of its own'}"


def _defined(module: ModuleType, names: list[str]) -> str:
    """The classes and functions that a module defines itself, for the message about a missing one."""
    own = [n for n in names if getattr(vars(module).get(n), "__module__", "") == module.__name__]
    return f"one of {', '.join(own[:8])}" if own else ""
