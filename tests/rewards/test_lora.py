"""lora: a classifier's adapter on the policy's base scores as on a base of its own, and leaves no trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rlx
from rlx.core.config import from_mapping
from rlx.core.errors import CheckpointError, ConfigError, DivergedError
from rlx.core.models import load_policy
from rlx.core.reference import build_reference
from rlx.core.run import prepare, reopen, train
from rlx.core.settings import Settings
from rlx.plugins.datasets import tiny_path
from rlx.plugins.references import make

PROMPTS = ["How many?", "Tom has 3 toys.", "Ann has 2 pens and buys 4 more."]
COMPLETIONS = ["Answer: 4", "", " 2 + 4 = 6. Answer: 6"]
IDS = torch.tensor([[3, 4, 5, 6, 7]])
SMALL: dict[str, Any] = {
    "algo": "ppo", "lora_r": 4, "learning_rate": 1e-2, "max_steps": 3, "batch_size": 4, "max_rows": 12,
    "max_eval_rows": 4, "num_ppo_epochs": 2, "num_generations": 1, "max_completion_length": 6,
    "logging_steps": 1, "log_completions": 0, "plots": False, "progress": "none", "mixed_precision": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that ``--algo reward`` trained on the packaged model."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "judge"
    rlx.run(
        algo="reward", lora_r=2, learning_rate=1e-2, max_steps=3, batch_size=8, max_rows=32, max_eval_rows=4,
        plots=False, progress="none", output_dir=str(folder),
    )  # fmt: skip
    return folder


@pytest.fixture
def policy() -> Any:
    """An adapter with dropout and a value head, in training mode, every weight stirred."""
    policy = load_policy(Settings(lora_r=4, lora_dropout=0.5), values=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.model.train()
    policy.base.model.layers[0].eval()  # a mixture of modes
    return policy


def scored(reward: Any) -> list[float]:
    return reward(prompts=["not this"] * 3, completions=COMPLETIONS, prompt=PROMPTS)


def attached(policy: Any, folder: Path, **options: Any) -> Any:
    reward = make("reward", "lora", {"path": str(folder), **options})
    reward.attach(policy)
    return reward


def apart(folder: Path) -> list[float]:
    """Scores of peft's own model of a base and the adapter, one text at a time."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [f"<|user|>{p}<|end|><|assistant|>{c}<|end|>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        return [
            float(model.eval()(**tokenizer(t, add_special_tokens=False, return_tensors="pt")).logits[0, 0])
            for t in texts
        ]


def test_scores_are_those_of_base_and_adapter_loaded_apart(judge, policy):
    got, want = scored(attached(policy, judge)), apart(judge)
    assert got == pytest.approx(want, abs=1e-5) and len(set(want)) == 3
    assert got == pytest.approx(scored(make("reward", "reward_model", {"model": str(judge)})), abs=1e-6)
    assert got == pytest.approx(scored(attached(policy, judge, batch_tokens=1)), abs=1e-5)


def state(policy: Any) -> tuple[Any, ...]:
    """Everything of the policy that a reward could leave changed."""
    own = {n: p for n, p in policy.model.named_parameters() if "-reward" not in n}
    return (
        {name: p.detach().clone() for name, p in own.items()},
        {name: p.requires_grad for name, p in own.items()},
        {name: m.training for name, m in policy.model.named_modules() if "-reward" not in name},
        policy.model.active_adapter,
        list(policy.trainable()),
    )


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1:] == other[1:]


@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_and_its_reference_are_as_they_were(fails, judge, policy):
    reference = build_reference(Settings(lora_r=4), policy)
    assert reference.kind == "adapter"  # a snapshot, since the policy's adapter was stirred
    before, torch_state = state(policy), torch.get_rng_state()

    def logits() -> list[torch.Tensor]:
        with policy.active() as model, torch.no_grad():
            found = [model(IDS).logits]
        with reference.active() as model:
            return [*found, model(IDS).logits]

    numbers = logits()
    reward = attached(policy, judge)
    assert_same(state(policy), before)
    inside = []

    def look(*_: Any) -> None:
        inside.append((policy.model.active_adapter, policy.model.training, torch.is_grad_enabled()))
        if fails:
            raise KeyError("inside")

    handle = policy.base.model.register_forward_hook(look)
    if fails:
        with pytest.raises(KeyError, match="inside"):
            scored(reward)
    else:
        scored(reward)
    handle.remove()
    assert inside[0] == ("default-reward", False, False)
    assert_same(state(policy), before)
    assert all(torch.equal(now, then) for now, then in zip(logits(), numbers, strict=True))
    frozen = [p for name, p in policy.model.named_parameters() if "-reward" in name]
    assert frozen and not any(p.requires_grad for p in frozen)
    assert torch.get_rng_state().shape == torch_state.shape


def test_it_is_not_saved_with_the_policy_and_a_gradient_passes_it_by(judge, policy, tmp_path):
    reward = attached(policy, judge)
    with policy.active(training=True) as model:
        loss = model(IDS).logits.sum()
        scored(reward)  # between forward and backward
        loss.backward()
    assert all(p.grad is None for name, p in policy.model.named_parameters() if "-reward" in name)
    assert all(p.grad is not None for name, p in policy.trainable().items() if name[:6] != "value.")
    policy.save_pretrained(tmp_path / "saved")
    assert not any("reward" in key for key in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    assert [path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()] == []


def test_on_a_base_in_half_precision_the_scores_are_close(judge):
    half = load_policy(Settings(lora_r=4, dtype="bfloat16"))
    assert half.base.dtype == torch.bfloat16
    assert scored(attached(half, judge)) == pytest.approx(apart(judge), abs=0.03)


def test_a_value_head_beside_a_causal_adapter_serves_as_its_head(judge, policy, tmp_path):
    """As LLaMA-Factory saves a reward adapter: TRL's names for the head, in a file of its own."""
    folder = copied(judge, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    head = tensors.pop("base_model.model.score.weight")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    edit(folder, task_type="CAUSAL_LM", modules_to_save=None)
    with pytest.raises(ConfigError, match="no score head") as caught:
        attached(policy, folder)
    assert "--algo reward" in caught.value.hint
    summary = {"v_head.summary.weight": head, "v_head.summary.bias": torch.tensor([0.5])}
    save_file(summary, folder / "value_head.safetensors", metadata={"format": "pt"})
    assert scored(attached(policy, folder)) == pytest.approx([x + 0.5 for x in apart(judge)], abs=1e-5)


def test_without_a_tokenizer_of_its_own_the_policys_reads_for_it(judge, policy, tmp_path):
    folder = copied(judge, tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    assert scored(attached(policy, folder)) == pytest.approx(apart(judge), abs=1e-5)


# What does not fit


def copied(judge: Path, to: Path) -> Path:
    shutil.copytree(judge, to / "adapter")
    return to / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reshaped(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    wide = {k: v.repeat(1, 2) if k.endswith("lora_A.weight") else v for k, v in tensors.items()}
    save_file(wide, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def several_labels(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = tensors["base_model.model.score.weight"].repeat(2, 1)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def incomplete(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def another_base(folder: Path) -> None:
    """One of the same shapes, with other weights."""
    base = folder.parent / "other-base"
    shutil.copytree(tiny_path(), base)
    tensors = load_file(base / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    edit(folder, base_model_name_or_path=str(base))


@pytest.mark.parametrize(
    ("damage", "what", "got"),
    [
        (reshaped, "does not fit", str(tiny_path())),
        (incomplete, "up_proj.lora_B.weight' does not fit", "no such weight"),
        (another_base, "for another base", str(tiny_path())),
        (lambda folder: edit(folder, task_type="TOKEN_CLS"), "another task", "TOKEN_CLS"),
        (several_labels, "no single score", "2 labels"),
        (lambda folder: edit(folder, bias="all"), "more than LoRA", "bias: all"),
        (lambda folder: edit(folder, init_lora_weights="pissa"), "more than LoRA", "pissa"),
        (lambda folder: edit(folder, modules_to_save=["score", "lm_head"]), "more than LoRA", "beside"),
    ],
    ids=[
        "fault[T8] shape",
        "fault[T6]",
        "fault[T8] base",
        "fault[T8] task",
        "fault[T10]",
        "bias",
        "pissa",
        "modules",
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    damage, what, got, judge, policy, tmp_path
):
    folder, before = copied(judge, tmp_path), state(policy)
    damage(folder)
    with pytest.raises(ConfigError, match=what) as caught:
        attached(policy, folder)
    assert got in caught.value.got and caught.value.exit_code == 2
    if damage is another_base:
        assert "other-base" in caught.value.got and "reward_model" in caught.value.hint
    assert list(policy.model.peft_config) == ["default"]
    assert_same(state(policy), before)


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T7]")])
def test_an_adapter_that_is_not_finite_is_refused(_, judge, policy, tmp_path):
    folder = copied(judge, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError) as caught:
        attached(policy, folder)
    assert caught.value.exit_code == 7 and list(policy.model.peft_config) == ["default"]


def test_a_moved_base_is_taken_for_what_it_is(judge, policy, tmp_path):
    folder = copied(judge, tmp_path)
    shutil.copytree(tiny_path(), tmp_path / "moved")
    edit(folder, base_model_name_or_path=str(tmp_path / "moved"))
    told = list(policy.report)
    assert scored(attached(policy, folder)) == pytest.approx(apart(judge), abs=1e-5)
    assert policy.report == told
    edit(folder, base_model_name_or_path="somebody/a-model")  # a hub id of what may be this very folder
    attached(policy, folder)
    assert "trained on somebody/a-model, taken to be" in policy.report[-1]


def test_a_policy_that_trains_its_base_is_refused(judge, tmp_path):
    with pytest.raises(ConfigError, match="trains the base itself") as caught:
        attached(load_policy(Settings()), judge)
    assert "reward_model" in caught.value.hint
    options = {**SMALL, "reward": f"lora:{judge}", "lora_r": 0, "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="trains the base itself") as caught:
        rlx.run(**options, dry_run=True)  # no weight was loaded
    assert f"--reward_model.model {judge}" in caught.value.hint and caught.value.exit_code == 2


def test_part_of_the_base_that_is_trained_along_is_refused(judge, policy):
    policy.base.lm_head.requires_grad_(True)
    policy._trained |= {"lm_head.weight": policy.base.lm_head.weight}
    with pytest.raises(ConfigError, match="trains the base itself") as caught:
        attached(policy, judge)
    assert "lm_head.weight" in caught.value.got


def test_a_folder_that_is_not_there_is_told_before_weights_are_loaded(tmp_path):
    options = {**SMALL, "reward": "lora:./no-such", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="no-such"):
        rlx.run(**options, dry_run=True)


def test_without_a_run_it_says_what_it_lacks(judge, tmp_path):
    from rlx.core.commands.reward import score
    from rlx.core.components import check_spec, read_specs

    [spec], _ = read_specs("reward", f"lora:{judge}", "reward", {})
    with pytest.raises(ConfigError, match="weights of a run's policy"):
        score(check_spec(spec), "a", ["b"], {}, "tiny")
    with pytest.raises(ConfigError, match="attach"):
        scored(make("reward", f"lora:{judge}"))


# The short form


def test_the_short_form_is_the_reward_with_its_path():
    config = from_mapping({"reward": ["lora:some/dir", {"name": "lora:other", "weight": 0.5}]})
    assert [(c.ref, c.name, c.options["path"], w) for c, w in config.rewards] == [
        ("lora", "lora", "some/dir", 1.0),
        ("lora", "lora_2", "other", 0.5),
    ]
    again = from_mapping({"reward": [{"name": "lora", "path": "some/dir"}]})
    assert again.rewards[0][0].options == config.rewards[0][0].options
    with pytest.raises(ConfigError, match="given twice"):
        from_mapping({"reward": [{"name": "lora:a", "path": "b"}]})


# Whole runs


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.trainable().items()}


def numbers(run: Any) -> list[dict[str, float]]:
    lines = run.metrics_history
    return [{k: v for k, v in line.items() if "time/" not in k and "second" not in k} for line in lines]


def test_a_run_trains_as_with_the_reward_on_a_base_of_its_own(judge, tmp_path):
    """The reference is the switched-off adapter; dropout is on; values share the base; it evaluates too."""
    options = {**SMALL, "lora_dropout": 0.1}
    one = prepare(**options, reward=f"lora:{judge}", output_dir=str(tmp_path / "one"))
    start = weights(one)
    assert one.studio.reference.kind == "adapter off"
    assert any("reward lora tried on 2 rows" in line for line in one.plan)
    train(one)
    other = prepare(
        **options, reward={"name": "reward_model", "model": str(judge)}, output_dir=str(tmp_path / "other")
    )
    train(other)
    assert not torch.equal(start["value.weight"], weights(one)["value.weight"])
    for name, parameter in weights(other).items():
        torch.testing.assert_close(weights(one)[name], parameter, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(numbers(one), numbers(other), strict=True):
        mine = {name.replace("reward/lora", "reward/reward_model"): value for name, value in mine.items()}
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert {line["step"] for line in numbers(one) if "eval/reward/lora" in line} == {0, 3}


def test_a_resumed_run_is_exact_and_another_adapter_is_refused(judge, tmp_path):
    folder = copied(judge, tmp_path)
    options = {**SMALL, "reward": f"lora:{folder}", "lora_dropout": 0.1, "save_steps": 1}
    whole = prepare(**options, save_total_limit=None, output_dir=str(tmp_path / "run"))
    train(whole)
    saved = tmp_path / "run" / "checkpoint-1"
    files = [path for path in saved.rglob("*.safetensors")]
    assert files and not any("reward" in key for path in files for key in load_file(path))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "again" / f"checkpoint-{step}")
    again = reopen(tmp_path / "again")
    train(again)
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(again).items())
    assert numbers(again) == numbers(whole)
    several_labels(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"] = tensors["base_model.model.score.weight"][:1] * 2
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="other options") as caught:
        reopen(tmp_path / "again")
    assert "reward: its files are others" in caught.value.got
    reopen(tmp_path / "again", {"reward": True}).close()


def test_a_judge_may_ask_it_too(judge, tmp_path):
    """Learning from its verdicts is learning from those of the same adapter on a base of its own."""
    options = {
        **SMALL, "algo": "online_dpo", "num_generations": 2, "num_ppo_epochs": ..., "batch_size": 4,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not ...}
    runs = []
    for name, scores in (("one", f"lora:{judge}"), ("two", {"name": "reward_model", "model": str(judge)})):
        run = prepare(
            **options, judge={"name": "reward", "rewards": [scores]}, output_dir=str(tmp_path / name)
        )
        start = weights(run)
        train(run)
        assert any(not torch.equal(start[n], p) for n, p in weights(run).items())
        runs.append(run)
    for name, parameter in weights(runs[1]).items():
        torch.testing.assert_close(weights(runs[0])[name], parameter, rtol=1e-4, atol=1e-5)


def test_the_win_rate_may_ask_it_and_changes_nothing_else(judge, tmp_path):
    def go(name: str, *callbacks: Any) -> Any:
        run = prepare(**SMALL, reward="length", callback=list(callbacks), output_dir=str(tmp_path / name))
        train(run)
        return run

    own = {"name": "reward_model", "model": str(judge)}
    alone = go("alone")
    seen = [
        go(name, {"name": "win_rate", "rewards": [scores], "num_prompts": 4})
        for name, scores in (("lora", f"lora:{judge}"), ("own", own))
    ]
    rates = [[line["eval/win_rate"] for line in numbers(run) if "eval/win_rate" in line] for run in seen]
    assert rates[0] == rates[1] and len(rates[0]) == 2
    assert all(torch.equal(p, weights(alone)[name]) for name, p in weights(seen[0]).items())
    files = [*(tmp_path / "lora").rglob("*.safetensors")]
    assert files and not any("reward" in key for path in files for key in load_file(path))


def test_a_judge_without_a_policy_or_with_one_that_trains_its_base_is_refused(judge, tmp_path, capsys):
    from rlx.core.commands.main import main

    assert main(["compare", "no/such", "no/other", "--reward", f"lora:{judge}"]) == 2
    said = capsys.readouterr().err
    assert "judges with the weights of a run's policy" in said and "reward_model" in said
    judged = {"algo": "online_dpo", "judge": {"name": "reward", "rewards": ["length", f"lora:{judge}"]}}
    with pytest.raises(ConfigError, match="trains the base itself"):
        rlx.run(**judged, output_dir=str(tmp_path / "never"), dry_run=True)
    watched = {"reward": "length", "callback": [{"name": "win_rate", "rewards": [f"lora:{judge}"]}]}
    with pytest.raises(ConfigError, match="trains the base itself"):
        rlx.run(algo="ppo", **watched, output_dir=str(tmp_path / "never"), dry_run=True)
