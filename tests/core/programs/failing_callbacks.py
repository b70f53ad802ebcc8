"""Runs of two processes, in each of which a callback fails on one alone; the test reads what is said."""

import json
import sys
from pathlib import Path

import lines
import torch

from rlx import hookimpl
from rlx.callbacks.win_rate import WinRate
from rlx.core.errors import RlxError, SaveError
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


def without_callbacks(name, change, **options):
    """A run in which something else fails on one process."""
    run = prepare(**{**job, "output_dir": name, "callback": [], **options})
    change(run)
    try:
        train(run)
    except (RlxError, OSError) as error:
        say(f"{name} ended with {type(error).__name__}")
    state.wait_for_everyone()


def fails(error):
    def failing(*given, **named):
        raise error

    return failing


# So does the log itself, which one process writes; what its error is must not part the two.
def log_fails(error):
    def change(run):
        if run.folder is not None:
            run.folder.log_metrics = fails(error)

    return change


without_callbacks("log", log_fails(OSError("no space left")))


def log_fails_later(run):
    if run.folder is not None:
        write = run.folder.log_metrics
        run.folder.log_metrics = lambda line: fails(SaveError("full"))() if line["step"] == 2 else write(line)


without_callbacks("full-log", log_fails_later)


# An algorithm that fails before it adds something up with the others, and one that fails in an evaluation.
def preparing_fails(run):
    whiten = run.algorithm.prepare
    run.algorithm.prepare = fails(OSError("broken")) if state.process_index == 1 else whiten


without_callbacks("prepare", preparing_fails, whiten_advantages=True)


# It is heard of also where somebody catches everything.
def one_swallows(run):
    whiten = run.algorithm.prepare

    def swallowing(batch, score):
        try:
            return whiten(batch, score)
        except Exception:
            return batch

    run.algorithm.prepare = fails(OSError("broken")) if state.process_index == 1 else swallowing


without_callbacks("swallowed", one_swallows, whiten_advantages=True)


def measuring_fails(run):
    if state.process_index == 0:
        run.updater.measure = fails(OSError("broken"))


pairs = [{"prompt": "1+1=", "chosen": str(i), "rejected": "no"} for i in range(8)]
ONLINE = ("num_ppo_epochs", "num_mini_batches", "num_generations", "reward")
job = {name: value for name, value in job.items() if name not in ONLINE}
offline = {"algo": "dpo", "dataset": pairs, "eval_dataset": pairs, "chat_template": "none"}
without_callbacks("measure", measuring_fails, **offline)
