"""Several runs on one base: each trains its own adapter, as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rlx
from rlx.core import snapshot
from rlx.core.run import reopen
from rlx.plugins.datasets import tiny_path

STEPS = 2


def load_base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture
def prepare(tmp_path: Path, tokenizer) -> Callable[..., Any]:
    """A run on a model object: a few steps, small batches, nothing drawn or printed."""

    def make(base: Any, name: str, **options: Any) -> Any:
        return rlx.prepare(
            **{
                "algo": "ppo",
                "model": base,
                "tokenizer": tokenizer,
                "dataset": "wordmath",
                "reward": "exact_match",
                "lora_r": 4,
                "learning_rate": 1e-2,
                "num_ppo_epochs": 2,
                "max_steps": STEPS,
                "batch_size": 4,
                "max_completion_length": 6,
                "max_rows": 16,
                "max_eval_rows": 4,
                "logging_steps": 1,
                "progress": "none",
                "plots": False,
                "output_dir": str(tmp_path / name),
                **options,
            }
        )

    return make


def shorter(completions: list[str], **kwargs: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.policy.trainable().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def numbers(run: Any) -> list[dict[str, float]]:
    """The metrics that do not tell the time."""
    return [
        {name: value for name, value in line.items() if "time" not in name and "second" not in name}
        for line in run.metrics_history
    ]


KINDS = {
    "plain": ({}, {"reward": shorter, "seed": 1}),
    "dropout": ({"lora_dropout": 0.3}, {"lora_dropout": 0.0, "lora_r": 2, "seed": 1}),
    "checkpointing": ({"gradient_checkpointing": True}, {"gradient_checkpointing": True, "seed": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_side_by_side_get_the_numbers_that_each_gets_alone(kind, prepare):
    options = KINDS[kind]
    alone = []
    for number, chosen in enumerate(options):
        run = prepare(load_base(), f"alone-{number}", **chosen)
        for _ in run:
            pass
        run.close()
        alone.append((weights(run), numbers(run)))
    assert not same(alone[0][0], alone[1][0])
    base = load_base()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    runs = [prepare(base, f"beside-{number}", **chosen) for number, chosen in enumerate(options)]
    assert runs[0].policy.model is runs[1].policy.model
    for _ in range(STEPS):
        for run in runs:
            run.step()
    for run, (trained, metrics) in zip(runs, alone, strict=True):
        run.close()
        assert same(weights(run), trained)
        assert numbers(run) == metrics
    now = {name.replace(".base_layer", ""): p for name, p in base.named_parameters()}
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_another_adapter_on_the_base_stays_untouched_whatever_happens(prepare):
    base = load_base()
    first = prepare(base, "first")
    first.step()
    kept, model = weights(first), first.policy.model
    second = prepare(base, "second", seed=1)
    modes = {name: module.training for name, module in model.named_modules()}
    for fails in ("nothing", "loss", "reward"):
        model.set_adapter("default")
        if fails == "nothing":
            began = weights(second)
            second.step()
            moved = weights(second)
            assert not any(torch.equal(moved[name], began[name]) for name in began)
        else:
            broken = second.algorithm if fails == "loss" else second.studio.rewards
            setattr(broken, "loss" if fails == "loss" else "score", lambda *given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                second.step()
        assert model.active_adapter == "default" and same(weights(first), kept)
        assert {name: module.training for name, module in model.named_modules()} == modes
    first.step()
    assert not same(weights(first), kept)
    for run in (first, second):
        run.close()


def test_each_run_saves_its_own_adapter_and_resumes_on_a_shared_base(prepare, tmp_path, tokenizer):
    whole, base = load_base(), load_base()
    for number in (0, 1):
        run = prepare(whole, f"whole-{number}", seed=number)
        list(run)
        run.close()
    wanted = {name: p for name, p in run.policy.trainable().items()}
    runs = [prepare(base, f"part-{number}", seed=number) for number in (0, 1)]
    for run in runs:
        run.step()
        snapshot.save(run)
        run.close()
    again = reopen(tmp_path / "part-1", model=base, tokenizer=tokenizer)
    assert again.policy.adapter == "default-3" and again.global_step == 1
    assert same(weights(again), weights(runs[1]))
    list(again)
    again.close()
    assert same(weights(again), {name: p.detach() for name, p in wanted.items()})

    from peft import PeftModel

    again.policy.save_pretrained(tmp_path / "saved")
    theirs = PeftModel.from_pretrained(load_base(), tmp_path / "saved")
    ids = torch.tensor([[3, 4, 5, 6]])
    with again.policy.active() as model, torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert list(theirs.peft_config) == ["default"]


def test_a_run_starts_from_the_adapter_of_another_and_is_held_to_it(prepare, tmp_path):
    base = load_base()
    first = prepare(base, "first")
    list(first)
    first.close()
    first.policy.save_pretrained(tmp_path / "adapter")
    second = prepare(base, "second", lora_r=0, adapter=str(tmp_path / "adapter"))
    third = prepare(base, "third", lora_r=4, reference_adapter=str(tmp_path / "adapter"))
    names = ["default", "default-2", "default-2-reference", "default-3", "default-3-reference"]
    assert sorted(first.policy.model.peft_config) == names
    assert same(weights(second), weights(first))
    rollouts = second.roll_out()
    assert torch.allclose(rollouts.old, rollouts.reference, atol=1e-5)
    rollouts = third.roll_out()
    assert not torch.allclose(rollouts.old, rollouts.reference, atol=1e-2)
    with first.policy.active() as model:
        expected = rlx.core.logprobs.score(model, rollouts.sequences).logps
    assert torch.allclose(rollouts.reference, expected, atol=1e-5)
    for run in (second, third):
        run.close()


def test_callbacks_find_their_own_runs_adapter_in_use(prepare):
    seen: list[tuple[str, str, bool]] = []

    class Watching:
        def __init__(self, name: str) -> None:
            self.name = name

        @rlx.hookimpl
        def on_rollouts(self, run: Any) -> None:
            seen.append((self.name, run.policy.model.active_adapter, run.policy.model.training))

        @rlx.hookimpl
        def on_step_end(self, run: Any) -> None:
            seen.append((self.name, run.policy.model.active_adapter, run.policy.model.training))

    base = load_base()
    runs = [prepare(base, name, callback=[Watching(name)]) for name in ("one", "two")]
    for run in runs:
        run.step()
        run.close()
    assert seen == [("one", "default", False)] * 2 + [("two", "default-2", False)] * 2


def test_own_code_stands_between_rollout_and_update(prepare):
    run = prepare(load_base(), "hand")
    before = weights(run)
    rollouts = run.roll_out()
    rollouts = replace(rollouts, score=torch.arange(len(rollouts)).float())
    batch = run.prepare(rollouts)
    verdicts = [run.update(mini) for mini in run.minibatches(batch)]
    metrics = run.end_step(batch)
    run.close()
    assert verdicts == ["step"] * run.algorithm.epochs * run.algorithm.mini_batches
    assert run.global_step == 1 and metrics["loss"] == metrics["loss"]
    assert not same(weights(run), before)
