"""The best checkpoint is written, kept, named, and on request what a run ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlx
from rlx.core import checkpoint
from rlx.core.errors import SaveError
from rlx.core.run import reopen

SCORES = {1: 0.2, 2: 0.7, 3: 0.7, 4: 0.5, 5: 0.6, 6: 0.4}  # the best is step 2: of equal ones the first


class Measured:
    """Reports a number that the test chose, a step."""

    def __init__(self, scores=SCORES):
        self.scores = scores

    @rlx.hookimpl
    def on_evaluate(self, run):
        return {"eval/score": self.scores.get(run.global_step, 0.9)}  # 0.9 before training: no candidate


def options(folder, **changes):
    best = {"name": "best_checkpoint", "metric": "eval/score", **changes.pop("best", {})}
    return dict(
        reward="length", max_rows=8, max_eval_rows=2, batch_size=2, num_generations=1, num_ppo_epochs=1,
        num_mini_batches=1, max_completion_length=4, max_steps=6, eval_steps=1, logging_steps=1,
        learning_rate=1e-2, plots=False, progress="none", log_completions=0, callback=[Measured(), best],
        save_total_limit=1, output_dir=str(folder),
    ) | changes  # fmt: skip


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def named(folder: Path) -> dict:
    return json.loads((folder / "best.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_is_written_named_and_outlives_the_limit(tmp_path, capsys):
    folder = tmp_path / "run"
    rlx.run(**options(folder, save_steps=3))
    # save_steps 3 writes 3 and 6, of which the limit of 1 leaves 6; 1 was the best for one step only.
    assert steps(folder) == [2, 6]
    assert named(folder) == {
        "metric": "eval/score", "mode": "max", "step": 2, "value": 0.7, "checkpoint": "checkpoint-2",
    }  # fmt: skip
    assert checkpoint.verify(folder / "checkpoint-2") is None
    assert same(folder, folder / "checkpoint-6") and not same(folder, folder / "checkpoint-2")
    assert f"best eval/score 0.7 after step 2: {folder}/checkpoint-2" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["max", "min"])
def test_without_save_steps_only_new_bests_are_written(tmp_path, mode):
    folder = tmp_path / "run"
    rlx.run(**options(folder, best={"mode": mode}, save_total_limit=None))
    assert steps(folder) == {"max": [1, 2], "min": [1]}[mode]
    assert named(folder)["step"] == {"max": 2, "min": 1}[mode]


def test_a_run_can_end_with_the_best_policy_in_its_folder_and_in_python(tmp_path, capsys):
    folder = tmp_path / "run"
    result = rlx.run(**options(folder, best={"load_best_at_end": True}, save_steps=6))
    assert same(folder, folder / "checkpoint-2") and not same(folder, folder / "checkpoint-6")
    held, kept = result.policy.model.state_dict(), weights(folder / "checkpoint-2")
    assert all(torch.equal(held[name], kept[name]) for name in kept)
    assert "whose policy the run ends with" in capsys.readouterr().out
    assert "The policy is that of `checkpoint-2`" in (folder / "README.md").read_text()


def test_with_an_adapter_the_best_adapter_is_what_the_run_ends_with(tmp_path):
    folder = tmp_path / "run"
    rlx.run(**options(folder, best={"load_best_at_end": True}, save_steps=6, lora_r=2, max_steps=3))
    final, best, last = (
        load_file(path / "adapter_model.safetensors")
        for path in (folder, folder / "checkpoint-2", folder / "checkpoint-3")
    )
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert not all(torch.equal(last[name], best[name]) for name in best)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_has_the_same_best(tmp_path, cut):
    again = [Measured(), {"name": "best_checkpoint", "metric": "eval/score"}]
    rlx.run(**options(tmp_path / "whole", save_total_limit=None, save_steps=1))
    run = rlx.prepare(**options(tmp_path / "cut", save_total_limit=None, save_steps=1))
    while run.global_step < cut:
        run.step()
        run.save()
    run.close("interrupted", 130)
    rlx.resume(tmp_path / "cut", {"callback": again})
    assert named(tmp_path / "cut") == named(tmp_path / "whole")
    assert same(tmp_path / "cut", tmp_path / "whole") and steps(tmp_path / "cut") == [1, 2, 3, 4, 5, 6]


def test_a_resume_from_before_the_best_forgets_it(tmp_path):
    import shutil

    folder = tmp_path / "run"
    run = rlx.prepare(**options(folder, save_total_limit=None))
    run.step()
    run.step()
    run.close("interrupted", 130)
    assert named(folder)["step"] == 2
    shutil.rmtree(folder / "checkpoint-2")
    with reopen(
        folder, {"callback": [Measured({}), {"name": "best_checkpoint", "metric": "eval/score"}]}
    ) as run:
        assert named(folder)["step"] == 1 and run.protected == {1}


def test_by_hand_a_step_that_was_saved_as_the_best_is_not_written_twice(tmp_path):
    with rlx.prepare(**options(tmp_path / "run", max_steps=3)) as run:
        for _ in run:
            assert run.save() == tmp_path / "run" / f"checkpoint-{run.global_step}"
        assert run.protected == {2}
    assert steps(tmp_path / "run") == [2, 3]


def test_a_best_that_cannot_be_written_does_not_end_the_run_and_is_not_named(tmp_path, monkeypatch, capsys):
    real = checkpoint.write

    def failing(root, step, *rest, **more):
        if step == 2:
            raise SaveError("no space")
        return real(root, step, *rest, **more)

    monkeypatch.setattr(checkpoint, "write", failing)
    folder = tmp_path / "run"
    rlx.run(**options(folder, best={"load_best_at_end": True}, save_steps=3))
    out = capsys.readouterr().out
    assert "checkpoint not saved, training goes on (1 of 3): [E-SAVE] no space" in out
    # 0.7 at step 3 is the best that could be written; as an equal of step 2 it would not have counted.
    assert named(folder)["step"] == 3 and steps(folder) == [3, 6]
    assert same(folder, folder / "checkpoint-3") and "best eval/score 0.7 after step 3" in out


def test_a_run_that_fails_does_not_say_that_it_ends_with_the_best(tmp_path, capsys):
    run = rlx.prepare(**options(tmp_path / "run", best={"load_best_at_end": True}))
    with pytest.raises(rlx.Interrupted), run:
        for _ in range(3):
            run.step()
        raise KeyboardInterrupt
    out = capsys.readouterr().out
    assert "best eval/score 0.7 after step 2" in out and "the run ends with" not in out


def test_a_step_that_was_saved_before_it_turned_out_to_be_the_best_is_kept(tmp_path):
    """Its evaluation failed, the rescue wrote the checkpoint, and the resumed run evaluates it."""

    class Failing(Measured):
        @rlx.hookimpl
        def on_evaluate(self, run):
            if run.global_step == 2:
                raise rlx.RewardError("the server is down")
            return super().on_evaluate(run)

    folder = tmp_path / "run"
    best = {"name": "best_checkpoint", "metric": "eval/score"}
    with pytest.raises(rlx.RewardError):
        rlx.run(**options(folder, callback=[Failing(), best]))
    assert named(folder)["step"] == 1 and steps(folder) == [1, 2]
    rlx.resume(folder, {"callback": [Measured(), best], "save_steps": 6})
    assert named(folder)["step"] == 2 and steps(folder) == [2, 6]


def test_the_best_of_another_metric_is_none_of_this_one(tmp_path):
    folder = tmp_path / "run"
    run = rlx.prepare(**options(folder))
    run.step()
    run.close("interrupted", 130)
    other = {"name": "best_checkpoint", "metric": "eval/reward"}
    with reopen(folder, {"callback": [Measured(), other]}) as run:
        assert not (folder / "best.json").exists() and run.protected == set()
        run.step()
        assert named(folder)["metric"] == "eval/reward" and named(folder)["step"] == 2
        run.stop()


def test_there_is_one_best(tmp_path):
    twice = [{"name": "best_checkpoint", "metric": name} for name in ("eval/reward", "loss")]
    with pytest.raises(rlx.ConfigError, match="best_checkpoint is there twice"):
        rlx.run(**options(tmp_path / "run", callback=twice))


def test_an_overwritten_run_leaves_no_best(tmp_path):
    folder = tmp_path / "run"
    rlx.run(**options(folder, max_steps=2))
    rlx.run(**options(folder, max_steps=1, callback=[], overwrite_output_dir=True))
    assert not (folder / "best.json").exists()
