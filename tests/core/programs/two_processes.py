"""Runs of two processes, one after the other; the test reads what they leave. Started by torchrun."""

import atexit
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import lines
import torch

from rlx import hookimpl
from rlx.core import memory
from rlx.core.errors import ConfigError, DivergedError, RewardError, RlxError
from rlx.core.peers import connect
from rlx.core.recompute import recomputes
from rlx.core.run import prepare, reopen, train

torch.set_num_threads(1)
jobs = json.loads(sys.argv[1])
# The last to be called at exit, as it is the first to be given: the group is gone before the interpreter.
atexit.register(lambda: say(f"group at exit {torch.distributed.is_initialized()}"))
state = connect()


def say(line: str) -> None:
    lines.say(state.process_index, line)


for options in jobs["runs"]:
    run = prepare(**options)
    assert (run.folder is not None) == state.is_main_process
    say(f"folder {run.path.name}")
    train(run)

if not jobs.get("go_on", True):
    sys.exit()

# Goes on from the first checkpoint of the last run, as if it had been killed after it.
if state.is_main_process:
    shutil.copytree(jobs["runs"][-1]["output_dir"], "again")
    for path in Path("again").glob("checkpoint-[2-9]"):
        shutil.rmtree(path)
state.wait_for_everyone()
train(reopen("again"))

# A folder that is taken: every process hears of it.
try:
    prepare(**jobs["runs"][0])
except ConfigError as error:
    say(f"refused {error.code}")

# A loss that is NaN on one process ends both at the same step.
run = prepare(**{**jobs["runs"][0], "output_dir": "diverges"})
if state.process_index == 1:
    loss = run.algorithm.loss

    def poisoned(batch, now):
        found = loss(batch, now)
        return replace(found, terms={by: terms * float("nan") for by, terms in found.terms.items()})

    run.algorithm.loss = poisoned
before = [p.detach().clone() for p in run.policy.trainable().values()]
try:
    train(run)
except DivergedError:
    still = all(torch.equal(a, b) for a, b in zip(before, run.policy.trainable().values(), strict=True))
    say(f"diverged at {run.global_step}, unmoved {still}")
state.wait_for_everyone()

# A reward that fails on one process ends both, and what was done so far is saved.
run = prepare(**{**jobs["runs"][0], "output_dir": "fails", "max_steps": 3})
if state.process_index == 1:
    inner = run.studio.rewards.score

    def failing(*arguments):
        if run.global_step == 1:
            raise RewardError("the reward is broken")
        return inner(*arguments)

    run.studio.rewards.score = failing
try:
    train(run)
except RlxError as error:
    say(f"ended with {error.exit_code} after {run.global_step}, saved {Path('fails/checkpoint-1').exists()}")
state.wait_for_everyone()

# So does a loss.
run = prepare(**{**jobs["runs"][0], "output_dir": "raises"})
if state.process_index == 0:
    run.algorithm.loss = lambda batch, now: 1 / 0
try:
    train(run)
except (RlxError, ZeroDivisionError) as error:
    say(f"ended with {type(error).__name__}")
state.wait_for_everyone()


# Memory that is short on one process: both recompute activations, and go through the mini-batch again.
run = prepare(**{**jobs["runs"][0], "output_dir": "short"})
if state.process_index == 1:

    def check(module, args, kwargs):
        if torch.is_grad_enabled() and not recomputes(module):
            raise torch.OutOfMemoryError("CUDA out of memory")

    run.policy.base.model.register_forward_pre_hook(check, with_kwargs=True)
    memory.free_bytes = lambda device: 0  # of which the next run hears
train(run)
say(f"recomputes {recomputes(run.policy.base)} in pieces of {run.updater.budget}")
with prepare(**{**jobs["runs"][0], "output_dir": "planned", "max_steps": 1}) as run:
    [line] = [line for line in run.plan if line.startswith("gradient checkpointing: ")]
    say(f"planned {recomputes(run.policy.base)} in pieces of {run.updater.budget}, {line[-42:]}")
state.wait_for_everyone()


class Alone:
    """On one process it has a checkpoint written and the run stopped; on the other it fails at the end."""

    @hookimpl
    def on_loss(self, run):
        run.saving = run.global_step == 0 and state.process_index == 1

    @hookimpl
    def on_step_end(self, run):
        if run.global_step == 2 and state.process_index == 1:
            run.stop("enough")

    @hookimpl
    def on_save(self, run, path):
        if path == run.path:
            raise OSError("the callback is broken")


# What a callback asks for on one process is done by both, and where it fails on one both end.
run = prepare(**{**jobs["runs"][0], "output_dir": "alone", "max_steps": 4, "callback": [Alone()]})
try:
    train(run)
except (RlxError, OSError) as error:
    saved = [step for step in (1, 2) if Path(f"alone/checkpoint-{step}").exists()]
    say(f"alone ended with {type(error).__name__} after {run.global_step}, {saved}: {run.stop_reason}")
