"""The hooks, moments at which plugins act: global ones for every plugin, events for callbacks."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pluggy

from rlx.core.options import close

if TYPE_CHECKING:
    from pathlib import Path

    from rlx.plugins.registry import Registry

PROJECT = "rlx"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
_READER = pluggy.PluginManager(PROJECT)  # reads marks; nothing is registered with it


class GlobalHooks:
    """Hooks that every plugin may implement, at module level."""

    @hookspec(historic=True)
    def rlx_register(self, registry: Registry) -> None:
        """Offer components: ``registry.add(kind, name, "pkg.mod:Attribute", "summary")``.

        Called once when the plugin is discovered, also for ``rlx --help``: free of side effects, and it must
        not import the training stack.
        """

    @hookspec
    def rlx_validate(self, config: Any) -> None:
        """Veto a run before any weight is loaded, by raising.

        Args:
            config: the resolved ``rlx.core.config.RunConfig``.
        """

    @hookspec(firstresult=True)
    def rlx_load_model(self, spec: Any) -> Any:
        """A model for the spec, or None to leave it to the next plugin and at last to transformers.

        Args:
            spec: the resolved ``rlx.core.settings.Settings``; ``spec.model`` names the model.
        """


class RunEvents:
    """Events of one run; a callback implements any subset of them."""

    @hookspec
    def on_run_start(self, run: Any) -> None:
        """Everything is loaded and checked; nothing was trained yet."""

    @hookspec
    def on_rollouts(self, run: Any, rollouts: Any) -> None:
        """A batch was sampled and rewarded; ``rollouts`` is a ``rlx.Rollouts``. Online algorithms only."""

    @hookspec
    def on_loss(self, run: Any, batch: Any, loss: Any) -> None:
        """A mini-batch was gone through; ``loss`` is its loss over all processes, a float."""

    @hookspec
    def on_step_end(self, run: Any, metrics: dict[str, float]) -> None:
        """One batch was trained on; ``metrics`` is the log line of this step, empty if it writes none."""

    @hookspec
    def on_log(self, run: Any, metrics: dict[str, float]) -> None:
        """A line was written to metrics.jsonl; ``metrics`` are reduced over all processes."""

    @hookspec
    def on_evaluate(self, run: Any) -> dict[str, float] | None:
        """An evaluation is due; the numbers returned join the others, a name given twice is an error."""

    @hookspec
    def on_save(self, run: Any, path: Path) -> None:
        """A checkpoint or the final policy was written to ``path``."""

    @hookspec
    def on_error(self, run: Any, error: BaseException) -> None:
        """The run is about to stop with ``error``."""

    @hookspec
    def on_run_end(self, run: Any) -> None:
        """The run is over, after success or failure alike."""


def arguments(specs: type) -> dict[str, tuple[str, ...]]:
    """Hook name → names of its arguments, for a class of hookspecs, in order of declaration."""
    return {
        name: tuple(inspect.signature(spec).parameters)[1:]
        for name, spec in vars(specs).items()
        if inspect.isfunction(spec)
    }


def check_hooks(plugin: object, specs: type) -> list[str]:
    """What keeps a plugin's hook implementations from being called, a sentence a problem.

    Found here are a misspelt hook, an argument that the hook does not have, a hook's name without
    ``@rlx.hookimpl``, and a plugin without any hook: pluggy passes over the last two in silence.

    Args:
        plugin: a module, an object, or the class of one.
        specs: ``GlobalHooks`` or ``RunEvents``.
    """
    known, problems, implemented = arguments(specs), [], 0
    for name in dir(plugin):
        marked = _READER.parse_hookimpl_opts(plugin, name)
        if marked is None:
            if name in known:
                problems.append(f"{name} is not marked; write @rlx.hookimpl above it")
            continue
        implemented += 1
        hook = marked.get("specname") or name
        if hook not in known:
            problems.append(f"there is no hook {hook!r}{close(hook, list(known))}")
            continue
        if marked.get("wrapper") or marked.get("hookwrapper"):
            problems.append(f"{name} is a wrapper; hooks of rlx are not wrapped")
        parameters = list(inspect.signature(getattr(plugin, name)).parameters.values())
        for parameter in parameters[isinstance(plugin, type) :]:  # a class's method begins with self
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                problems.append(
                    f"{name} takes {parameter}; name the arguments it wants: {', '.join(known[hook])}"
                )
            elif parameter.name not in known[hook]:
                problems.append(
                    f"{name} has no argument {parameter.name!r}{close(parameter.name, known[hook])}"
                    f" (it may take {', '.join(known[hook])})"
                )
    if not implemented and not problems:
        names = [name for name in dir(plugin) if not name.startswith("_")]
        near = [f"{name} is no hook{meant} " for name in names if (meant := close(name, list(known)))]
        problems.append(
            f"{''.join(near[:1])}it implements no hook, which is a function called like one of these, with "
            f"@rlx.hookimpl above it: {', '.join(known)}"
        )
    return problems
