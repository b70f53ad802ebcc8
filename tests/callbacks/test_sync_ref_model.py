"""sync_ref_model in whole runs: when it moves, what a resume needs, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlx.core import checkpoint
from rlx.core.errors import ConfigError
from rlx.core.run import prepare, reopen, train

SMALL: dict[str, Any] = {
    "algo": "dpo", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "max_steps": 5, "batch_size": 4, "max_rows": 12, "max_eval_rows": 4, "logging_steps": 1, "plots": False,
    "progress": "none", "mixed_precision": "no", "sync_ref_model": True, "ref_model_sync_steps": 2,
}  # fmt: skip
WAYS = {
    "full": {"ref_model_mixup_alpha": 0.6},
    "adapter": {"lora_r": 4, "lora_dropout": 0.1, "ref_model_mixup_alpha": 1.0},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.trainable().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("way", WAYS)
def test_it_moves_every_so_many_steps_and_stays_in_between(way, tmp_path):
    run = prepare(**SMALL, **WAYS[way], output_dir=str(tmp_path / "run"))
    alpha = WAYS[way]["ref_model_mixup_alpha"]
    assert any(line.endswith("moved every 2 steps") for line in run.plan)
    expected = run.studio.reference.state_dict()
    for step in range(1, 6):
        run.step()
        if step in (2, 4):
            now = weights(run)
            expected = {name: alpha * now[name] + (1 - alpha) * old for name, old in expected.items()}
        for name, tensor in run.studio.reference.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert run.callbacks["sync_ref_model"].last_sync_step == 4
    run.close()


def test_a_sync_that_another_callbacks_failure_kept_from_happening_is_made_up_for(tmp_path):
    run = prepare(**SMALL, output_dir=str(tmp_path / "run"))
    run.step()
    removed = run.remove_callback("sync_ref_model")
    run.step()
    run.events.add(removed, "sync_ref_model")
    before = run.studio.reference.state_dict()
    run.step()
    assert removed.last_sync_step == 3 and not same(run.studio.reference.state_dict(), before)
    run.close()


@pytest.mark.parametrize(
    ("way", "forgotten"),
    [
        ("full", "nothing"),
        ("full", "reference"),
        ("full", "last_sync_step"),
        ("adapter", "nothing"),
        ("adapter", "reference"),
    ],
)
def test_a_resumed_run_is_exact_unless_the_reference_is_dropped(way, forgotten, tmp_path, monkeypatch):
    options = {**SMALL, **WAYS[way], "save_steps": 1, "save_total_limit": None}
    whole = prepare(**options, output_dir=str(tmp_path / "run"))
    start = whole.studio.reference.state_dict()
    train(whole)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    # After step 4 a run that did not know of the move in it would move at once.
    for step in (5,) if forgotten == "last_sync_step" else (3, 4, 5):
        shutil.rmtree(tmp_path / "again" / f"checkpoint-{step}")
    load = checkpoint.load_state

    def forgetful(path: Path) -> dict[str, Any]:
        state = load(path)
        if forgotten == "reference":
            state["reference"] = start
        if forgotten == "last_sync_step":
            state["callbacks"]["sync_ref_model"]["last_sync_step"] = 0
        return state

    monkeypatch.setattr(checkpoint, "load_state", forgetful)
    again = reopen(tmp_path / "again")
    train(again)
    exact = same(weights(again), weights(whole))
    exact &= same(again.studio.reference.state_dict(), whole.studio.reference.state_dict())
    assert exact == (forgotten == "nothing")


def test_the_callback_alone_says_which_option_it_needs(tmp_path):
    run = prepare(
        **{**SMALL, "sync_ref_model": False, "callback": ["sync_ref_model"]}, output_dir=str(tmp_path / "run")
    )
    with pytest.raises(ConfigError, match="option of the same name") as caught:
        train(run)
    assert "--sync-ref-model" in caught.value.hint and run.global_step == 0


def test_given_by_both_names_it_moves_once(tmp_path):
    run = prepare(**{**SMALL, "callback": ["sync_ref_model"]}, output_dir=str(tmp_path / "run"))
    assert [name for name in run.callbacks if "sync" in name] == ["sync_ref_model"]
    run.close()
