"""Whatever needs no training answers at once: no torch, little processor time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "numpy")
BARE = 0.03  # seconds of an interpreter that does nothing; where it takes longer, so may the commands
CODE = f"""
import sys
from rlx.core.commands.main import main
code = main(sys.argv[1:])
sys.stdout.flush()
print([name for name in {HEAVY!r} if name in sys.modules], code, file=sys.stderr)
"""
COMMANDS = {
    "help": (["--help"], 0, 0.3),
    "version": (["--version"], 0, 0.3),
    "plugins list": (["plugins", "list"], 0, 0.3),
    "plugins schema": (["plugins", "schema"], 0, 1.0),
    "config error": (["run", "--algo", "ppo", "--reward", "exact_match", "--learning-rte", "1"], 2, 0.3),
    "unknown algorithm": (["run", "--algo", "pppo"], 2, 0.3),
    "unknown verb": (["rnu"], 2, 0.3),
    "missing file": (["run", "no.yaml"], 2, 0.3),
    "compare help": (["compare", "--help"], 0, 0.3),
    "compare by an unknown judge": (["compare", "a", "b", "--judge", "rewrd"], 2, 0.3),
    "run help": (["run", "--algo", "ppo", "--reward", "length", "--help"], 0, 0.5),
    "print config": (["run", "--algo", "ppo", "--reward", "exact_match", "--print-config"], 0, 0.5),
}


def processor_seconds(code: str, words: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "RLX_NO_PLUGINS": ""},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.parametrize(("words", "code", "budget"), COMMANDS.values(), ids=COMMANDS)
def test_it_answers_without_the_training_stack(words, code, budget):
    spent = []
    for _ in range(5):  # the first may compile bytecode, and the machine may be busy with something else
        bare, _done = processor_seconds("pass", [])
        seconds, done = processor_seconds(CODE, words)
        assert done.stderr.splitlines()[-1] == f"[] {code}", done.stderr
        spent.append((seconds - bare) / max(1.0, bare / BARE))
        if spent[-1] < budget:
            return
    assert min(spent) < budget
