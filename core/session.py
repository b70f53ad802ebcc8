"""What stands around the steps of a run: its first and last events, its end, what a failure leaves behind."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlx.core import checkpoint, manifest, snapshot
from rlx.core.closing import close_all
from rlx.core.errors import Interrupted, RlxError, SaveError
from rlx.core.meter import largest
from rlx.core.peers import agreed
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from rlx.core.loop import Run
    from rlx.core.signals import Signals


@contextmanager
def session(run: Run, signals: Signals | None = None) -> Iterator[Run]:
    """Within it a run is driven; at its end the final policy is written and the run closed.

    Args:
        run: prepared, or reopened.
        signals: where those that are caught arrive.

    Raises:
        Interrupted: a KeyboardInterrupt came.
        BaseException: whatever else is raised inside, after the callbacks were told.
    """
    status, code = "failed", 1
    try:
        run.events.emit("on_run_start", run=run)
        yield run
        early = run.stopping and run.boundary and run.global_step < run.total_steps
        if early and not run.failed_saves:  # a further failure must not cost the policy
            snapshot.attempt(run)  # so that it can go on, should somebody ask for more steps
        _keep(run)
        status, code = "finished", 0
    except BaseException as raised:
        interrupted = isinstance(raised, KeyboardInterrupt)
        if signals is None or not interrupted:  # the second signal to a run that catches them ends it at once
            _rescue(run, raised)
        error = _at_once(run, signals) if interrupted else raised
        code = error.exit_code if isinstance(error, RlxError) else 1
        status = "interrupted" if code in (130, 143) else "failed"
        _tell(run, error, "on_error", error=error)
        _tell(run, error, "on_run_end")
        if error is raised:
            raise
        raise error from None
    else:
        run.events.emit("on_run_end", run=run)
        if run.stop_reason:
            run.say(f"stopped after step {run.global_step} of {run.total_steps}: {run.stop_reason}")
    finally:
        close(run, status, code)


def close(run: Run, status: str, exit_code: int) -> None:
    """Give back the folder and what the studio holds; the manifest says how the run ended."""
    try:
        give_back(run)
    finally:
        if run.folder is not None:
            seconds = time.perf_counter() - run.journal.began
            try:
                manifest.finish(
                    run.folder, status, seconds=seconds, exit_code=exit_code, stopped=run.stop_reason
                )
            finally:
                run.folder.close()


def give_back(run: Run) -> None:
    """Give back what the studio holds, and, where a run never began and so never ends, its callbacks."""
    callbacks, run.events.owned = run.events.owned, []
    close_all(run.studio, *([] if run.events.begun else callbacks))


def _at_once(run: Run, signals: Signals | None) -> Interrupted:
    """What a second signal makes of a run: it ends without a further checkpoint."""
    newest, _ = checkpoint.newest(run.path)
    return Interrupted(
        f"stopped at once in step {run.global_step + 1} of {run.total_steps}; "
        + (f"{newest.name} is the last checkpoint" if newest else "there is no checkpoint"),
        signum=(signals and signals.received) or signal.SIGINT,
        where=str(newest or run.path),
        hint=f"rlx resume {shlex.quote(str(run.path))}" if newest else "",
    )


def _keep(run: Run) -> None:
    """Write the final policy, as it is or as a checkpoint has it, to the root of the run folder."""
    chosen = run.final_checkpoint
    if chosen is not None and chosen.name != f"checkpoint-{run.global_step}":
        reason = checkpoint.verify(chosen)
        if reason is None:
            run.boundary = False  # from here on the weights are not those of this step
            run.policy.load_trainable(chosen)
        else:
            run.say(f"{chosen} cannot be used, the policy is that of the last step: {reason}")
            run.final_checkpoint = None
    snapshot.together(run, lambda folder: folder.publish(run.policy.save_pretrained))
    with agreed(run, "a callback, after the policy was saved"):
        if run.folder is not None:
            run.events.emit("on_save", run=run, path=run.path)


def _tell(run: Run, error: BaseException, event: str, /, **given: Any) -> None:
    """Tell the callbacks of a failure; one that fails in turn must not hide what stopped the run."""
    try:
        run.events.emit(event, run=run, **given)
    except Exception as another:
        error.add_note(_failed_too(event, another))


def _failed_too(event: str, another: Exception) -> str:
    return f"in {event}, a callback failed too: {type(another).__name__}: {safe_text(another)}"


def _rescue(run: Run, error: BaseException) -> None:
    """After a failure between two steps, or before the first optimizer step of one, nothing need be lost."""
    if run.accelerator.num_processes > 1 and not run.together:
        return  # the others may be anywhere
    lost = run.boundary and run.global_step > 0 and run.saved != run.global_step
    # Errors differ between processes: one that cannot write is told as such where it happens alone.
    if largest(run.accelerator, float(isinstance(error, Interrupted | SaveError) or not lost)):
        return
    try:
        path = snapshot.write(run)
    except RlxError as failure:
        run.say(f"no checkpoint could be saved: {failure.what}")
        return
    run.say(f"the last whole step is saved in {path}; go on with: rlx resume {run.path}")
    try:
        snapshot.tell_saved(run, path)
    except Exception as another:
        error.add_note(_failed_too("on_save", another))
