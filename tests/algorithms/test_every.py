"""What holds of every algorithm alike, in whole runs of two steps on the embedded model."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

import rlx
from rlx.core.errors import ConfigError
from rlx.core.options import options
from rlx.core.run import prepare, reopen, train
from rlx.testing.runs import PLAIN, Left, killed, killed_and_resumed, timeless

# Not ours: peft asks for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def weights(run):
    return {name: p.detach().clone() for name, p in run.policy.trainable().items()}


def assert_close(one, two, start):
    assert one.keys() == two.keys() == start.keys()
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert moved > 1e-4  # far more than what is allowed to differ
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def by_hand(options, before=None, after=None):
    """Weights before and after the steps, the rows of each batch reordered before or after ``prepare``."""
    run = prepare(**options)
    try:
        start = weights(run)
        while run.global_step < run.total_steps:
            batch = run.roll_out() if run.algorithm.eats == "prompts" else run.collate()
            batch = run.prepare(batch if before is None else batch.take(before(len(batch))))
            for part in run.minibatches(batch):
                run.update(part if after is None else part.take(after(len(part))))
            run.end_step(batch)
        return start, weights(run)
    finally:
        run.close()


def shuffled(count):
    """Another order, in which the completions of a prompt do not stand together."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(1))


def test_micro_batches_and_the_order_of_rows_do_not_matter(case, of, tmp_path):
    def options(number, **changes):
        return of(case, output_dir=str(tmp_path / f"{number}"), **PLAIN, **changes)

    start, whole = by_hand(options(0))
    _, cut = by_hand(options(1, max_tokens_per_micro_batch=1), after=shuffled)
    assert_close(whole, cut, start)
    if case.split()[0] != "kto":  # whose prompts are paired with the next row's completion
        _, turned = by_hand(options(2), before=shuffled)
        assert_close(whole, turned, start)


KEPT = {"save_steps": 1, "save_total_limit": None, "max_steps": 3, "log_completions": -1}
KINDS = ("rloo normalised", "dpo adapter", "dpo aot", "sft packing", "reward adapter")


def assert_resumes(options, tmp_path):
    whole = Left.by(rlx.run(**options).folder)
    assert whole.tensors and [line["step"] for line in whole.lines if "loss" in line] == [1, 2, 3]
    again = Left.by(killed_and_resumed({**options, "output_dir": str(tmp_path / "again")}))
    assert again.same(whole)


def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(algo, of, tmp_path):
    assert_resumes(of(algo, **KEPT), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_another_kind_does_so_too(kind, of, tmp_path):
    assert_resumes(of(kind, **KEPT), tmp_path)


def test_without_the_state_of_the_optimizer_a_resumed_run_ends_elsewhere(of, tmp_path):
    whole = rlx.run(**of("dpo", **KEPT)).folder
    run = reopen(killed(of("dpo", **KEPT, output_dir=str(tmp_path / "again"))))
    run.updater.optimizer.state.clear()
    train(run)
    assert not Left.by(run.path).same(Left.by(whole))


EVALUATED = {
    "prompts": ("eval/reward", "eval/completion/length"),
    "pairs": ("eval/loss", "eval/rewards/margins", "eval/rewards/accuracies"),
    "labeled": ("eval/loss", "eval/rewards/chosen", "eval/kl"),
    "demonstrations": ("eval/loss", "eval/loss/nll", "eval/mean_token_accuracy"),
}


def load(folder, algo, adapter):
    """The saved policy, as someone loads it who does not know where it is from."""
    import peft
    import transformers

    classifier = algo == "reward"
    if adapter:
        kind = peft.AutoPeftModelForSequenceClassification if classifier else peft.AutoPeftModelForCausalLM
        more = {"num_labels": 1} if classifier else {}
        return kind.from_pretrained(folder, dtype=torch.float32, **more)
    name = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)


def test_full_and_adapter_on_text_and_messages(fed, of, files, recwarn):
    algo, form, adapter = fed
    evaluation = str(files / f"{form}, eval.jsonl")
    tuned = {"lora_r": 4} if adapter else {"lora_r": 0}
    result = rlx.run(**of(algo, form, eval_dataset=evaluation, eval_steps=1, **tuned))
    assert [str(warning.message) for warning in recwarn] == []
    assert [line["step"] for line in result.metrics] == [0, 1, 2]
    for line in result.metrics:
        assert all(math.isfinite(value) for value in line.values()), line
        assert all(name in line for name in EVALUATED[form.split(",")[0]]), line
    assert all(math.isfinite(line["loss"]) for line in result.metrics[1:])
    assert {name for name in result.metrics[0] if name != "step"} <= set(result.metrics[1])
    loaded, ids = load(result.folder, algo, adapter), torch.tensor([[3, 5, 8, 13]])
    assert (result.folder / "tokenizer.json").is_file()
    with torch.no_grad(), result.policy.active() as model:
        torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folders of the embedded model itself, of an adapter that changes it, and of both merged."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlx.plugins.datasets import tiny_path

    root = tmp_path_factory.mktemp("models")
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(root / "adapter")
    adapted.merge_and_unload().save_pretrained(root / "merged")
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(root / "merged")
    return {"same": str(tiny_path()), "adapter": str(root / "adapter"), "merged": str(root / "merged")}


ONCE = {"precompute_ref_log_probs": True}
REFERENCES = {
    "full": ({}, {"reference_model": "same"}, ONCE),
    "new adapter": ({"lora_r": 4}, {"lora_r": 4, "reference_model": "same"}, {"lora_r": 4, **ONCE}),
    "adapter": (
        {"adapter": "adapter"},
        {"adapter": "adapter", "reference_adapter": "adapter"},
        {"adapter": "adapter", "reference_model": "merged"},
        {"adapter": "adapter", **ONCE},
    ),
}
REFERENCE_KINDS = {
    "full": ["copy", "model", None],
    "new adapter": ["adapter off", "model", None],
    "adapter": ["adapter", "adapter", "model", None],
}


@pytest.mark.parametrize("start", REFERENCES)
@pytest.mark.parametrize("which", ["dpo", "kto"])
def test_every_kind_of_reference_gives_the_same_numbers(which, start, of, others, tmp_path, monkeypatch):
    monkeypatch.setenv("RLX_CACHE", str(tmp_path / "cache"))
    kinds, results = [], []
    for number, given in enumerate(REFERENCES[start]):
        if which == "kto" and "precompute_ref_log_probs" in given:
            continue  # its mismatched completions are others in each batch
        named = {name: others.get(value, value) for name, value in given.items()}
        run = prepare(**of(which, output_dir=str(tmp_path / f"{number}"), **PLAIN, **named))
        kinds.append(run.studio.reference and run.studio.reference.kind)
        first = weights(run)
        results.append((timeless(train(run).metrics), weights(run)))
    assert kinds == REFERENCE_KINDS[start][: len(kinds)]
    for lines, last in results[1:]:
        assert_close(results[0][1], last, first)
        for mine, theirs in zip(copy.deepcopy(results[0][0]), lines, strict=True):
            if mine["step"] == 1:  # where policy and reference are equal, rounding says which is larger
                del mine["rewards/accuracies"], theirs["rewards/accuracies"]
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_model_object_brings_its_own_reference(of, others, tmp_path):
    """A frozen adapter called ``reference`` on it, or a model of its own."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(others["merged"])

    def base(name="same"):
        return AutoModelForCausalLM.from_pretrained(others[name], dtype=torch.float32)

    found = []
    for name in ("adapter", "object"):
        model = peft.PeftModel.from_pretrained(base(), others["adapter"], is_trainable=True)
        given = {"reference_model": base("merged")}
        if name == "adapter":
            model.load_adapter(others["adapter"], adapter_name="reference")
            given = {}
        options = of("dpo", output_dir=str(tmp_path / name), **PLAIN)
        run = prepare(**options, model=model, tokenizer=tokenizer, **given)
        found.append((run.studio.reference.kind, weights(run), train(run), weights(run)))
    assert [kind for kind, *_ in found] == ["adapter", "model"]
    assert_close(found[0][3], found[1][3], found[0][1])


def test_precomputed_log_probs_are_for_pairs_and_a_reference(algo, of):
    if algo == "dpo":
        assert rlx.run(**of(algo, **ONCE), dry_run=True).plan
        return
    pairs = rlx.resolve("algorithm", algo).eats == "pairs"
    reason = "is for a reference, and .* has none" if pairs else "is an option for pairs"
    with pytest.raises(ConfigError, match=f"precompute_ref_log_probs {reason}"):
        rlx.run(**of(algo, **ONCE), dry_run=True)


def test_the_command_line_trains_with_it(algo, of, tmp_path, capsys):
    from rlx.core.commands.main import main

    given = of(algo, max_steps=1, mixed_precision=...)
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", *words]) == 0
    assert f"look at it:       rlx show {tmp_path / 'run'}" in capsys.readouterr().out
    assert [line["step"] for line in Left.by(tmp_path / "run").lines] == [1]


# What stands in no paper: how work is cut, and what is switched or weighed by hand.
PLAIN_OPTIONS = {
    "num_ppo_epochs", "num_iterations", "num_mini_batches", "loss_weights", "score_clip", "target_kl",
    "ratio_threshold", "reference_free", "normalize_advantages", "reward_clip_range", "entropy_coef",
}  # fmt: skip


def test_every_option_has_a_meaning_and_a_source(algo):
    own = list(options(rlx.resolve("algorithm", algo).Config).values())
    assert own and [one.name for one in own if not one.doc] == []
    sourced = [one for one in own if one.source]
    assert [one.name for one in own if one not in sourced and one.name not in PLAIN_OPTIONS] == []
    assert [one.name for one in sourced if not re.search(r"arXiv:\d{4}\.\d{5}|https?://", one.source)] == []


def test_help_lists_its_own_options(algo, capsys):
    from dataclasses import fields

    from rlx.core.commands.main import main

    assert main(["run", "--algo", algo, "--help"]) == 0
    text = capsys.readouterr().out.replace("--[no-]", "--")
    own = [field.name for field in fields(rlx.resolve("algorithm", algo).Config)]
    assert own and [name for name in own if f"--{name.replace('_', '-')}" not in text] == []
