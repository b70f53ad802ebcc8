"""Gradient checkpointing: asked for, chosen by the memory estimate, or switched on when memory runs out."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import rlx
from rlx.core import memory, snapshot
from rlx.core.errors import ConfigError, MemoryExhausted
from rlx.core.loop import Run
from rlx.core.models import load_policy
from rlx.core.recompute import can_recompute, recomputes, switch
from rlx.core.run import reopen, train
from rlx.core.settings import Settings
from rlx.testing.data import row

# Not ours: peft asks for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LINE = "gradient checkpointing: "


def chosen(run: Any) -> str:
    """What the plan says of it."""
    [line] = [line for line in run.plan if line.startswith(LINE)]
    return line.removeprefix(LINE)


def short_of_memory(trunk: Any, kept: int, recomputed: int = 1 << 20) -> list[int]:
    """Have a trunk run out of memory with too many tokens in a forward with gradient; what it was fed.

    Args:
        trunk: the model without its head.
        kept: tokens that fit as long as activations are kept.
        recomputed: tokens that fit when they are recomputed.
    """
    fed: list[int] = []

    def check(module, args, kwargs):
        if not torch.is_grad_enabled():
            return
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        fed.append(ids.numel())
        if ids.numel() > (recomputed if recomputes(module) else kept):
            torch.rand(3)  # what was drawn until then is drawn again
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    trunk.register_forward_pre_hook(check, with_kwargs=True)
    return fed


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.trainable().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pretend(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free))


# Chosen by the estimate


@pytest.mark.parametrize("asked", [None, 64, 4096])
def test_it_is_needed_when_the_smallest_step_does_not_fit_without(asked, tiny_model, monkeypatch):
    model, settings = tiny_model(), Settings(max_tokens_per_micro_batch=asked)
    tokens = asked or 1024

    def needed() -> float:
        report = memory.estimate(model, settings, token_budget=tokens, generation_rows=0, checkpointing=False)
        return report.step / 0.8

    pretend(monkeypatch, 1e15)
    roomy = needed()
    for free, fits in ((roomy + 8, True), (roomy - 8, False)):
        pretend(monkeypatch, free)
        why = memory.too_large(model, settings)
        assert bool(why) != fits
    assert f"a step of {tokens} tokens would need" in why and why.endswith(" are free")
    switch([model], on=True)  # what it would be without is asked, not what it is
    assert memory.too_large(model, settings) == why


def test_the_estimate_counts_what_the_model_does(tiny_model):
    model = tiny_model(num_hidden_layers=4)

    def activations() -> int:
        return memory.estimate(model, Settings(), token_budget=64, generation_rows=0).training["activations"]

    kept = activations()
    switch([model], on=True)
    assert activations() == memory.activation_bytes(model, 64, checkpointing=True) < kept
    switch([model], on=False)
    assert activations() == kept


def test_a_run_switches_it_on_where_no_step_fits_without(started, monkeypatch):
    plenty = started()
    assert chosen(plenty).startswith("off, a step fits without") and not recomputes(plenty.policy.base)
    pretend(monkeypatch, 0)
    scarce, off, on = (started(gradient_checkpointing=asked) for asked in ("auto", False, True))
    assert chosen(scarce).startswith("on, a step of 1024 tokens would need ")
    assert (chosen(off), chosen(on)) == ("off, as asked for", "on, as asked for")
    assert [recomputes(run.policy.base) for run in (scarce, off, on)] == [True, False, True]


def test_more_tokens_fit_once_activations_are_recomputed(started, monkeypatch):
    """The budget is looked for with what was chosen."""
    model = started().policy.model
    parts = {"token_budget": 2048, "generation_rows": 0, "checkpointing": True}
    need = memory.estimate(model, Settings(), **parts).step
    pretend(monkeypatch, need / 0.8 * 1.5)
    run = started(gradient_checkpointing=True)
    assert run.updater.budget == 2048
    assert started(gradient_checkpointing=False).updater.budget == 1024


def test_a_model_that_does_not_support_it_is_left_alone(started, monkeypatch):
    monkeypatch.setattr(type(started().policy.base), "supports_gradient_checkpointing", False)
    pretend(monkeypatch, 0)
    run = started()
    assert chosen(run) == "off, the model does not support it" and not recomputes(run.policy.base)
    with pytest.raises(ConfigError, match="does not support gradient checkpointing") as caught:
        started(gradient_checkpointing=True)
    assert caught.value.code == "E-MODEL-CHECKPOINTING" and caught.value.exit_code == 2


def test_a_model_without_such_layers_cannot():
    assert not can_recompute(torch.nn.Linear(2, 2)) and not recomputes(torch.nn.Linear(2, 2))


def test_a_model_that_came_with_it_keeps_it(started, tiny_tokenizer):
    from rlx.core.models import load_tokenizer

    settings = Settings()
    model = load_policy(settings).model
    switch([model], on=True)
    run = started(model=model, tokenizer=load_tokenizer(settings))
    assert chosen(run) == "on, as the model was given" and recomputes(run.policy.base)


@pytest.mark.parametrize(
    ("asked", "free", "said"),
    [
        ("auto", 0, "on, a step of 1024 tokens would need"),
        ("auto", 1e15, "off, a step fits without"),
        (True, 1e15, "on, as asked for"),
        (False, 0, "off, as asked for"),
    ],
)
def test_a_dry_run_says_what_would_be_chosen(asked, free, said, small, monkeypatch):
    pretend(monkeypatch, free)
    plan = rlx.run(**small(gradient_checkpointing=asked), dry_run=True).plan
    assert any(line.startswith(LINE + said) for line in plan)


def test_it_goes_off_again_and_leaves_no_trace(make_folder, tmp_path):
    policy = load_policy(Settings(model=str(make_folder()), lora_r=2))
    ids = torch.arange(3, 11).view(1, 8)
    policy.with_gradient_checkpointing()
    assert policy.base(ids, output_hidden_states=True).hidden_states[0].requires_grad
    policy.with_gradient_checkpointing(False)
    assert not recomputes(policy.base) and policy.base.config.use_cache is True
    assert not policy.base(ids, output_hidden_states=True).hidden_states[0].requires_grad


# Memory runs out with one row


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_r": 4, "lora_dropout": 0.2, "disable_dropout": False, "learning_rate": 1e-2}],
    ids=["full", "dropout"],
)
def test_fault_n12_one_row_that_does_not_fit_is_recomputed_instead(options, started, monkeypatch):
    """The mini-batch is replayed as a run goes through it that had it on from the start."""
    said: list[str] = []
    monkeypatch.setattr(Run, "say", lambda run, line: said.append(line))
    scarce, from_the_start = started(**options), started(gradient_checkpointing=True, **options)
    start = weights(scarce)
    for run in (scarce, from_the_start):
        fed = short_of_memory(run.policy.base.model, kept=20, recomputed=70)
        for _ in range(2):
            run.step()
        assert run.updater.budget == 64 and max(fed) > 70
    assert recomputes(scarce.policy.base) and not equal(start, weights(scarce))
    assert equal(weights(scarce), weights(from_the_start))
    assert len(said) == 1 and said[0].startswith("out of memory with one row of ")
    assert said[0].endswith(" tokens in a forward and backward: gradient checkpointing is on from here on")


def test_a_value_model_of_its_own_is_recomputed_too(started):
    value = started().policy.model
    scarce, from_the_start = (
        started(value_model=copy.deepcopy(value), gradient_checkpointing=asked) for asked in ("auto", True)
    )
    for run in (scarce, from_the_start):
        short_of_memory(run.policy.value_model.backbone, kept=20)
        run.step()
    assert recomputes(*scarce.policy.trunks) and len(scarce.policy.trunks) == 2
    assert equal(weights(scarce), weights(from_the_start))


@pytest.mark.parametrize("lora_r", [0, 4])
def test_so_is_a_reward_model(lora_r, started, tmp_path):
    rows = [json.dumps(row(number, "pairs, text")) for number in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    ours = {
        "algo": "reward", "dataset": str(tmp_path / "pairs.jsonl"), "batch_size": 4, "max_rows": ...,
        "max_eval_rows": ..., "reward": ..., "num_generations": ..., "num_ppo_epochs": ...,
        "num_mini_batches": ..., "max_completion_length": ..., "lora_r": lora_r,
    }  # fmt: skip
    scarce, from_the_start = (started(gradient_checkpointing=asked, **ours) for asked in ("auto", True))
    start = weights(scarce)
    for run in (scarce, from_the_start):
        short_of_memory(run.policy.base.model, kept=20)
        for _ in range(2):  # the first one is of learning rate 0
            run.step()
    assert recomputes(scarce.policy.base) and not equal(start, weights(scarce))
    assert equal(weights(scarce), weights(from_the_start))


@pytest.mark.parametrize(
    ("asked", "able", "hint"),
    [
        ("auto", True, "set lora_r or dtype"),  # it was switched on, and still one row was too much
        (True, True, "set lora_r or dtype"),
        (False, True, "set gradient_checkpointing, lora_r or dtype"),
        ("auto", False, "set lora_r or dtype"),
    ],
)
def test_fault_n12_the_end_says_what_is_left_to_do(asked, able, hint, started, monkeypatch):
    run = started(gradient_checkpointing=asked)
    monkeypatch.setattr(type(run.policy.base), "supports_gradient_checkpointing", able)
    short_of_memory(run.policy.base.model, kept=20, recomputed=20)
    with pytest.raises(MemoryExhausted, match="out of memory with one row of") as caught:
        run.step()
    assert caught.value.exit_code == 5 and hint in caught.value.hint
    assert recomputes(run.policy.base) == (asked is not False and able)


# Resume


def log_of(run: Any) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if "time/" not in name and "second" not in name}
        for line in run.metrics_history
    ]


def test_a_resumed_run_recomputes_what_the_first_one_did(small, started, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Run, "say", lambda run, line: said.append(line))
    run = started(max_steps=3)
    short_of_memory(run.policy.base.model, kept=20, recomputed=70)
    run.step()
    snapshot.save(run)
    saved = run.path
    train(run)

    def again(**overrides: Any) -> Any:
        import shutil

        folder = tmp_path / f"again-{len(list(tmp_path.glob('again-*')))}"
        shutil.copytree(saved, folder)
        for path in folder.glob("checkpoint-[2-9]"):
            shutil.rmtree(path)
        return reopen(folder, overrides)

    resumed = again()
    assert "gradient checkpointing is on, as it was" in said
    assert recomputes(resumed.policy.base) and resumed.updater.state_dict()["checkpointing"] is True
    assert resumed.updater.planned == run.updater.planned
    train(resumed)
    assert equal(weights(resumed), weights(run)) and log_of(resumed) == log_of(run)
    changed = again(gradient_checkpointing=False)
    assert not recomputes(changed.policy.base)
    changed.close()


def test_a_run_that_kept_its_activations_keeps_them(started, tmp_path, monkeypatch):
    run = started(max_steps=2, save_steps=1, save_total_limit=None)
    run.step()
    snapshot.save(run)
    run.close()
    said: list[str] = []
    monkeypatch.setattr(Run, "say", lambda run, line: said.append(line))
    pretend(monkeypatch, 0)
    resumed = reopen(run.path)
    assert chosen(resumed).startswith("on, ") and not recomputes(resumed.policy.base)
    assert "gradient checkpointing is off, as it was" in said
    resumed.close()
