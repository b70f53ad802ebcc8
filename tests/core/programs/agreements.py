"""Two processes with one agreement inside another; the test reads what is said."""

import sys
from types import SimpleNamespace

import lines
import torch

from rlx.core.meter import total
from rlx.core.peers import agreed, connect
from rlx.core.scorer import RunScorer

torch.set_num_threads(1)
state = connect()
studio = SimpleNamespace(accelerator=state, settings=SimpleNamespace(max_completion_length=8), rewards=None)


def attempt(name, first, second, *, after=None):
    """Each process does its own thing in the inner agreement, then, if it got there, something after it."""
    run = SimpleNamespace(accelerator=state, together=False, score=RunScorer(studio))
    mine = (first, second)[state.process_index]
    try:
        with agreed(run, "the outer"):
            with agreed(run, "the inner"):
                mine(run)
            if after is not None:
                after(run)
    except Exception as error:
        said = type(error).__name__, str(error).splitlines()[0]
    else:
        said = "nothing", ""
    # Had one process asked once more than the other, this sum would be of something else, or never end.
    met = float(total(state, torch.tensor(100.0)))
    lines.say(state.process_index, f"{name}: {said[0]}: {said[1]} together {run.together} met {met:.0f}")


def well(run):
    """Nothing goes wrong."""


def fail(run):
    raise ValueError("on purpose")


def add(run):
    run.score.total(torch.ones(1))


attempt("well", well, well)
attempt("within", well, fail)
attempt("heard", add, fail)
attempt("added", add, add)
attempt("after", well, well, after=lambda run: fail(run) if state.process_index == 0 else None)
attempt("late", add, add, after=lambda run: fail(run) if state.process_index == 0 else add(run))
sys.exit()
