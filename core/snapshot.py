"""What a checkpoint holds, and what must be the same for a run to go on from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rlx.core import checkpoint
from rlx.core.errors import CheckpointError, SaveError
from rlx.core.manifest import changed_plugins, plugins
from rlx.core.meter import Meter
from rlx.core.peers import agreed
from rlx.plugins.events import has_state

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from rlx.core.config import RunConfig
    from rlx.core.folder import RunFolder
    from rlx.core.loop import Run

T = TypeVar("T")
FAILED_SAVES = 3  # so many in a row end the run

# Options that change what is written or shown, never what is computed.
COSMETIC = frozenset({
    "output_dir", "overwrite_output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "log_completions", "report_to", "track_completions", "plots", "progress", "reward_on_error", "callback",
    "max_eval_rows", "eval_dataset", "no_plugin", "strict_plugins",
})  # fmt: skip


def save(run: Run) -> Path | None:
    """Write ``checkpoint-<step>``; the state must be that between two steps.

    Returns:
        The folder; None on processes that do not write.

    Raises:
        SaveError: it could not be written; older checkpoints are as they were.
        ValueError: in the middle of a step.
    """
    path = write(run)
    tell_saved(run, path)
    return path


def write(run: Run) -> Path | None:
    """``save`` without telling the callbacks."""
    if not run.boundary:
        raise ValueError("a checkpoint is taken between two steps, not inside one")
    ranks = [_of_this_process(run)]
    if run.accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        ranks = gather_object(ranks)
    path = together(
        run,
        lambda owned: checkpoint.write(
            owned.path,
            run.global_step,
            lambda folder: _fill(run, folder, ranks),
            identity=identity(run),
            keep=run.settings.save_total_limit,
            protected=run.protected,
        ),
    )
    run.saved, run.saving, run.failed_saves = run.global_step, False, 0
    return path


def tell_saved(run: Run, path: Path | None) -> None:
    """A callback that fails ends the run, on all processes: the checkpoint is there all the same."""
    with agreed(run, "a callback, after the checkpoint was saved"):
        if path is not None:
            run.events.emit("on_save", run=run, path=path)


def attempt(run: Run, *, must: bool = False) -> None:
    """Write a checkpoint unless this step has one; a few in a row may fail without ending the run.

    Args:
        run: between two steps.
        must: a failure ends the run.

    Raises:
        SaveError: it could not be written, and must is set or it is one failure too many.
        Exception: what a callback raised once it was written.
    """
    run.saving = False
    if run.saved == run.global_step:
        return
    try:
        path = write(run)
    except SaveError as error:
        run.failed_saves += 1
        if must or run.failed_saves >= FAILED_SAVES:
            raise
        failed = f"{run.failed_saves} of {FAILED_SAVES}"
        run.say(f"checkpoint not saved, training goes on ({failed}): {error}")
    else:
        tell_saved(run, path)


def together(run: Run, write: Callable[[RunFolder], T]) -> T | None:
    """Let the process that owns the folder write, and raise what it meets on all: none waits in vain.

    Args:
        run: any.
        write: called on that process alone.

    Returns:
        What write gave; None on the other processes.
    """
    result: T | None = None
    failures: list[Exception | None] = [None]
    if run.folder is not None:
        try:
            result = write(run.folder)
        except Exception as error:
            failures = [error]
    if run.accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(failures)
    if failures[0] is not None:
        raise failures[0]
    return result


def restore(run: Run, folder: Path) -> None:
    """Give a freshly prepared run the state of a checkpoint that was verified."""
    run.policy.load_trainable(folder)
    state = checkpoint.load_state(folder / "state")
    run.updater.load_state_dict(state["updater"])
    run.algorithm.load_state_dict(state["algorithm"])
    if run.studio.reference is not None:
        run.studio.reference.load_state_dict(state["reference"])
    ranks, rank = state["ranks"], run.accelerator.process_index
    if len(ranks) == run.accelerator.num_processes:
        _back_to_this_process(run, ranks[rank])
    else:  # another number of processes: rewards go on from the first one's state, sums are kept together
        _back_to_this_process(run, ranks[0])
        for other in ranks[1:] if rank == 0 else ():
            run.journal.meter.merge(Meter.of(other["meter"]))
        if rank > 0:
            run.journal.meter = Meter()
    run.global_step, run.reported = state["step"], state["reported"]
    run.ended = state.get("ended", run.reported)
    run.journal.tokens = state["tokens"]
    run.journal.restart()
    run.saved, run.stopping, run.stop_reason = state["step"], state["stopping"], state["stop_reason"]
    run.callback_states = dict(state["callbacks"])
    for name, callback in _stateful(run).items():
        if name in run.callback_states:
            callback.load_state_dict(run.callback_states.pop(name))
    if run.folder is not None:
        run.folder.truncate_to(state["offsets"])
        run.metrics_history[:] = run.folder.read_metrics()


def identity(run: Run) -> dict[str, Any]:
    """What a resume compares: data, model, semantic options, versions, processes, threads."""
    return {
        "data": run.data.fingerprint,
        "world_size": run.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": run.accelerator.device.type,
        "torch": torch.__version__,
        "files": run.fingerprints,
        "plugins": plugins(),
        "config": semantic(run.config),
        "config_sha256": hashlib.sha256(json.dumps(semantic(run.config)).encode()).hexdigest(),
    }


def semantic(config: RunConfig) -> dict[str, str]:
    """The options that decide the numbers, as text."""
    import yaml

    values = yaml.safe_load(config.to_yaml())
    return {
        name: json.dumps(value, default=str) for name, value in sorted(values.items()) if name not in COSMETIC
    }


def check_identity(run: Run, folder: Path, overrides: Collection[str]) -> list[str]:
    """Refuse to go on with other data or options; say what cannot be bit-exact.

    Args:
        run: freshly prepared, from the config that it would go on with.
        folder: the checkpoint.
        overrides: names that may differ; ``data`` stands for the rows of the data set.

    Returns:
        A warning a line.

    Raises:
        CheckpointError: with every difference that is not overridden, old → new.
    """
    old: Mapping[str, Any] = checkpoint.read_manifest(folder)["identity"]
    new = identity(run)
    allowed = {name.replace("-", "_") for name in overrides}
    differing = [
        f"{name}: {old['config'].get(name, 'unset')} → {new['config'].get(name, 'unset')}"
        for name in sorted({*old["config"], *new["config"]})
        if old["config"].get(name) != new["config"].get(name) and name not in allowed
    ]
    if old["data"] != new["data"] and "data" not in allowed:
        differing.append("data: the rows of the data set are others")
    changed = [name for name, digest in new["files"].items() if old["files"].get(name, digest) != digest]
    differing += [
        f"{name}: its files are others" for name in changed if name not in allowed and name not in COSMETIC
    ]
    if differing:
        raise CheckpointError(
            "the run would go on with other options than it began with",
            code="E-RESUME-CHANGED",
            where=str(folder),
            got="; ".join(differing[:6]),
            hint="restore them, or name what may change: rlx resume DIR --override NAME=VALUE; "
            "for changed files or rows the name alone",
        )
    told = [f"{name}: its files changed since the checkpoint" for name in changed]
    told += [f"since the checkpoint, {line}" for line in changed_plugins(old.get("plugins", []))]
    return told + [
        f"not bit-identical to an uninterrupted run: {name} {old[name]} → {new[name]}"
        for name in ("torch", "device", "threads", "world_size")
        if old[name] != new[name]
    ]


def _fill(run: Run, folder: Path, ranks: list[dict[str, Any]]) -> None:
    run.policy.save_pretrained(folder)
    state = {
        "step": run.global_step,
        "reported": run.reported,
        "ended": run.ended,
        "tokens": run.journal.tokens,
        "stopping": run.stopping,
        "stop_reason": run.stop_reason,
        "updater": run.updater.state_dict(),
        "algorithm": run.algorithm.state_dict(),
        "reference": {} if run.studio.reference is None else run.studio.reference.state_dict(),
        "ranks": ranks,
        "callbacks": {name: callback.state_dict() for name, callback in _stateful(run).items()},
        "offsets": {} if run.folder is None else run.folder.offsets(),
    }
    (folder / "state").mkdir()
    checkpoint.save_state(folder / "state", state)


def _of_this_process(run: Run) -> dict[str, Any]:
    """What differs from process to process: each saw other rows."""
    return {
        "meter": run.journal.meter.state_dict(),
        "clock": dict(run.studio.clock.seconds),
        "rewards": run.studio.reward_state(),
        "measuring": run.studio.budget_state(),
    }


def _back_to_this_process(run: Run, state: Mapping[str, Any]) -> None:
    run.journal.meter = Meter.of(state["meter"])
    run.studio.clock.seconds.update(state["clock"])
    run.studio.load_reward_state(state["rewards"])
    run.studio.load_budget_state(state["measuring"])


def _stateful(run: Run) -> dict[str, Any]:
    """Name → callback, for those that have state."""
    return {name: callback for name, callback in run.callbacks.items() if has_state(callback)}
