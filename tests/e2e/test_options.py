"""Every option that changes how a run is put together, in a whole run of two steps."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlx
from rlx.plugins.datasets import tiny_path

# Not ours: peft asks for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HALF = 0.03  # bfloat16 keeps 8 bits of a logit


@pytest.fixture(scope="module")
def base():
    """The embedded model and its tokenizer; copy the model before training it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)  # saved in bfloat16
    return model, AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base):
    """Folders of: another model, a LoRA adapter that changes what the model computes."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("models")
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    model.save_pretrained(root / "other")
    tokenizer.save_pretrained(root / "other")
    adapted = get_peft_model(
        copy.deepcopy(base[0]), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(root / "adapter")
    return {name: str(root / name) for name in ("other", "adapter")}


PLAIN = {
    "full": {},
    "lora": {"lora_r": 8},
    "lora dropout": {"lora_r": 8, "lora_dropout": 0.2, "disable_dropout": False, "ratio": 1.0},
    "kl full, lora": {"kl_estimator": "full", "lora_r": 4},
    "kl full, copy": {"kl_estimator": "full"},
    "kl k3": {"kl_estimator": "k3"},
    "no reference": {"kl_coef": 0},
    "adaptive kl": {"kl_controller": "adaptive"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gradient checkpointing, lora": {"gradient_checkpointing": True, "lora_r": 4},
    "upcast norms": {"upcast_norms": True, "dtype": "bfloat16", "ratio": HALF},
    "mixed precision": {"mixed_precision": "bf16", "ratio": HALF},
    "mixed precision, recompute": {"mixed_precision": "bf16", "recompute_logps": True, "ratio": HALF},
    "recompute": {"recompute_logps": True},
    "generate by transformers": {"generator": "transformers"},
    "transformers, lora": {"generator": "transformers", "lora_r": 4},
    "entropy": {"entropy_coef": 0.01},
    "score scaling": {"score_scaling": "standardise", "score_clip": 1.0},
    "whitened": {"whiten_rewards": True, "whiten_advantages": False},
    "micro-batches": {"max_tokens_per_micro_batch": 64},
    "mini-batches": {"num_mini_batches": 2, "ratio": 0.2},
    "generations": {"num_generations": 3},
    "generation batches": {"generation_batch_size": 1},
    "cut samplers": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "ratio": 1.0},
    "temperature": {"temperature": 0.7},
    "sgd": {"optim": "sgd", "max_grad_norm": 0},
    "separate learning rate": {"value_learning_rate": 1e-2},
    "epochs": {"max_steps": ..., "num_train_epochs": 1.0},
}


@pytest.mark.parametrize("name", PLAIN)
def test_it_runs_to_its_end(name, options, check, recwarn):
    changes = dict(PLAIN[name])
    ratio = changes.pop("ratio", 1e-4)
    result = rlx.run(**options(**changes))
    check(result.metrics, ratio=ratio)
    assert [str(w.message) for w in recwarn] == []
    assert (result.folder / "value_head.safetensors").is_file()


def test_objects_train_as_names_do(base, options, tmp_path):
    named = rlx.run(**options(output_dir=str(tmp_path / "named")))
    model = copy.deepcopy(base[0])
    given = rlx.run(**options(model=model, tokenizer=base[1], output_dir=str(tmp_path / "given")))
    timeless = [
        [{k: v for k, v in line.items() if "seconds" not in k and "second" not in k and "time/" not in k}
         for line in run.metrics]
        for run in (named, given)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]
    assert given.policy.model is model


def test_a_tokenizer_object_may_lack_a_pad_token_or_share_it(base, options, check, tmp_path):
    for pad in (None, base[1].eos_token):
        tokenizer = copy.deepcopy(base[1])
        tokenizer.pad_token = pad
        given = {"model": copy.deepcopy(base[0]), "tokenizer": tokenizer}
        result = rlx.run(**options(**given, output_dir=str(tmp_path / f"pad-{pad is None}")))
        check(result.metrics)
        # Stops are seen although they look like padding.
        assert any(line["completion/eos_rate"] > 0 for line in result.metrics)


def test_other_references_are_what_the_kl_is_measured_against(base, options, folders):
    measured = {}
    other = AutoModelForCausalLM.from_pretrained(folders["other"], dtype=torch.float32)
    for name, changes in {
        "path": {"reference_model": folders["other"]},
        "object": {"reference_model": other},
        "adapter": {"reference_adapter": folders["adapter"], "lora_r": 4},
    }.items():
        changes |= {"max_steps": 1, "kl_estimator": "full", "overwrite_output_dir": True}
        measured[name] = rlx.run(**options(**changes)).metrics[0]["kl"]
    assert measured["path"] == pytest.approx(measured["object"], rel=1e-5)
    assert measured["path"] > 1e-4 and measured["adapter"] > 1e-4  # an exact KL is positive
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_one_object_cannot_be_policy_and_reference(base, options):
    model = copy.deepcopy(base[0])
    with pytest.raises(rlx.ConfigError, match="shares weights") as caught:
        rlx.run(**options(model=model, tokenizer=base[1], reference_model=model))
    assert "copy.deepcopy(model)" in caught.value.hint


def test_a_model_object_needs_its_tokenizer(base, options):
    with pytest.raises(rlx.ConfigError, match="without its tokenizer"):
        rlx.run(**options(model=base[0]))


@pytest.mark.parametrize("which", ["path", "object"])
def test_a_value_model_of_its_own_is_trained_and_saved(which, base, options, folders, check):
    if which == "path":
        result = rlx.run(**options(value_model=folders["other"]))
    else:
        result = rlx.run(**options(value_model=copy.deepcopy(base[0])))
    check(result.metrics)
    assert result.policy.value_model is not None
    assert list(result.folder.glob("value*"))


def test_sampling_in_half_precision_leaves_the_weights_alone(options, check):
    run = rlx.prepare(**options(generation_dtype="bfloat16", recompute_logps=True))
    before = {name: p.detach().clone() for name, p in run.policy.model.named_parameters()}
    run.roll_out()
    for name, parameter in run.policy.model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name]), name
    run.close()


def test_norms_stay_in_float32(options):
    run = rlx.prepare(**options(dtype="bfloat16", upcast_norms=True))
    kinds = {name.endswith("norm.weight"): p.dtype for name, p in run.policy.model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert any("half precision" in line for line in run.plan)
    run.close()


async def slow_digit(completions, **columns):
    return [float(any(c.isdigit() for c in text)) for text in completions]


def per_token(completion_ids, **columns):
    return [[0.1 * i for i in range(len(ids))] for ids in completion_ids]


def some(completions, answer, **columns):
    return [1.0 if answer[i] in completions[i] else None for i in range(len(answer))]


@pytest.mark.parametrize("reward", [slow_digit, per_token], ids=["async", "per token"])
def test_kinds_of_rewards(reward, options, check):
    result = rlx.run(**options(reward=reward))
    check(result.metrics)
    for line in result.metrics:  # also where it is given for single tokens
        name = "eval/reward" if "eval/reward" in line else "reward"
        assert line[name] == pytest.approx(line[f"{name}/{reward.__name__}"], abs=1e-6)
    last = result.completions[-1]
    assert last["score"] == pytest.approx(last["rewards"][reward.__name__])


def test_several_rewards_are_weighed(options, check):
    rewards = [slow_digit, {"name": "length", "target": 5}, some]
    result = rlx.run(**options(reward=rewards, reward_weight=[2.0, 0.5, 0.0]))
    check([{k: v for k, v in line.items() if k != "reward/some"} for line in result.metrics])
    for line in result.metrics:
        expected = 2 * line["reward/slow_digit"] + 0.5 * line["reward/length"]
        assert line["reward"] == pytest.approx(expected, rel=1e-5)


def test_messages_are_prompts_and_seen_by_rewards(options, check):
    seen = []

    def look(prompts, completions, **columns):
        seen.extend(prompts)
        return [float(len(text)) for text in completions]

    rows = [{"prompt": [{"role": "user", "content": f"What is {i} plus 1?"}]} for i in range(6)]
    result = rlx.run(**options(dataset=rows, reward=look, system_prompt="Be brief."))
    check(result.metrics)
    assert [message["role"] for message in seen[-1]] == ["system", "user"]
    assert result.completions[0]["prompt"].startswith("<|system|>")


def test_stop_strings_and_stop_tokens_end_completions(base, options, tmp_path):
    seen = []

    def look(completions, completion_ids, **columns):
        seen.append((completions, completion_ids))
        return [float(len(text)) for text in completions]

    rlx.run(**options(reward=look, stop_strings=["2"], max_steps=1, output_dir=str(tmp_path / "strings")))
    texts = seen[-1][0]
    assert any("2" in text for text in texts) and all("2" not in text[:-1] for text in texts)
    two = base[1].convert_tokens_to_ids("2")
    rlx.run(**options(reward=look, stop_token_id=two, max_steps=1, output_dir=str(tmp_path / "token")))
    ids = seen[-1][1]
    assert any(two in row for row in ids) and all(two not in row[:-1] for row in ids)


def test_a_cut_completion_is_fined(options):
    # Two tokens are too few for any answer, so all are cut, and the mean score drops by the fine.
    lines = [
        rlx.run(**options(max_completion_length=2, kl_coef=0, missing_eos_penalty=fine, max_steps=1,
                          overwrite_output_dir=True)).metrics[0]
        for fine in (None, 3.0)
    ]  # fmt: skip
    assert lines[0]["completion/eos_rate"] < 1
    assert lines[0]["loss/value"] < lines[1]["loss/value"]


def test_evaluations_come_when_asked_for(options):
    rows = [{"prompt": "What is 1 plus 1?"}, {"prompt": "What is 2 plus 2?"}]
    result = rlx.run(**options(eval_dataset=rows, eval_steps=1, logging_steps=2))
    assert [line["step"] for line in result.metrics if "eval/reward" in line] == [0, 1, 2]
    assert result.final["step"] == 2


class Recorder(rlx.Callback):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.heard = []

    @rlx.hookimpl
    def on_rollouts(self, run, rollouts):
        self.heard.append(f"rollouts {len(rollouts)}")

    @rlx.hookimpl
    def on_evaluate(self, run):
        return {"eval/answer": 42.0}

    @rlx.hookimpl
    def on_run_end(self, run):
        self.heard.append("end")


def test_a_callback_object_hears_and_measures(options):
    recorder = Recorder()
    result = rlx.run(**options(callback=recorder))
    assert recorder.heard == ["rollouts 4", "rollouts 4", "end"]
    assert result.final["eval/answer"] == 42.0


def test_a_run_can_be_driven_by_hand(options):
    run = rlx.prepare(**options(max_steps=3))
    first = run.step()
    batch = run.prepare(run.roll_out())
    verdicts = [run.update(mini_batch) for mini_batch in run.minibatches(batch)]
    second = run.end_step(batch)
    [third] = list(run)
    run.close()
    assert [line["policy/ratio"] for line in (first, second, third)] == pytest.approx([1, 1, 1], abs=1e-4)
    assert verdicts == ["step"] and run.global_step == 3


def test_numbers_go_to_tensorboard(options):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    result = rlx.run(**options(report_to=["tensorboard"]))
    assert list((result.folder / "trackers").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("lora", [0, 4])
def test_the_policy_left_behind_is_the_one_that_was_trained(lora, base, options):
    result = rlx.run(**options(lora_r=lora, learning_rate=1e-2))
    if lora:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(copy.deepcopy(base[0]), result.folder)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        ours = result.policy.model.eval()(input_ids=ids).logits
        assert torch.allclose(loaded.eval()(input_ids=ids).logits, ours, atol=1e-5)
        assert not torch.allclose(base[0](input_ids=ids).logits, ours, atol=1e-2)
    assert json.loads((result.folder / "manifest.json").read_text())["status"] == "finished"
    assert all(math.isfinite(sample["score"]) for sample in result.completions)
