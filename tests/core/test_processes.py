"""Two processes train what one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "programs" / "two_processes.py"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors") | load_file(folder / "value_head.safetensors")


def log(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time/" not in k and "second" not in k} for line in lines]


@pytest.mark.slow
def test_fault_x5_x10_x13_two_processes_are_one(small, tmp_path):
    from rlx.core.run import prepare, train

    runs = [
        small(output_dir="even", max_steps=2),
        # The last batch has 3 rows, or one: then a process has none.
        small(output_dir="three", batch_size=4, max_rows=11, max_steps=..., num_train_epochs=1.0),
        small(output_dir="one", batch_size=4, max_rows=9, max_steps=..., num_train_epochs=1.0),
        small(
            output_dir="saved", max_steps=4, save_steps=1, save_total_limit=None, logging_steps=3,
            reward="./graded.py:Remembering",
        ),
    ]  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(PROGRAM), json.dumps({"runs": runs}),
        ],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    for number in (0, 1):
        assert f"process {number}: refused E-CONFIG-OUTPUT" in done.stdout
        assert f"process {number}: diverged at 0, unmoved True" in done.stdout
        assert f"process {number}: folder even" in done.stdout
    for options in runs[:3]:
        alone = prepare(**{**options, "output_dir": f"{options['output_dir']}-alone"})
        start = {name: p.detach().clone() for name, p in alone.policy.model.state_dict().items()}
        train(alone)
        one, two = weights(alone.path), weights(tmp_path / options["output_dir"])
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
        assert max(float((one[name] - start[name]).abs().max()) for name in one if name in start) > 1e-5
        for mine, theirs in zip(log(alone.path), log(tmp_path / options["output_dir"]), strict=True):
            assert mine["reward"] == pytest.approx(theirs["reward"]) if "reward" in mine else True
            assert mine.get("tokens") == theirs.get("tokens")
    whole, again = weights(tmp_path / "saved"), weights(tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert log(tmp_path / "saved") == log(tmp_path / "again")
