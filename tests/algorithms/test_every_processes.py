"""Two processes train what one trains, whatever the algorithm."""

from __future__ import annotations

import pytest

from rlx.testing.runs import PLAIN, Left, train_in_two_processes

# At the rate of the others its gradient grows from 41 to 3554 in three steps, and with it rounding.
SLOWER = {"online_dpo ipo": 1e-4}


@pytest.mark.slow
def test_two_processes_are_one(cases, of, files, tmp_path):
    from rlx.core.run import prepare, train

    def options(case, folder):
        # Batches of four, four and one row: in the last a process has none. Held-out rows: three and two.
        rows = {"max_steps": ..., "num_train_epochs": 1.0}
        given = of(case, **rows, **PLAIN)
        evaluation = given["dataset"].replace("train", "eval")
        return {
            **given,
            "learning_rate": SLOWER.get(case, PLAIN["learning_rate"]),
            "eval_dataset": evaluation,
            "output_dir": str(tmp_path / folder / case.replace(" ", "-")),
        }

    train_in_two_processes([options(case, "two") for case in cases])
    wrong = {}
    for case in cases:
        run = prepare(**options(case, "one"))
        start = {name: p.detach().clone() for name, p in run.policy.trainable().items()}
        train(run)
        assert (
            max(float((p.detach() - start[name]).abs().max()) for name, p in run.policy.trainable().items())
            > 1e-4
        )
        one, two = Left.by(run.path), Left.by(tmp_path / "two" / run.path.name)
        assert one.tensors
        worst = one.farthest(two)
        told = [
            mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
            for mine, theirs in zip(one.lines, two.lines, strict=True)
        ]
        if worst > 2e-6 or not all(told):
            wrong[case] = worst, one.lines, two.lines
    assert wrong == {}
