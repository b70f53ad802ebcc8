"""ema: the average by hand, training untouched, evaluated, saved as a plain folder, exact on resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlx.core import checkpoint
from rlx.core.evaluate import evaluate
from rlx.core.run import prepare, reopen, train
from rlx.plugins.references import make

SMALL: dict[str, Any] = {
    "algo": "dpo", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "max_steps": 4, "batch_size": 4, "max_rows": 12, "max_eval_rows": 4, "logging_steps": 1, "plots": False,
    "progress": "none", "mixed_precision": "no",
}  # fmt: skip
IDS = torch.tensor([[3, 5, 8, 13]])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Prepares a run with the callback, which has the options given."""

    def build(name: str, ema: dict[str, Any] | None, **options: Any) -> Any:
        callbacks = [] if ema is None else [{"name": "ema", **ema}]
        return prepare(**{**SMALL, "callback": callbacks, "output_dir": str(tmp_path / name), **options})

    return build


def ranked(completions: list[str]) -> list[float]:
    """A score that no two different texts share."""
    return [int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 16**6 for text in completions]


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.trainable().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_average_is_that_of_the_formula_over_the_steps_that_count(lora_r, start):
    run = start("run", {"decay": 0.75, "update_every": 2, "start_step": 2}, max_steps=6, lora_r=lora_r)
    ema, seen = run.callbacks["ema"], {}
    for _ in run:
        seen[run.global_step] = weights(run)
        if run.global_step == 1:
            assert ema.average == {}
        if run.global_step == 3:
            assert same(ema.average, seen[2])  # it begins as a copy, and step 3 does not count
    run.close()
    four = {name: 0.75 * seen[2][name] + 0.25 * seen[4][name] for name in seen[2]}
    six = {name: 0.75 * four[name] + 0.25 * seen[6][name] for name in four}
    assert_close(ema.average, six)
    assert all(".lora_" in name for name in six) == bool(lora_r)


def test_training_goes_on_as_without_it(start):
    with_it, without = start("with", {"decay": 0.5, "evaluate": True}, eval_steps=1), start("without", None)
    train(with_it)
    train(without)
    assert same(weights(with_it), weights(without))
    assert not same(with_it.callbacks["ema"].average, weights(with_it))


@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_gets_its_own_weights_back_bit_for_bit(fails, start):
    run = start("run", {"decay": 0.5}, max_steps=2)
    list(run)
    run.close()
    own, ema = weights(run), run.callbacks["ema"]
    try:
        with ema.swapped_in(run.policy):
            assert same(weights(run), ema.average) and torch.is_grad_enabled()
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert same(weights(run), own) and not same(own, ema.average)


@pytest.mark.parametrize("algo", ["dpo", "ppo"])
def test_it_is_evaluated_under_names_of_its_own(algo, start):
    online = {"reward": ranked, "max_completion_length": 8, "learning_rate": 1e-3} if algo == "ppo" else {}
    run = start("run", {"decay": 0.5, "evaluate": True}, eval_steps=2, algo=algo, **online)
    train(run)
    lines = {line["step"]: line for line in run.metrics_history}
    name = "reward" if algo == "ppo" else "loss"
    assert [step for step, line in lines.items() if f"eval/{name}" in line] == [0, 2, 4]
    assert [step for step, line in lines.items() if f"eval/ema/{name}" in line] == [0, 2, 4]
    assert lines[0][f"eval/ema/{name}"] == lines[0][f"eval/{name}"]  # nothing is averaged yet
    ema, shown, taken = run.callbacks["ema"], run.evaluated, lines[4]
    run.events.remove(ema)
    with ema.swapped_in(run.policy):
        now = evaluate(run)  # the average that is saved is the one that was evaluated last
    other = {key.replace("eval/ema/", "eval/"): value for key, value in taken.items() if "eval/ema" in key}
    assert other == pytest.approx(now, rel=1e-6) and now[f"eval/{name}"] != taken[f"eval/{name}"]
    if algo == "ppo":  # the samples that the run shows are those of the policy itself
        scores = [float(score) for score in shown.score]
        assert sum(scores) / len(scores) == pytest.approx(taken["eval/reward"], rel=1e-5)


def test_others_can_watch_what_it_reports(start):
    watching = {"name": "early_stopping", "metric": "eval/ema/loss", "patience": 1, "min_delta": 99.0}
    run = start("run", None, eval_steps=1, callback=[{"name": "ema", "evaluate": True}, watching])
    train(run)
    assert run.global_step == 1 and "eval/ema/loss was no better" in run.stop_reason


def load(folder: Path, adapter: bool) -> Any:
    """As someone loads it who does not know where it is from."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_final_average_lies_beside_the_policy_as_a_plain_folder(lora_r, start):
    run = start("run", {"decay": 0.5}, lora_r=lora_r, algo="ppo", reward="length", max_completion_length=8)
    train(run)
    folder = run.path / "ema"
    assert (folder / "tokenizer.json").is_file() and (folder / "value_head.safetensors").is_file()
    assert "ema" in json.loads((run.path / "manifest.json").read_text())["files"]
    with torch.no_grad():
        with run.policy.active() as model:
            own = model(IDS).logits
            with run.callbacks["ema"].swapped_in(run.policy):
                averaged = model(IDS).logits
        torch.testing.assert_close(load(folder, lora_r > 0)(IDS).logits, averaged, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load(run.path, lora_r > 0)(IDS).logits, own, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(own, averaged, atol=1e-3)


def test_a_run_that_ends_before_it_begins_says_so(start, capsys):
    run = start("run", {"start_step": 9}, max_steps=1)
    train(run)
    assert not (run.path / "ema").exists()
    assert "ema: nothing was averaged, the run ended before step 9" in capsys.readouterr().out


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_resumed_run_is_exact_unless_the_average_is_dropped(forgotten, start, tmp_path, monkeypatch):
    whole = start("run", {"decay": 0.5, "evaluate": True}, lora_r=4, save_steps=1, save_total_limit=None)
    train(whole)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "ema")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "again" / f"checkpoint-{step}")
    if forgotten:
        full = checkpoint.load_state

        def forgetful(path: Path) -> dict[str, Any]:
            state = full(path)
            del state["callbacks"]["ema"]
            return state

        monkeypatch.setattr(checkpoint, "load_state", forgetful)
    again = reopen(tmp_path / "again")
    train(again)
    assert same(weights(again), weights(whole))
    exact = same(again.callbacks["ema"].average, whole.callbacks["ema"].average)
    ends = [
        (folder / "ema" / "adapter_model.safetensors").read_bytes() for folder in (again.path, whole.path)
    ]
    assert exact == (ends[0] == ends[1]) == (not forgotten)


@pytest.mark.parametrize(("option", "value"), [("decay", 1.0), ("decay", -0.1), ("update_every", 0)])
def test_options_out_of_bounds_are_refused(option, value):
    from rlx.core.errors import ConfigError

    with pytest.raises(ConfigError, match=option):
        make("callback", "ema", {option: value})
