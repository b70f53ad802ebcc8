"""Runs of two processes, in each of which a callback fails on one alone; the test reads what is said."""

import json
import sys
from pathlib import Path

import lines
import torch

from rlx import hookimpl
from rlx.callbacks.win_rate import WinRate
from rlx.core.errors import RlxError
from rlx.core.peers import connect
from rlx.core.run import prepare, train

torch.set_num_threads(1)
job = json.loads(sys.argv[1])
state = connect()


def say(line: str) -> None:
    lines.say(state.process_index, line)


def failing(hook, step):
    """A callback that fails in one event of one step, and hears of the end."""

    def fails(self, run):
        if run.global_step == step:
            raise OSError("the callback is broken")

    def hears(self, run, error):
        self.heard = type(error).__name__

    members = {hook: hookimpl(fails), "on_error": hookimpl(hears)}
    for method in (fails, hears):
        method.__qualname__ = f"Failing.{method.__name__}"
    return type("Failing", (), members)()


def attempt(name, callbacks):
    run = prepare(**{**job, "output_dir": name, "callback": callbacks})
    try:
        train(run)
    except (RlxError, OSError) as error:
        code = error.exit_code if isinstance(error, RlxError) else 1
        kept = sorted(path.name for path in Path(name).glob("checkpoint-*"))
        say(f"{name} ended with {type(error).__name__} {code} after {run.global_step}, kept {kept}")
    else:
        say(f"{name} ended well")
    state.wait_for_everyone()


judged = {"name": "win_rate", "rewards": ["length"], "num_prompts": 4}
for hook, step in (
    ("on_run_start", 0), ("on_loss", 1), ("on_step_end", 1), ("on_log", 1), ("on_evaluate", 1),
):  # fmt: skip
    # Before and after one that waits for the other process; there only where it fails.
    mine = [failing(hook, step)] if state.process_index == 1 else []
    attempt(f"{hook}-before", [*mine, judged])
    mine = [failing(hook, step)] if state.process_index == 0 else []
    attempt(f"{hook}-after", [judged, *mine])

# One that is switched off on one process alone leaves both in step.
observer = failing("on_log", 1)
observer.observer = state.process_index == 1
attempt("observer", [observer, judged] if state.process_index == 1 else [judged])


# What the callback that waits does alone fails on both, too.
class Broken:
    def judge(self, prompts, pairs):
        if state.process_index == 1:
            raise OSError("the judge is broken")
        return [0] * len(pairs)


attempt("judge", [WinRate(WinRate.Config(judge=Broken(), num_prompts=4))])

# So does the log itself, which one process writes.
run = prepare(**{**job, "output_dir": "log", "callback": []})
if run.folder is not None:

    def full(line):
        raise OSError("no space left")

    run.folder.log_metrics = full
try:
    train(run)
except (RlxError, OSError) as error:
    say(f"log ended with {type(error).__name__}")
