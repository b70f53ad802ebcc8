"""How much is computed for fixed inputs: tokens through the trunk, rows through the head, forward passes.

Counts do not depend on the machine, so they hold what a benchmark once showed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlx.core import lm_head
from rlx.core.batch import Sequences
from rlx.core.logprobs import score
from rlx.core.probe import plan_for, trunk_of
from rlx.core.sharing import share, shares, stop_sharing
from rlx.core.states import micro_batches

PROMPTS = (10, 20, 5)
COMPLETIONS = ((7, 3, 1, 0), (12, 2, 2, 9), (4, 4, 4, 4))
"""Of each prompt: 12 sequences, 52 completion tokens."""


def groups() -> Sequences:
    """Three prompts with four completions each; no two completions of a prompt begin alike."""
    prompts, completions, numbers = [], [], []
    for group, (prompt, sizes) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        for place, size in enumerate(sizes):
            prompts.append([3 + group] * prompt)
            completions.append([10 + place] * size)
            numbers.append(group)
    return Sequences.from_lists(prompts, completions, numbers)


@contextmanager
def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """Tokens of each pass of the trunk, and rows of logits that were computed."""
    found: dict[str, list[int]] = {"tokens": [], "rows": []}
    inner = lm_head._logits

    def logits(hidden: Tensor, *args: Any) -> Tensor:
        found["rows"].append(len(hidden))
        return inner(hidden, *args)

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found["tokens"].append(kwargs["input_ids"].numel())

    hook = trunk_of(model).register_forward_pre_hook(watch, with_kwargs=True)
    monkeypatch.setattr(lm_head, "_logits", logits)
    yield found
    hook.remove()
    monkeypatch.undo()


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    found = tiny_model()
    plan_for(found, groups())  # finding out costs a few passes once
    return found


def test_padded_micro_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = groups()
    with counted(model, monkeypatch) as seen, torch.no_grad():
        score(model, sequences)
    # The one without a completion is left out: 11 sequences; the longest has 32, whose last is not fed.
    assert seen == {"tokens": [11 * 31], "rows": [52]}


def test_a_prompt_is_computed_once_a_group(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = groups()
    assert share(trunk_of(model)) is None
    with counted(model, monkeypatch) as seen:
        score(model, sequences)
    # Each prompt once; of each completion all but its last token, which predicts nothing.
    assert seen == {"tokens": [10 + 20 + 5 + 52 - 11], "rows": [52]}


def test_a_group_is_cut_only_where_it_must(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, trunk = groups(), trunk_of(model)
    share(trunk)
    with counted(model, monkeypatch) as seen, torch.no_grad():
        score(model, sequences, token_budget=45)
    # Budgets count whole sequences: 20 + 25 is full; then 10 + 11 and 5 + 16 go together.
    assert seen["tokens"] == [20 + 25 - 4, 10 + 11 - 3 + 5 + 16 - 4]
    with counted(model, monkeypatch) as seen, torch.no_grad():
        score(model, sequences, token_budget=34)
    # 20 + 12 + 2 is full, the group's others begin anew with 20 + 2 + 9; then the two groups apart.
    assert seen["tokens"] == [20 + 14 - 2, 20 + 11 - 2, 10 + 11 - 3, 5 + 16 - 4]


def test_values_alone_and_pairs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    share(trunk_of(model))
    pairs = Sequences.from_lists(
        [[3] * 9, [3] * 9, [4] * 6, [4] * 6], [[1] * 5, [2] * 4, [1], []], [0, 0, 1, 1]
    )
    squeeze = nn.Sequential(nn.Linear(16, 1), nn.Flatten(0))
    with counted(model, monkeypatch) as seen:
        score(model, pairs, logps=False, value_head=squeeze)
    assert seen == {"tokens": [9 + 4 + 3 + 6], "rows": []}
    parts = micro_batches([trunk_of(model)], pairs, 18, per_row=2)
    assert [part.tolist() for part in parts] == [[0], [1]]


def test_a_step_of_training_passes_each_micro_batch_once(started: Callable[..., Any]) -> None:
    run = started(algo="grpo", num_generations=4, batch_size=4, max_steps=1, lora_r=0, beta=0.0,
                  num_ppo_epochs=..., num_mini_batches=..., num_iterations=1)  # fmt: skip
    batch = run.prepare(run.roll_out())
    plan_for(run.policy.model, batch.sequences)
    fed: list[int] = []
    trunk = trunk_of(run.policy.model)
    trunk.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    run.update(batch)
    sequences = batch.sequences
    most = int(sequences.prompt_lengths[::4].sum()) + int(sequences.counts.sum())
    padded = len(sequences) * int(sequences.lengths.max())
    assert len(fed) == 1 and fed[0] <= most < padded / 2
    assert any("computed once" in line for line in run.plan)


def test_reference_and_value_model_share_as_the_policy_does(started: Callable[..., Any]) -> None:
    run = started()
    assert run.studio.reference.kind == "copy"
    model = copy.deepcopy(run.policy.model)
    stop_sharing(trunk_of(model))
    other = started(reference_model=model, value_model=copy.deepcopy(model))
    trunks = [trunk_of(r.studio.reference.model) for r in (run, other)] + [other.policy.value_model.backbone]
    assert all(shares(trunk) for trunk in trunks)
    assert any(line.startswith("reference's micro-batches: without padding") for line in other.plan)


def test_sharing_can_be_switched_off(started: Callable[..., Any]) -> None:
    run = started(share_prefix=False)
    assert any("share_prefix is off" in line for line in run.plan)
    batch = run.prepare(run.roll_out())
    plan_for(run.policy.model, batch.sequences)
    fed: list[int] = []
    trunk_of(run.policy.model).register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    run.update(batch)
    assert fed == [len(batch.sequences)]  # rows of one padded pass


@contextmanager
def measuring(run: Any) -> Iterator[list[int]]:
    """Tokens of each pass of the trunk, those of sampling left out."""
    fed: list[int] = []

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not kwargs["use_cache"]:
            fed.append(kwargs["input_ids"].numel())

    hook = trunk_of(run.policy.model).register_forward_pre_hook(watch, with_kwargs=True)
    yield fed
    hook.remove()


OWN: dict[str, Any] = dict.fromkeys(("num_ppo_epochs", "num_mini_batches"), ...)
PASSES = {
    "grpo": (0, {"algo": "grpo", "num_generations": 4, "beta": 0.0, **OWN}),
    "grpo with kl": (1, {"algo": "grpo", "num_generations": 4, "beta": 0.1, **OWN}),
    "rloo": (0, {"algo": "rloo", "num_generations": 4, "beta": 0.0, **OWN}),
    "rloo with kl": (1, {"algo": "rloo", "num_generations": 4, **OWN}),
    "ppo": (1, {"kl_coef": 0.0}),
    "ppo with kl": (2, {}),
    "ppo, old log-probs taken again": (1, {"kl_coef": 0.0, "recompute_logps": True}),
}
"""Passes over a batch of rollouts before the update: the reference's if it counts, and the values'."""


@pytest.mark.parametrize("name", PASSES)
def test_a_batch_is_measured_with_no_pass_too_many(name: str, started: Callable[..., Any]) -> None:
    passes, options = PASSES[name]
    run = started(**{"lora_r": 4, **options})  # the reference is the same trunk, the adapter off
    plan_for(run.policy.model, run.roll_out().sequences)
    with measuring(run) as fed:
        batch = run.prepare(run.roll_out())
    assert len(fed) == passes
    with measuring(run) as fed:
        run.updater(batch)
    assert len(fed) == 1  # of values too, where there are any


@pytest.mark.parametrize("precomputed", [False, True])
def test_precomputed_references_take_no_pass(
    precomputed: bool, started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("RLX_CACHE", str(tmp_path / "cache"))
    own = dict.fromkeys(("reward", "num_generations", "max_completion_length", "log_completions"), ...)
    run = started(algo="dpo", lora_r=4, precompute_ref_log_probs=precomputed, **own, **OWN)
    plan_for(run.policy.model, run.collate().sequences)
    with measuring(run) as fed:
        run.collate()
    assert len(fed) == (not precomputed)


def test_a_reference_of_labelled_rows_passes_each_prompt_once(started: Callable[..., Any]) -> None:
    own = dict.fromkeys(("reward", "num_generations", "max_completion_length", "log_completions"), ...)
    run = started(algo="kto", lora_r=4, **own, **OWN)
    plan_for(run.policy.model, run.collate().sequences)
    with measuring(run) as fed:
        batch = run.collate()
    sequences, others = batch.sequences, batch.mismatched
    # Of a prompt with its two completions all but the last tokens, which predict nothing.
    both = int(sequences.lengths.sum() + others.counts.sum()) - len(sequences)
    assert len(fed) == 1 and fed[0] <= both < int(sequences.lengths.sum() + others.lengths.sum()) * 0.8
    for found, asked in ((batch.reference, sequences), (batch.mismatched_reference, others)):
        torch.testing.assert_close(found, run.studio.score(asked, "reference").logps, rtol=1e-5, atol=1e-5)
    with measuring(run) as fed:
        prepared = run.prepare(batch)
    assert len(fed) == 1 and prepared.mismatched_reference is None  # the policy's, of the mismatched ones
    run = started(algo="kto", lora_r=4, loss_type="apo_zero_unpaired", **own, **OWN)
    plan_for(run.policy.model, run.collate().sequences)
    with measuring(run) as fed:
        batch = run.collate()
        run.prepare(batch)
    assert len(fed) == 1 and batch.mismatched_reference is None
