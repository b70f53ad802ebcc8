"""One mini-batch, one optimizer step: the same gradient for every split, and all of it finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlx
from rlx.core import snapshot, update
from rlx.core.batch import Prompts, Rollouts, Sequences
from rlx.core.errors import DivergedError, MemoryExhausted
from rlx.core.run import train
from rlx.core.state import load_state
from rlx.core.update import Updater

ROWS = 8


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A run with SGD at rate 1, so that a step is the gradient, and eight prepared rollouts."""
    from rlx.core.run import prepare

    torch.set_num_threads(1)
    run = prepare(
        algo="ppo", reward="exact_match", output_dir=str(tmp_path_factory.mktemp("bench")), max_rows=8,
        max_eval_rows=2, max_steps=4, batch_size=ROWS, num_generations=1, num_mini_batches=1, progress="none",
        plots=False, max_completion_length=12, optim="sgd", learning_rate=1.0, value_learning_rate=None,
        max_grad_norm=0, lr_scheduler_type="constant", warmup_steps=0, entropy_coef=0.1, mixed_precision="no",
    )  # fmt: skip
    batch = run.roll_out()
    cut = [3, 10, 7, 0, 12, 1, 9, 5]  # tokens that are kept of each completion: unequal lengths, one empty
    ids, counts = batch.sequences.ids.split(batch.sequences.lengths.tolist()), batch.sequences.counts.tolist()
    prompts = [row[: len(row) - n].tolist() for row, n in zip(ids, counts, strict=True)]
    completions = [row[len(row) - n :].tolist()[:k] for row, n, k in zip(ids, counts, cut, strict=True)]
    sequences = Sequences.from_lists(prompts, completions)
    random = torch.Generator().manual_seed(0)
    size = int(sequences.counts.sum())

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(size, generator=random) * scale

    with torch.no_grad():
        now = run.updater.score(sequences)
        run.policy.value_head.weight.copy_(torch.randn(run.policy.value_head.weight.shape, generator=random))
    rollouts = Rollouts(
        sequences, prompts=batch.prompts, texts=batch.texts, finished=batch.finished,
        old=now.logps + noise(0.2), values=noise(1.0), advantages=noise(1.0), returns=noise(1.0),
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in run.policy.trainable().items()}
    yield run, rollouts, start
    run.close()


def gradient(bench, batch=None, budget: int = 1 << 20) -> torch.Tensor:
    """How far one optimizer step moves the weights, all of them in one vector."""
    run, rollouts, start = bench
    put_back(bench)
    updater = Updater(run.policy, run.algorithm, run.settings, run.accelerator, 4, budget)
    assert updater(rollouts if batch is None else batch).verdict == "step"
    return torch.cat([(start[name] - p.detach()).flatten() for name, p in run.policy.trainable().items()])


def put_back(bench) -> None:
    run, _, start = bench
    with torch.no_grad():
        for name, p in run.policy.trainable().items():
            p.copy_(start[name])


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm()) <= 1e-5 * float(other.norm()) and float(other.norm()) > 0


def test_the_step_is_the_gradient_of_the_mean_over_tokens(bench):
    run, rollouts, _ = bench
    put_back(bench)
    parameters = list(run.policy.trainable().values())
    loss = run.algorithm.loss(rollouts, run.updater.score(rollouts.sequences))
    (terms,) = loss.terms.values()
    assert len(terms) == 3 + 10 + 7 + 0 + 12 + 1 + 9 + 5
    (terms.sum() / 47).backward()
    naive = torch.cat([p.grad.flatten() for p in parameters])
    run.updater.optimizer.zero_grad()
    assert close(gradient(bench), naive)


@given(budget=st.integers(1, 400), order=st.permutations(range(ROWS)))
@settings(max_examples=25)
def test_every_split_and_order_gives_the_same_step(bench, budget, order):
    _, rollouts, _ = bench
    assert close(gradient(bench, rollouts.take(torch.tensor(order)), budget), gradient(bench))


def test_a_partial_batch_counts_its_own_tokens_only(bench):
    """fault[D16]: three rows weigh as three rows, not as three of eight."""
    run, rollouts, _ = bench
    part = rollouts.take(torch.tensor([0, 1, 2]))
    put_back(bench)
    loss = run.algorithm.loss(part, run.updater.score(part.sequences))
    (loss.terms["tokens"].sum() / 20).backward()
    naive = torch.cat([p.grad.flatten() for p in run.policy.trainable().values()])
    run.updater.optimizer.zero_grad()
    for budget in (30, 1 << 20):
        assert close(gradient(bench, part, budget), naive)


def test_fault_n9_rows_without_tokens_contribute_nothing(bench):
    run, rollouts, start = bench
    put_back(bench)
    empty = rollouts.take(torch.tensor([3]))
    assert int(empty.sequences.counts.sum()) == 0
    outcome = run.updater(empty)
    assert outcome.verdict == "skip" and outcome.loss == 0
    assert all(torch.equal(start[name], p) for name, p in run.policy.trainable().items())


# Steps and rates


def recorded(run) -> list[list[float]]:
    """Gets the learning rates of every optimizer step."""
    rates: list[list[float]] = []
    run.updater.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    return rates


class Bare(rlx.Algorithm):
    """A loss, and nothing to report."""

    def loss(self, batch, now):
        return rlx.Loss({"tokens": -now.logps})


def test_an_algorithm_without_metrics_is_trained_too(started):
    own = dict.fromkeys(("num_generations", "num_ppo_epochs", "num_mini_batches"), ...)
    run = started(algo=Bare, warmup_steps=0, **own)
    before = torch.cat([p.detach().clone().flatten() for p in run.policy.trainable().values()])
    rollouts = run.roll_out()
    assert run.update(rollouts) == "step"
    after = torch.cat([p.detach().flatten() for p in run.policy.trainable().values()])
    assert not torch.equal(before, after)
    assert run.update(rollouts.take(torch.arange(0))) == "skip"  # nothing in it to learn from


def test_each_mini_batch_is_one_step_of_the_schedule(started):
    run = started(max_steps=3, num_ppo_epochs=2, num_mini_batches=2, learning_rate=1e-4, warmup_steps=3)
    rates = recorded(run)
    list(run)
    total = 3 * 2 * 2
    expected = [i / 3 if i < 3 else (total - i) / (total - 3) for i in range(total)]
    assert [row[0] for row in rates] == pytest.approx([1e-4 * share for share in expected])
    assert all(row[-1] == pytest.approx(2e-3 * share) for row, share in zip(rates, expected, strict=True))
    assert run.updater.done == total and run.updater.scheduler.get_last_lr()[0] == 0


def test_mini_batches_of_an_epoch_part_the_rows(started):
    run = started(batch_size=7, num_mini_batches=7, num_ppo_epochs=2, max_rows=12)
    batch = run.prepare(run.roll_out())
    batch = replace(batch, metrics={})
    parts = list(run.minibatches(batch))
    assert len(parts) == 14
    for epoch in (parts[:7], parts[7:]):
        assert sorted(p.prompts.rows[0] for p in epoch) == sorted(batch.prompts.rows)
    assert [p.prompts.rows for p in parts[:7]] != [p.prompts.rows for p in parts[7:]]  # shuffled anew


def test_target_kl_ends_an_update_and_the_schedule_goes_on(started):
    run = started(target_kl=1e-4, learning_rate=1e-2, max_steps=2, warmup_steps=0)
    rates = recorded(run)
    run.step()
    assert len(rates) == 1 and run.updater.done == 4  # the first has KL 0, the second too much
    run.step()
    assert run.updater.done == 8 and rates[1][0] == pytest.approx(1e-2 * 4 / 8)


def test_a_mini_batch_whose_ratio_exploded_is_skipped_and_counted(started):
    run = started(ratio_threshold=5.0)
    batch = run.prepare(run.roll_out())
    before = {name: p.detach().clone() for name, p in run.policy.trainable().items()}
    assert run.update(replace(batch, old=batch.old - 3.0)) == "skip"  # e³ ≈ 20
    assert all(torch.equal(before[name], p) for name, p in run.policy.trainable().items())
    assert float(run.journal.meter.sums["update/skipped"]) == 1
    assert run.update(batch) == "step"
    meter = run.journal.meter
    assert float(meter.sums["update/skipped"]) == 1 and meter.counts["update/skipped"] == 2


# What is not finite


def poisoned(run, times: set[int]) -> None:
    """The loss is NaN the n-th time that it is asked for, n from 0."""
    loss, asked = run.algorithm.loss, iter(range(10**6))

    def poison(batch, now):
        found = loss(batch, now)
        if next(asked) not in times:
            return found
        return replace(found, terms={by: terms * float("nan") for by, terms in found.terms.items()})

    run.algorithm.loss = poison


def state(run):
    moments = run.updater.state_dict()["optimizer"]["moments"]
    tensors = [p.detach().clone() for p in run.policy.trainable().values()]
    return tensors + [value.clone() for values in moments.values() for value in values.values()]


def same(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_fault_n1_a_nan_loss_moves_nothing_and_ends_the_run(started):
    run = started(num_ppo_epochs=1, num_mini_batches=2)
    poisoned(run, {1})
    parts = run.minibatches(run.prepare(run.roll_out()))
    assert run.update(next(parts)) == "step"
    before, bad = state(run), next(parts)
    with pytest.raises(DivergedError, match="optimizer step 2; no weight has moved") as caught:
        run.update(bad)
    assert caught.value.exit_code == 7 and same(before, state(run))
    folder = run.path / "debug" / "nonfinite-step1-process0"
    assert caught.value.lines()[-1] == f"  note:     the mini-batch is in {folder}"
    kept = load_state(folder)
    assert kept["optimizer_step"] == 2 and kept["error"][0].startswith("the loss or the gradient")
    for name in ("ids", "lengths", "prompt_lengths", "scored"):
        assert torch.equal(kept["batch"]["sequences"][name], getattr(bad.sequences, name))
    for name in ("old", "reference", "advantages", "score"):
        assert torch.equal(kept["batch"][name], getattr(bad, name))
    assert kept["batch"]["texts"] == list(bad.texts) and kept["batch"]["prompts"]["rows"] == bad.prompts.rows


def test_a_disk_that_refuses_the_evidence_does_not_hide_the_fault(started):
    run = started(num_ppo_epochs=1)
    poisoned(run, {0})
    (run.path / "debug").write_text("in the way")
    with pytest.raises(DivergedError, match="no weight has moved") as caught:
        run.step()
    assert "could not be written" in caught.value.lines()[-1]


@pytest.mark.parametrize("bad", [1, 3, 4])
def test_fault_n2_steps_may_be_skipped_three_times_in_a_row(bad, started):
    run = started(nonfinite="skip", num_ppo_epochs=1, num_mini_batches=8)
    poisoned(run, set(range(bad)) | {6})
    before = state(run)
    if bad == 4:
        with pytest.raises(DivergedError):
            run.step()
        assert same(before, state(run))
        return
    run.step()
    assert not same(before, state(run))
    assert run.metrics_history[-1]["update/skipped"] == pytest.approx((bad + 1) / 8)
    assert run.metrics_history[-1]["update/nonfinite"] == pytest.approx((bad + 1) / 8)
    assert all(value == value for value in run.metrics_history[-1].values())  # no NaN in the log


def test_fault_n3_an_infinite_gradient_is_seen_though_the_loss_is_finite(started):
    run = started()
    batch = run.prepare(run.roll_out())
    before = state(run)
    handle = next(iter(run.policy.trainable().values())).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(DivergedError, match=r"gradient norm (inf|nan)"):
        run.update(batch)
    handle.remove()
    assert same(before, state(run))


def test_fault_n5_a_log_prob_that_is_not_finite_is_named(started):
    run = started()
    sample = run.studio.sample

    def broken(*words, **named):
        found = sample(*words, **named)
        rows = [list(row) for row in found.logprobs]
        rows[2][1] = float("-inf")
        return replace(found, logprobs=rows)

    run.studio.sample = broken
    with pytest.raises(DivergedError, match="old of a sampled token is not finite") as caught:
        run.step()
    assert "completion token 1" in caught.value.where and str(run.order.rows(0)[2]) in caught.value.where


def test_fault_n16_weights_that_are_not_finite_are_not_saved(started):
    run = started()
    run.step()
    good = snapshot.save(run)
    run.step()
    name, parameter = next(iter(run.policy.trainable().items()))
    with torch.no_grad():
        parameter.view(-1)[5] = float("nan")
    with pytest.raises(DivergedError, match=f"'{name}'") as caught:
        snapshot.save(run)
    assert caught.value.exit_code == 7
    assert good.is_dir() and [p.name for p in run.path.glob("*checkpoint-*")] == ["checkpoint-1"]


# Memory


def short_of_memory(run, most: int, seen: list[int] | None = None) -> None:
    """A model that runs out of memory with more than so many tokens in a forward with gradient."""

    def check(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if torch.is_grad_enabled():
            if seen is not None:
                seen.append(ids.numel())
            if ids.numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    run.policy.model.model.register_forward_pre_hook(check, with_kwargs=True)


def test_fault_n11_the_budget_halves_and_nothing_else_changes(started):
    faulty, small = started(), started(max_tokens_per_micro_batch=64)
    seen: list[int] = []
    short_of_memory(faulty, 70, seen)
    faulty.step()
    small.step()
    assert faulty.updater.budget == 64 and max(seen) > 70
    for (name, one), other in zip(
        faulty.policy.trainable().items(), small.policy.trainable().values(), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6), name
    faulty.step()
    assert all(number <= 70 for number in seen[-8:])  # it is not tried again


def test_fault_n12_one_row_that_does_not_fit_ends_the_run(started, tmp_path):
    run = started()
    run.step()
    short_of_memory(run, 20)
    with pytest.raises(MemoryExhausted, match="one row") as caught:
        run.step()
    assert caught.value.exit_code == 5 and "max_completion_length" in caught.value.hint


def test_a_budget_that_is_asked_for_anew_wins_over_one_that_was_halved(started):
    run = started()
    run.updater.budget = 64
    kept, asked = started(), started(max_tokens_per_micro_batch=512)
    for other, budget in ((kept, 64), (asked, 512)):
        other.updater.load_state_dict(run.updater.state_dict())
        assert other.updater.budget == budget


def test_fault_n9_a_reward_that_never_applies_moves_nothing(started):
    run = started(reward=lambda completions: [None] * len(completions), max_steps=1)
    before = state(run)
    train(run)
    assert same(before, state(run))
    assert run.metrics_history[-1]["reward/unscorable"] == 1


def test_prompts_of_a_batch_are_those_of_its_rows(started):
    run = started()
    prompts = run.roll_out().prompts
    assert isinstance(prompts, Prompts) and list(prompts.rows) == run.order.rows(0)


def test_gradients_of_processes_are_added_up_in_bounded_messages_in_one_order(monkeypatch):
    """8 bytes a message: floats of 4 bytes two by two, one that is larger alone, other types apart."""
    monkeypatch.setattr(update, "MESSAGE", 8)
    sizes = [
        (1, torch.float32),
        (1, torch.bfloat16),
        (1, torch.float32),
        (5, torch.float32),
        (1, torch.float32),
    ]
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    messages = [[places[id(parameter)] for parameter in part] for part in update._messages(parameters)]
    assert messages == [[0, 2], [3], [4], [1]]
