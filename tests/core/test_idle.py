"""Completions that have no gradient are not put through the model, and nothing shows it but the time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
import torch

from rlx.algorithms.grpo import GRPO
from rlx.core.batch import Rollouts
from rlx.core.probe import plan_for, trunk_of
from rlx.core.update import knows_idle
from rlx.testing.runs import PLAIN, Left, train_in_two_processes

OWN: dict[str, Any] = dict.fromkeys(("num_ppo_epochs", "num_mini_batches"), ...)
FORGETFUL = {
    "grpo": {"algo": "grpo", "num_generations": 4},
    "grpo by sequences": {"algo": "grpo", "num_generations": 4, "loss_type": "grpo"},
    "dr_grpo": {"algo": "grpo", "num_generations": 4, "loss_type": "dr_grpo"},
    "cispo": {"algo": "grpo", "num_generations": 4, "loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"algo": "grpo", "num_generations": 4, "importance_sampling_level": "sequence"},
    "off-policy mask": {"algo": "grpo", "num_generations": 4, "off_policy_mask_threshold": 0.01},
    "high entropy": {"algo": "grpo", "num_generations": 4, "top_entropy_quantile": 0.3},
    "rloo": {"algo": "rloo", "num_generations": 4, "beta": 0.0},
}
"""Two of the four groups teach nothing."""
REMEMBERING = {
    "beta": {"algo": "grpo", "num_generations": 4, "beta": 0.1},
    "beta, few tokens": {
        "algo": "grpo",
        "num_generations": 4,
        "beta": 0.1,
        "top_entropy_quantile": 0.02,
    },
    "entropy bonus": {"algo": "grpo", "num_generations": 4, "entropy_coef": 0.1},
    "ppo": {"algo": "ppo", "num_generations": 4},
}
"""A loss that acts on completions whose advantage is 0 as well."""


def uneven(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
    """The same for a whole group of four where the answer is even, else by place in it."""
    return [0.3 if int(a) % 2 == 0 else float(i % 4) for i, a in enumerate(answer)]


@pytest.fixture
def prepared(started: Callable[..., Any]) -> Callable[..., tuple[Any, Rollouts]]:
    """A run whose step is its gradient, and a prepared batch that its policy has moved away from."""

    def make(**changes: Any) -> tuple[Any, Rollouts]:
        given = {**PLAIN, "learning_rate": 1.0, "warmup_steps": 0, "batch_size": 4, **OWN, **changes}
        rows = [{"question": f"{2 * i}+{i % 2}=", "answer": 3 * i} for i in range(8)]
        run = started(
            reward=uneven, dataset=rows, eval_dataset=rows[:2], shuffle=False, max_rows=..., **given
        )
        batch = run.prepare(run.roll_out())
        plan_for(run.policy.model, batch.sequences)  # finding out costs a few passes once
        noise = torch.randn(len(batch.old), generator=torch.Generator().manual_seed(0))
        return run, replace(batch, old=batch.old + 0.2 * noise)

    return make


@contextmanager
def fed(run: Any) -> Iterator[list[int]]:
    """Tokens of each pass of the trunk."""
    tokens: list[int] = []
    hook = trunk_of(run.policy.model).register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield tokens
    hook.remove()


def gradient(run: Any, batch: Rollouts) -> tuple[torch.Tensor, float]:
    """How far one optimizer step moves the weights, which are put back, and the loss."""
    parameters = list(run.policy.trainable().values())
    before = [p.detach().clone() for p in parameters]
    outcome = run.updater(batch)
    assert outcome.verdict == "step"
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, parameters, strict=True)])
    put_back(run, before)
    return moved, outcome.loss


def put_back(run: Any, start: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(run.policy.trainable().values(), start, strict=True):
            parameter.copy_(value)


def without_skipping(run: Any) -> None:
    run.algorithm.idle = lambda batch: None


@pytest.mark.parametrize("name", FORGETFUL)
def test_the_gradient_is_that_of_all_rows_and_half_the_tokens_are_fed(prepared, name):
    run, batch = prepared(**FORGETFUL[name])
    with fed(run) as some:
        skipped, loss = gradient(run, batch)
    without_skipping(run)
    with fed(run) as every:
        whole, whole_loss = gradient(run, batch)
    assert float((skipped - whole).norm()) <= 1e-5 * float(whole.norm()) and float(whole.norm()) > 0
    assert loss == pytest.approx(whole_loss, abs=1e-6)
    sequences = batch.sequences
    taught = sequences.take(torch.tensor([i for i, a in enumerate(batch.prompts.columns["answer"]) if a % 2]))
    assert len(taught) == 8  # two groups of four
    most = int(taught.prompt_lengths[::4].sum() + taught.counts.sum())
    assert len(some) == len(every) == 1 and some[0] <= most and some[0] < 0.7 * every[0]


@pytest.mark.parametrize("name", REMEMBERING)
def test_where_the_loss_acts_on_every_completion_all_are_fed(prepared, name):
    run, batch = prepared(**REMEMBERING[name])
    assert run.updater.parted(batch) == (batch, None)


def test_cut_completions_that_are_masked_are_idle_even_with_a_kl_term(prepared):
    run, batch = prepared(algo="grpo", num_generations=4, mask_truncated_completions=True, beta=0.1)
    cut = torch.arange(16) % 3 == 0
    batch = replace(batch, finished=~cut)
    assert torch.equal(run.algorithm.idle(batch), cut | (batch.sequences.counts == 0))
    skipped, _ = gradient(run, batch)
    without_skipping(run)
    whole, _ = gradient(run, batch)
    assert float((skipped - whole).norm()) <= 1e-5 * float(whole.norm()) and float(whole.norm()) > 0


def test_one_row_too_many_is_seen(prepared):
    """The comparison above would notice a row that is left out wrongly."""
    run, batch = prepared(**FORGETFUL["grpo"])
    whole, _ = gradient(run, batch)
    idle = run.algorithm.idle(batch)
    longest = int((batch.sequences.counts * ~idle).argmax())
    run.algorithm.idle = lambda batch: idle | (torch.arange(len(idle)) == longest)
    less, _ = gradient(run, batch)
    assert float((less - whole).norm()) > 1e-2 * float(whole.norm())


def test_on_the_first_pass_the_metrics_are_those_of_all_rows(prepared):
    run, batch = prepared(**FORGETFUL["grpo"])
    batch = run.prepare(run.roll_out())  # the policy is where it was when it sampled
    means = []
    for _ in range(2):
        start = [p.detach().clone() for p in run.policy.trainable().values()]
        means.append(run.updater(batch).metrics.means(run.accelerator))
        put_back(run, start)
        without_skipping(run)
    some, every = means
    assert some.keys() == every.keys() and "policy/ratio" in some
    assert some == pytest.approx(every, rel=1e-4, abs=1e-6)


def test_a_mini_batch_without_any_gradient_is_a_step_without_a_forward(prepared):
    """Adam's moments move the weights on, and the schedule goes on, as if the rows had been fed."""
    ends = []
    for skipping in (True, False):
        run, batch = prepared(
            **FORGETFUL["grpo"], optim="adamw", learning_rate=1e-3, weight_decay=0.1, max_steps=8
        )
        if not skipping:
            without_skipping(run)
        flags = GRPO.idle(run.algorithm, batch)
        idle, active = (batch.take(some.nonzero()[:, 0]) for some in (flags, ~flags))
        with fed(run) as tokens:
            assert run.update(idle) == "step"
        assert bool(tokens) != skipping
        assert run.update(active) == "step"
        with fed(run) as tokens:
            assert run.update(idle) == "step"
        assert bool(tokens) != skipping and run.updater.done == 3
        assert run.journal.meter.counts["grad_norm"] == 3
        ends.append({name: p.detach().clone() for name, p in run.policy.trainable().items()})
    some, every = ends
    for name, parameter in some.items():
        assert torch.equal(parameter, every[name]), name


class Replaced(GRPO):
    """A loss of its own; what it inherits says nothing of it."""

    def loss(self, batch, now):
        found = super().loss(batch, now)
        return replace(found, terms={by: terms + 1 for by, terms in found.terms.items()})


class Both(Replaced):
    def idle(self, batch):
        return super().idle(batch)


def test_an_inherited_idle_is_not_asked_about_a_loss_of_ones_own(prepared):
    config = GRPO.Config()
    assert knows_idle(GRPO(config)) and not knows_idle(Replaced(config)) and knows_idle(Both(config))
    patched = GRPO(config)
    patched.loss = lambda batch, now: None  # type: ignore[method-assign]
    assert not knows_idle(patched)
    run, batch = prepared(**{**FORGETFUL["grpo"], "algo": Replaced})
    assert run.updater.parted(batch) == (batch, None)
    run, batch = prepared(**{**FORGETFUL["grpo"], "algo": Both})
    assert [len(part) for part in run.updater.parted(batch)] == [8, 8]


def test_memory_that_runs_out_is_measured_by_the_rows_that_are_fed(prepared):
    run, batch = prepared(**FORGETFUL["grpo"])
    lengths = batch.sequences.lengths
    run.algorithm.idle = lambda batch: batch.sequences.lengths == lengths.max()
    run.updater.budget = int(lengths.max())  # too much for the rows that are fed, not for all
    run.updater.make_room(batch)
    assert run.updater.budget == int(lengths.max()) // 2


@pytest.mark.slow
def test_one_process_may_be_idle_and_the_other_not(small, tmp_path):
    """Answers of four batches of four rows, two a process: one idles, both do, the other does, none does."""
    from rlx.core.run import run

    answers = [2, 4, 1, 3, 6, 8, 2, 4, 5, 7, 2, 6, 1, 3, 5, 7]
    rows = [{"question": f"{i}+{a}=", "answer": a} for i, a in enumerate(answers)]
    Path("rows.json").write_text(json.dumps(rows))
    Path("uneven.py").write_text(f"from typing import Any\n\n\n{getsource(uneven)}")
    options = small(
        **{**FORGETFUL["grpo"], **PLAIN, **OWN, "weight_decay": 0.1},
        warmup_steps=0, batch_size=4, shuffle=False, max_rows=..., max_steps=4, reward="./uneven.py:uneven",
        dataset=str(tmp_path / "rows.json"), eval_dataset=str(tmp_path / "rows.json"), max_eval_rows=2,
    )  # fmt: skip
    train_in_two_processes([{**options, "output_dir": str(tmp_path / "two")}])
    run(**{**options, "output_dir": "one"})
    one, two = Left.by(Path("one")), Left.by(tmp_path / "two")
    assert [line["advantages/zero"] for line in one.lines if "advantages/zero" in line][1] == 1
    assert one.tensors and one.farthest(two) < 2e-6
    for mine, theirs in zip(one.lines, two.lines, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
