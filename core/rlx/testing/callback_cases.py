"""What holds of every callback: known hooks, a state that checkpoints keep, training left alone."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlx.core.errors import ConfigError, DataError
from rlx.core.loop import Run
from rlx.core.run import prepare, train
from rlx.plugins.hookspecs import RunEvents, check_hooks
from rlx.plugins.loading import load
from rlx.plugins.registry import registry
from rlx.testing import data
from rlx.testing.every_cases import builds, config_documented, imports_light
from rlx.testing.kit import NotApplicable, Subject, case
from rlx.testing.lab import QUIET
from rlx.testing.reward_cases import through_a_checkpoint
from rlx.testing.runs import Left, killed_and_resumed

EATS = {"rloo": "prompts", "dpo": "pairs"}  # a callback sees runs that sample, and runs that do not
SURVIVES = ("survives_a_run",)
STEPS = 3
KEPT = {"save_steps": 1, "save_total_limit": None}


@case("callback", after=())
def hooks_known(subject: Subject) -> None:
    """Every hook is marked, exists, and takes arguments that it has."""
    thing = subject.thing
    if isinstance(thing, str):
        thing = thing if ":" in thing else registry().find("callback", thing).target
    problems = check_hooks(load(thing) if isinstance(thing, str) else thing, RunEvents)
    assert not problems, "; ".join(problems)


case("callback", after=("hooks_known",))(builds)
case("callback")(config_documented)
case("callback")(imports_light)


def _options(subject: Subject | None, algo: str, folder: str | Path, **changes: Any) -> dict[str, Any]:
    """Options of a short run with evaluations, with the callback if there is a subject."""
    sampled = {"reward": ["rlx.testing.data:ranked"], "max_completion_length": 8}
    given = {
        **QUIET, "algo": algo, "dataset": data.rows(EATS[algo], 9), "seed": 5, "batch_size": 4,
        "eval_dataset": data.rows(EATS[algo], 3, first=20), "eval_steps": 2, "max_steps": STEPS,
        "learning_rate": 1e-3, "log_completions": -1, "output_dir": str(folder),
        **(sampled if algo == "rloo" else {"max_length": 128}),
    }  # fmt: skip
    if subject is not None:
        thing = {"name": subject.thing, **subject.options} if subject.options else subject.thing
        given |= {"callback": [thing], **subject.run}
    return given | changes


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rlx-testing-") as folder:
        yield Path(folder)


@functools.cache
def _without(algo: str) -> Left:
    """What a run without the callback leaves."""
    with _folder() as folder:
        train(prepare(**_options(None, algo, folder / "run")))
        return Left.by(folder / "run")


def _with(subject: Subject, algo: str) -> tuple[Left, dict[str, str]]:
    """What a run with the callback leaves, and why callbacks were switched off."""

    def made() -> tuple[Left, dict[str, str]]:
        with _folder() as folder:
            run = prepare(**_options(subject, algo, folder / "run"))
            train(run)
            return Left.by(folder / "run"), dict(run.events.disabled)

    found: tuple[Left, dict[str, str]] = subject.once(("with", algo), made)
    return found


def _runs(subject: Subject) -> list[str]:
    """The algorithms whose runs the callback agrees to; a callback may refuse those it has no use for."""
    agreed, refusals = [], []
    for algo in EATS:
        try:
            _with(subject, algo)
            agreed.append(algo)
        except (ConfigError, DataError) as refusal:
            refusals.append(f"{algo}: {refusal.what}")
    if not agreed:
        raise AssertionError(f"it refuses every run: {'; '.join(refusals)}")
    return agreed


@case("callback")
def survives_a_run(subject: Subject) -> None:
    """A short run with it, with evaluations and checkpoints, ends well, and it is not switched off."""
    for algo in _runs(subject):
        reasons = _with(subject, algo)[1]
        assert not reasons, f"in a run of {algo} it was switched off: {'; '.join(reasons.values())}"


@case("callback", after=SURVIVES)
def leaves_training_alone(subject: Subject) -> None:
    """Weights and log lines are the same bit for bit with and without it, whatever numbers it draws."""
    if getattr(subject.component(), "changes_training", False):  # a callback need not inherit rlx.Callback
        raise NotApplicable("it changes training, as changes_training says")
    for algo in _runs(subject):
        plain, mine = _without(algo), _with(subject, algo)[0]
        worst = plain.farthest(mine)
        assert worst == 0, (
            f"in a run of {algo} it changes weights by up to {worst:.3g}; or set changes_training"
        )
        for one, other in zip(plain.lines, mine.lines, strict=True):
            changed = [name for name, value in one.items() if other.get(name, value) != value]
            assert not changed, f"in a run of {algo} it changes {', '.join(changed)} of step {one['step']}"


@case("callback", after=SURVIVES)
def state_survives_a_checkpoint(subject: Subject) -> None:
    """Its state is of plain values and tensors, and a new one takes it back."""
    callback = subject.make()
    if not hasattr(callback, "state_dict"):
        raise NotApplicable("it keeps no state")
    _driven(subject, callback)
    state = callback.state_dict()
    if not state:
        raise NotApplicable("it keeps no state")
    kept, other = through_a_checkpoint(state), subject.make()
    other.load_state_dict(through_a_checkpoint(state))
    again = through_a_checkpoint(other.state_dict())
    lost = [name for name in {*kept, *again} if _written(kept.get(name)) != _written(again.get(name))]
    assert not lost, f"after load_state_dict its state differs in {', '.join(sorted(lost))}"


def _written(value: Any) -> str:
    """All of a value of a state as text: equal for NaN and NaN, and tensors in full."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {_written(value[name])}' for name in value)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return repr(value)


def _driven(subject: Subject, callback: Any, last: int | None = None) -> Run:
    """A run that the callback is added to, and taken out of after ``last`` steps."""
    with _folder() as folder:
        run = prepare(**_options(None, _runs(subject)[0], folder / "run", **subject.run))
        run.printers = [lambda line: None]
        run.add_callback(callback)
        with run:
            for _ in run:
                if run.global_step == last:
                    run.remove_callback(callback)
        return run


@case("callback", after=SURVIVES)
def resumes_bit_for_bit(subject: Subject) -> None:
    """A run with it that was killed in its second step, and resumed, ends as one that was not."""
    algo = _runs(subject)[0]
    with _folder() as folder:
        options = _options(subject, algo, folder / "whole", **KEPT)
        train(prepare(**options))
        again = killed_and_resumed({**options, "output_dir": str(folder / "again")})
        one, two = Left.by(folder / "whole"), Left.by(again)
    assert one.same(two), (
        f"a resumed run of {algo} ended elsewhere: weights differ by up to {one.farthest(two):.3g}, or its "
        "log does; what does state_dict leave out?"
    )


@case("callback", after=SURVIVES)
def removable_mid_run(subject: Subject) -> None:
    """Taken out after the first step, it leaves a run that goes on to its end."""
    run = _driven(subject, subject.make(), last=1)
    assert run.global_step == STEPS, f"the run ended after {run.global_step} of {STEPS} steps"


class _Broken(io.TextIOBase):
    """A terminal that went away."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@case("callback", after=SURVIVES)
def survives_a_broken_terminal(subject: Subject) -> None:
    """Where nothing can be printed, the run goes on; an observer may be switched off."""
    kept = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = _Broken()
    try:
        run = _driven(subject, subject.make())
    except OSError as error:
        raise AssertionError(f"it stops a run where nothing can be printed: {error}") from error
    finally:
        sys.stdout, sys.stderr = kept
    assert run.global_step == STEPS
