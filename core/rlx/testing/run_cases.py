"""What holds of whole runs of every algorithm: they resume exactly, learn, and do so in two processes too."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from rlx.core.loop import Run
from rlx.core.run import prepare, run
from rlx.plugins.datasets import tiny_path
from rlx.testing import data
from rlx.testing.every_cases import reference
from rlx.testing.kit import Subject, case
from rlx.testing.lab import options
from rlx.testing.runs import PLAIN, Left, killed_and_resumed, train_in_two_processes

FLOWS = ("gradient_flows",)
KEPT = {"save_steps": 1, "save_total_limit": None, "max_steps": 3}
BANDIT = {
    "batch_size": 32, "max_steps": 30, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "logging_steps": 100, "dataset": ..., "seed": 0,
}  # fmt: skip


@case("algorithm", after=FLOWS)
def resumes_bit_for_bit(subject: Subject) -> None:
    """A run killed in its second step, and resumed, ends with the weights and log of one that was not."""
    with tempfile.TemporaryDirectory(prefix="rlx-testing-") as folder:
        whole = options(subject, Path(folder) / "whole", **KEPT)
        run(**whole)
        again = killed_and_resumed(options(subject, Path(folder) / "again", **KEPT))
        one, two = Left.by(Path(folder) / "whole"), Left.by(again)
        assert one.tensors, "the run left no weights"
        if not one.same(two):
            step = next((a["step"] for a, b in zip(one.lines, two.lines, strict=False) if a != b), "none")
            raise AssertionError(
                f"the resumed run ended elsewhere: weights differ by up to {one.farthest(two):.3g}, the "
                f"first log line that differs is that of step {step}; what does state_dict leave out?"
            )


def bandit_model(classifier: bool) -> Any:
    """A random model of one small layer with the packaged tokenizer's vocabulary; the same every time.

    Args:
        classifier: one that gives each text a score, in the place of one that writes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(tiny_path())
    config.update(
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if not classifier:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


@case("algorithm", after=FLOWS)
def learns_a_bandit(subject: Subject) -> str:
    """A small random model learns the better answer within a few steps."""
    from transformers import AutoTokenizer

    eats = subject.component().eats
    sampled = {"max_completion_length": 1, "reward": ["rlx.testing.data:even"]} if eats == "prompts" else {}
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    with tempfile.TemporaryDirectory(prefix="rlx-testing-") as folder:
        given = options(subject, Path(folder) / "run", **BANDIT | sampled | subject.options | subject.run)
        given["dataset"] = data.rows(eats, 32)
        model = bandit_model("reward" in subject.make().needs)
        made = prepare(**given, model=model, tokenizer=tokenizer)
        try:
            before = preference(made)
            for _ in made:
                pass
            after = preference(made)
        finally:
            made.close()
    gained, unit = (0.2, "probability") if eats == "prompts" else (1.0, "nats")
    note = f"{before:.2f} → {after:.2f} {unit} for the better answer in {made.total_steps} steps"
    assert after >= before + gained, f"{note}: less than {gained:g} more"
    return note


def preference(made: Run) -> float:
    """How far the policy prefers what it is to learn.

    Args:
        made: a run on rows that the kit made.

    Returns:
        Online: its probability of an even first token. Offline: the mean log-prob of the better completions
        minus that of the worse ones, where there are any; a classifier's scores in the place of log-probs.
    """
    batch: Any = made.data.batch(list(range(16)), list(range(16)))
    if made.algorithm.eats == "prompts":
        with torch.no_grad(), made.policy.active() as model:
            last = [model(torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in batch.ids]
        return float(torch.stack(last)[:, ::2].sum(dim=1).mean())
    with torch.no_grad(), made.policy.active():
        now = made.updater.score(batch.sequences)
    if now.reward is not None:
        totals = now.reward
    else:
        totals = torch.zeros(len(batch.sequences)).index_add(
            0, torch.repeat_interleave(batch.sequences.counts), now.logps
        )
    if made.algorithm.eats == "demonstrations":
        return float(totals.mean())
    better = batch.desirable if made.algorithm.eats == "labeled" else torch.arange(len(totals)) % 2 == 0
    return float(totals[better].mean() - totals[~better].mean())


@case("algorithm", after=FLOWS, slow=True)
def two_processes_train_as_one(subject: Subject) -> None:
    """Two processes end with the weights that one ends with, the last batch smaller than the others."""
    with tempfile.TemporaryDirectory(prefix="rlx-testing-") as folder:
        given = options(
            subject,
            Path(folder) / "one",
            algo=reference(subject),
            max_steps=...,
            num_train_epochs=1.0,
            **PLAIN,
        )
        one = run(**given).folder
        assert one is not None
        train_in_two_processes([{**given, "output_dir": str(Path(folder) / "two")}])
        alone, together = Left.by(one), Left.by(Path(folder) / "two")
        worst = alone.farthest(together)
        assert worst < 5e-6, (
            f"weights differ by up to {worst:.3g}; are means taken over one process's rows? score.total sums "
            "over all"
        )
