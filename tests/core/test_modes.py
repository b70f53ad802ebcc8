"""In which mode and precision a run samples, measures and learns."""

from __future__ import annotations

import pytest
import torch

import rlx
from rlx.core.meter import Meter

ROWS = [{"prompt": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(4)]
# Not ours: peft asks for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def length(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture
def prepared(tmp_path):
    """Makes a run of two prompts a step, on the embedded model."""
    runs = []

    def make(**changes):
        options = {
            "reward": length, "dataset": ROWS, "batch_size": 2, "max_steps": 1, "max_completion_length": 4,
            "plots": False, "progress": "none", "output_dir": str(tmp_path / f"run-{len(runs)}"),
        }  # fmt: skip
        runs.append(rlx.prepare(**{**options, **changes}))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def autocast():
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def test_gradient_checkpointing_computes_each_layer_again_in_the_backward_pass(prepared):
    calls = {}
    for on in (False, True):
        run = prepared(gradient_checkpointing=on, num_ppo_epochs=1)
        batch, seen = run.prepare(run.roll_out()), []
        run.policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        for mini_batch in run.minibatches(batch):
            run.update(mini_batch)
        calls[on] = len(seen)
    assert calls == {False: 1, True: 2}


def test_dropout_acts_in_the_update_alone(prepared):
    run = prepared(lora_r=4, lora_dropout=0.5, disable_dropout=False)
    modes = {}
    dropout = next(m for m in run.policy.model.modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.5)
    dropout.register_forward_hook(
        lambda module, *_: modes.setdefault(torch.is_grad_enabled(), set()).add(module.training)
    )
    run.step()
    assert modes == {False: {False}, True: {True}}


def test_the_mode_is_given_back_when_the_update_fails(prepared):
    run = prepared()
    batch = run.prepare(run.roll_out())
    run.algorithm.loss = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.updater(batch)
    assert not any(module.training for module in run.policy.model.modules())


def test_sampling_and_every_measurement_are_in_the_precision_of_the_update(prepared):
    run = prepared(mixed_precision="bf16", kl_estimator="full", lora_r=2)
    seen = []
    run.policy.base.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(autocast()))
    run.step()
    assert set(seen) == {torch.bfloat16}


def test_what_was_never_sampled_has_no_temperature(prepared):
    # The policy and its reference are measured alike, so before the first step their log-probs are equal.
    pairs = [{"prompt": f"What is {i}?", "chosen": str(i), "rejected": "no"} for i in range(4)]
    run = prepared(algo="dpo", reward=[], dataset=pairs, temperature=0.5)
    batch = run.prepare(run.collate())
    assert torch.equal(batch.reference, run.score(batch.sequences).logps)
    assert torch.allclose(batch.reference, run.updater.score(batch.sequences).logps, atol=1e-5)


def test_means_are_exact_beyond_sixteen_million_values(prepared):
    # 2^24 + 1 is the first whole number that float32 cannot hold.
    meter = Meter()
    meter.sums["x"], meter.counts["x"] = torch.tensor(2.0**24 + 1, dtype=torch.float64), 2**24 + 1
    assert meter.means(prepared().accelerator)["x"] == 1.0


def test_a_generator_that_cannot_be_closed_does_not_keep_the_run_folder(prepared):
    run = prepared()
    closing = run.studio.generator.close
    run.studio.generator.close = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.close()
    run.studio.generator.close = closing
    prepared(output_dir=str(run.path), overwrite_output_dir=True)  # refused while another holds the lock
