"""Runs from beginning to end: prepare, train, resume. Python and the command line both come through here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.core import checkpoint, snapshot
from rlx.core.assemble import assemble, begin, build_accelerator
from rlx.core.assemble import dry_run as check_only
from rlx.core.config import RunConfig, from_mapping
from rlx.core.errors import CheckpointError, ConfigError, Interrupted, RlxError
from rlx.core.evaluate import evaluate
from rlx.core.files import JsonLines
from rlx.core.fingerprints import ACCEPTED
from rlx.core.folder import COMPLETIONS, METRICS, RunFolder, read_manifest
from rlx.core.manifest import changed_plugins
from rlx.core.recompute import recomputes
from rlx.core.session import give_back, session
from rlx.core.signals import Signals

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from rlx.core.loop import Run
    from rlx.core.models import Policy

OBJECTS = ("model", "tokenizer", "reference_model", "value_model")


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        metrics: one dict a log line, as in metrics.jsonl.
        completions: the samples that were kept, as in completions.jsonl.
        policy: the trained policy; None after a dry run.
        folder: the run folder; None after a dry run.
        plan: what was done, a line each.
    """

    metrics: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    policy: Policy | None
    folder: Path | None
    plan: list[str]

    @property
    def final(self) -> dict[str, Any]:
        """The last log line, the last evaluation in it."""
        return self.metrics[-1] if self.metrics else {}


def prepare(config: RunConfig | None = None, **options: Any) -> Run:
    """A run that is ready to be driven by hand: ``for metrics in run``, ``run.step()``; best in a ``with``.

    Args:
        config: a resolved configuration, or
        options: options under the names of the flags; components and models may be objects.

    Raises:
        RlxError: whatever is wrong, before any weight is loaded where that can be known.
    """
    config, objects = resolve(config, options)
    return assemble(config, objects)


def run(config: RunConfig | None = None, *, dry_run: bool = False, **options: Any) -> Result:
    """Train from beginning to end.

    Args:
        config: a resolved configuration, or
        options: options under the names of the flags, for example ``algo="ppo", reward=my_function``.
        dry_run: check everything that can be checked without weights, and return the plan.

    Raises:
        RlxError: the run could not start or go on; checkpoints and logs are in the run folder.
    """
    config, objects = resolve(config, options)
    if dry_run:
        return Result([], [], None, None, check_only(config, objects))
    return train(assemble(config, objects))


def resume(folder: str | Path, overrides: Mapping[str, Any] | None = None, **objects: Any) -> Result:
    """Go on with a run from its newest checkpoint that verifies, to its end; see ``reopen``.

    A run that is finished stays as it is, unless an override asks for more.
    """
    if not overrides and is_finished(folder):
        path = Path(folder)
        metrics, completions = (JsonLines(path / name).read() for name in (METRICS, COMPLETIONS))
        return Result(metrics, completions, None, path, [f"{path} is finished; nothing is left to do"])
    return train(reopen(folder, overrides, **objects))


def is_finished(folder: str | Path) -> bool:
    """True if a run folder's run came to its end."""
    return bool(read_manifest(Path(folder)).get("status") == "finished")


def reopen(folder: str | Path, overrides: Mapping[str, Any] | None = None, **objects: Any) -> Run:
    """A run as its newest checkpoint that verifies left it, ready to go on.

    Args:
        folder: the run folder.
        overrides: options that may differ from those that the run began with, with their new values; ``data``
            and options that name files may have the value True: accept what lies there now.
        objects: models and tokenizer that the run was given as objects.

    Raises:
        CheckpointError: there is no usable checkpoint, or the data or an option changed that was not
            overridden.
    """
    folder, overrides = Path(folder), dict(overrides or {})
    config = stored_config(folder, overrides, objects)
    # One process owns the folder; the others only read its checkpoints.
    owned = RunFolder.open(folder) if build_accelerator(config).is_main_process else None
    run: Run | None = None
    try:
        newest, broken = checkpoint.latest(folder)
        run = assemble(config, objects, folder=owned, reopened=True)
        warnings = [
            f"{path.name} is not usable, an earlier one is taken: {reason}" for path, reason in broken
        ]
        warnings += snapshot.check_identity(run, newest, overrides)
        planned, recomputed = run.updater.budget, recomputes(*run.policy.trunks)
        snapshot.restore(run, newest)
        if run.updater.budget != planned:
            warnings.append(f"micro-batches are of at most {run.updater.budget} tokens, as they were")
        if recomputes(*run.policy.trunks) != recomputed:
            warnings.append(f"gradient checkpointing is {'off' if recomputed else 'on'}, as it was")
        if overrides:  # a run that a callback had stopped is asked for more
            run.stopping, run.stop_reason = False, ""
        begin(run)
    except BaseException:
        if run is not None:
            give_back(run)
        if owned is not None:
            owned.close()
        raise
    for line in (*warnings, f"resuming from {newest.name} of {run.total_steps} steps"):
        run.say(line)
    return run


def stored_config(folder: Path, overrides: Mapping[str, Any], given: Collection[str] = ()) -> RunConfig:
    """The configuration that a run folder keeps, some options changed, and some models given as objects."""
    from rlx.core.yaml_file import read_config

    file = folder / "config.yaml"
    if not file.is_file():
        raise CheckpointError(
            "this is no run folder",
            where=str(folder),
            expected="a folder with config.yaml",
            hint="rlx resume RUN_DIR",
        )
    values, where = read_config(file)
    changed = {name.replace("-", "_"): value for name, value in overrides.items()}
    changed = {name: value for name, value in changed.items() if not (name in ACCEPTED and value is True)}
    values |= changed
    objects = [
        name
        for name, value in values.items()
        if "<object given in Python" in str(value) or str(value).startswith("object-")
    ]
    if set(objects) - set(given):
        raise CheckpointError(
            f"the run was given objects from Python: {', '.join(objects)}",
            where=str(folder),
            hint="give them again: rlx.resume(folder, {'reward': my_function}, model=model, tokenizer=…)",
        )
    try:
        return from_mapping({**values, "output_dir": str(folder)}, where)
    except RlxError as error:
        for line in changed_plugins(read_manifest(folder).get("plugins", [])):
            error.add_note(line)
        raise


def resolve(config: RunConfig | None, options: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration, and the model and tokenizer objects that were given in the place of names."""
    if config is not None:
        if options:
            raise ConfigError(
                "a RunConfig and options were both given", got=", ".join(options), hint="give one"
            )
        return config, {}
    values, objects = dict(options), {}
    for name in OBJECTS:
        if name in values and not isinstance(values[name], str | Path | None):
            objects[name] = values[name]
            values[name] = f"object-{type(values[name]).__name__}"
        elif isinstance(values.get(name), Path):
            values[name] = str(values[name])
    return from_mapping(values), objects


def train(run: Run) -> Result:
    """Drive a prepared run to its end: evaluations, checkpoints, signals, errors, the final policy.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
        RlxError: or whatever else stopped it, after the callbacks were told.
    """
    signals = Signals()
    with signals.caught(), session(run, signals):
        if run.global_step == 0:
            before = evaluate(run) if run.reported < 0 else {}
            if before:
                run.log(before)
        elif run.ended < run.global_step:  # the evaluation after the last step had failed, or a callback
            run.report()
        _walk(run, signals)
    completions = run.folder.read_completions() if run.folder is not None else []
    return Result(run.metrics_history, completions, run.policy, run.path, run.plan)


def _walk(run: Run, signals: Signals) -> None:
    every = run.settings.save_steps
    for _ in run:
        stopped, asked = signals.agreed(run.accelerator)
        last = run.stopping or run.global_step == run.total_steps
        if stopped or asked or (every and (last or run.global_step % every == 0)):
            snapshot.attempt(run, must=bool(stopped))
        if stopped:
            raise Interrupted(
                f"signal {stopped} after step {run.global_step} of {run.total_steps}; everything is saved",
                signum=stopped,
                where=str(run.path / f"checkpoint-{run.global_step}"),
                hint=f"rlx resume {shlex.quote(str(run.path))}",
            )
