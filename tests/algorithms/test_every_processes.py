"""Two processes train what one trains, whatever the algorithm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "core/programs/two_processes.py"


def left(folder):
    """The tensors of a run's policy, and its log lines without what clocks and budgets say."""
    from safetensors.torch import load_file

    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {f"{file.name} {name}": tensor for name, tensor in load_file(file).items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tensors, [
        {k: v for k, v in one.items() if "time/" not in k and "second" not in k} for one in lines
    ]


@pytest.mark.slow
def test_two_processes_are_one(cases, of, files, tmp_path):
    from rlx.core.run import prepare, train

    def options(case, folder):
        # Batches of four, four and one row: in the last a process has none. Held-out rows: three and two.
        rows = {"max_steps": ..., "num_train_epochs": 1.0}
        given = of(
            case, **rows, optim="sgd", learning_rate=0.002, max_grad_norm=0, lr_scheduler_type="constant"
        )
        evaluation = given["dataset"].replace("train", "eval")
        return {
            **given,
            "eval_dataset": evaluation,
            "output_dir": str(tmp_path / folder / case.replace(" ", "-")),
        }

    runs = json.dumps({"runs": [options(case, "two") for case in cases], "go_on": False})
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(PROGRAM), runs,
        ],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    wrong = {}
    for case in cases:
        run = prepare(**options(case, "one"))
        start = {name: p.detach().clone() for name, p in run.policy.trainable().items()}
        train(run)
        assert (
            max(float((p.detach() - start[name]).abs().max()) for name, p in run.policy.trainable().items())
            > 1e-4
        )
        (one, log), (two, other) = left(run.path), left(tmp_path / "two" / run.path.name)
        assert one and one.keys() == two.keys()
        worst = max(float((one[name] - two[name]).abs().max()) for name in one)
        told = [
            mine == pytest.approx(theirs, rel=1e-3, abs=1e-5) for mine, theirs in zip(log, other, strict=True)
        ]
        if worst > 2e-6 or not all(told):
            wrong[case] = worst, log, other
    assert wrong == {}
