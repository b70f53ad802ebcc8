"""A callback for each case, which fails that one and no other; named after the case."""

import contextlib
import random
import sys
from dataclasses import dataclass

import torch

import rlx


class Good(rlx.Callback):
    """Counts steps, and draws numbers."""

    def __init__(self, config):
        super().__init__(config)
        self.steps = 0

    @rlx.hookimpl
    def on_step_end(self, run):
        self.steps += 1
        torch.rand(3)
        random.random()

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class HooksKnown(Good):
    @rlx.hookimpl
    def on_step_begin(self, run): ...


class Builds(Good):
    def __init__(self, config):
        raise RuntimeError("no licence")


class ConfigDocumented(Good):
    @dataclass
    class Config:
        every: int = rlx.opt(1, "not frozen")


class SurvivesARun(Good):
    observer = True

    @rlx.hookimpl
    def on_evaluate(self, run):
        return {"share": 1 / (run.global_step - 2)}


class LeavesTrainingAlone(Good):
    @rlx.hookimpl
    def on_loss(self, run, loss):
        with torch.no_grad():
            for parameter in run.policy.trainable().values():
                parameter.mul_(0.999)


class StateSurvivesACheckpoint(Good):
    """Forgets a number among many."""

    def state_dict(self):
        seen = torch.zeros(5000)
        seen[2500] = self.steps
        return {"seen": seen}

    def load_state_dict(self, state):
        self.steps = 0


class ResumesBitForBit(Good):
    """Scales the weights by how often it was called, which a checkpoint does not know."""

    changes_training = True

    def __init__(self, config):
        super().__init__(config)
        self.calls = 0

    @rlx.hookimpl
    def on_loss(self, run):
        self.calls += 1
        with torch.no_grad():
            for parameter in run.policy.trainable().values():
                parameter.mul_(1 - 0.01 * self.calls)


class RemovableMidRun(Good):
    """Puts itself between the run and its log, and is not there any more when it is needed."""

    @rlx.hookimpl
    def on_run_start(self, run):
        log, self.there = run.log, True

        def watched(metrics):
            if not self.there:
                raise RuntimeError("nobody watches the log")
            log(metrics)

        run.log = watched

    @rlx.hookimpl
    def on_run_end(self, run):
        self.there = False


class SurvivesABrokenTerminal(Good):
    @rlx.hookimpl
    def on_log(self, run, metrics):
        print("step", metrics["step"])
        with contextlib.suppress(AttributeError):
            sys.stdout.flush()
