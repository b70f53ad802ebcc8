"""Runs of two processes, one after the other; the test reads what they leave. Started by torchrun."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from rlx.core.errors import ConfigError, DivergedError
from rlx.core.run import prepare, reopen, train

torch.set_num_threads(1)
jobs = json.loads(sys.argv[1])
state = PartialState(cpu=True)


def say(line: str) -> None:
    print(f"process {state.process_index}: {line}", flush=True)


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
