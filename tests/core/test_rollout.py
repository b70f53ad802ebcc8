"""Sampling and measuring: what happens when memory runs out, and what the numbers of a batch are."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from rlx.core import rollout
from rlx.core.errors import MemoryExhausted
from rlx.core.precompute import precompute_all
from rlx.core.run import prepare


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    run = prepare(
        algo="ppo", reward="exact_match", output_dir=str(tmp_path_factory.mktemp("run")), max_rows=8,
        max_eval_rows=2, max_steps=2, batch_size=4, num_generations=2, num_mini_batches=1, progress="none",
        plots=False, max_completion_length=12,
    )  # fmt: skip
    yield run
    run.close()


class Small:
    """A generator without memory for more than a few completions at a time."""

    def __init__(self, inner, rows):
        self.inner, self.rows, self.asked = inner, rows, []

    def sync(self, policy):
        self.inner.sync(policy)

    def generate(self, prompts, n, sampling, seeds):
        self.asked.append(sampling.batch_size)
        if (sampling.batch_size or len(prompts) * n) > self.rows:
            raise torch.OutOfMemoryError("planted")
        return self.inner.generate(prompts, n, sampling, seeds)


@pytest.fixture
def held(monkeypatch):
    """The errors whose frames still held memory when it was to be given back."""
    found = []
    monkeypatch.setattr(rollout, "free_cache", lambda: found.append(sys.exception()))
    return found


def test_sampling_goes_on_with_fewer_rows_when_memory_runs_out(run, monkeypatch, held):
    # fault[N12]
    prompts, seeds = run.data.take([0, 1, 2, 3]), [1, 2, 3, 4]
    whole = run.studio.sample(prompts, 2, seeds)
    monkeypatch.setattr(run.studio, "generator", Small(run.studio.generator, 2))
    assert run.studio.sample(prompts, 2, seeds).ids == whole.ids
    assert run.studio.generator.asked == [None, 4, 2]
    assert held == [None, None]
    run.studio.sample(prompts, 2, seeds)
    assert run.studio.generator.asked[3:] == [2]  # what fitted is remembered


def test_sampling_halves_what_was_sampled_at_a_time(run, monkeypatch):
    prompts = run.data.take([0, 1, 2, 3])
    monkeypatch.setattr(run.studio, "sampling", replace(run.studio.sampling, batch_size=None))
    monkeypatch.setattr(rollout, "rows_that_fit", lambda *given: 6)  # of 16; they were too many
    monkeypatch.setattr(run.studio, "generator", Small(run.studio.generator, 3))
    run.studio.sample(prompts, 4, [1, 2, 3, 4])
    assert run.studio.generator.asked == [None, 3]


def test_sampling_halves_no_more_than_there_is(run, monkeypatch):
    prompts = run.data.take([0, 1, 2, 3])
    monkeypatch.setattr(run.studio, "sampling", replace(run.studio.sampling, batch_size=64))
    monkeypatch.setattr(run.studio, "generator", Small(run.studio.generator, 4))
    run.studio.sample(prompts, 2, [1, 2, 3, 4])
    assert run.studio.generator.asked == [64, 4]


def test_rows_that_fitted_are_kept_by_a_checkpoint_unless_others_are_asked_for(run, monkeypatch):
    free = replace(run.studio.sampling, batch_size=None)
    monkeypatch.setattr(run.studio, "sampling", replace(free, batch_size=3))
    state = run.studio.budget_state()
    run.studio.sampling = free
    run.studio.load_budget_state({**state, "rows_asked": 8})
    assert run.studio.sampling.batch_size is None
    run.studio.load_budget_state(state)
    assert run.studio.sampling.batch_size == 3


def test_sampling_that_never_fits_says_what_to_change(run, monkeypatch):
    monkeypatch.setattr(run.studio, "generator", Small(run.studio.generator, 0))
    with pytest.raises(MemoryExhausted, match="sampling one completion") as caught:
        run.studio.sample(run.data.take([0]), 2, [1])
    assert caught.value.exit_code == 5 and "max_completion_length" in caught.value.hint


def test_scoring_goes_on_with_a_smaller_budget_when_memory_runs_out(run, monkeypatch, held):
    sequences = run.roll_out().sequences
    whole = run.studio.score(sequences)
    asked, plain = [], rollout.score

    def small(model, sequences, **options):
        asked.append(options["token_budget"])
        if options["token_budget"] > 100:
            raise torch.OutOfMemoryError("planted")
        return plain(model, sequences, **options)

    monkeypatch.setattr(rollout, "score", small)
    monkeypatch.setattr(run.studio, "budget", 400)
    torch.testing.assert_close(run.studio.score(sequences).logps, whole.logps, rtol=1e-5, atol=1e-6)
    assert asked == [400, 200, 100]
    assert held == [None, None]

    def never(*_, **__):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(run.studio, "budget", 30)
    monkeypatch.setattr(rollout, "score", never)
    with pytest.raises(MemoryExhausted, match="one sequence"):
        run.studio.score(sequences)


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("RLX_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)

    def make(name, **options):
        return prepare(
            algo="dpo", output_dir=str(tmp_path / name), max_rows=12, max_eval_rows=4, max_steps=2,
            batch_size=4, progress="none", plots=False, **options,
        )  # fmt: skip

    return make


def test_precomputed_reference_log_probs_equal_live_ones_and_are_kept(pairs):
    live, taken = pairs("live"), pairs("taken", precompute_ref_log_probs=True)
    try:
        assert taken.studio.reference is None and live.studio.reference is not None
        torch.testing.assert_close(taken.collate().reference, live.collate().reference, rtol=1e-5, atol=1e-6)
        lines: list[str] = []
        again, _ = precompute_all(live.data, live.eval_data, live.studio, live.algorithm, lines.append)
        assert all("from" in line for line in lines) and len(lines) == 2
        assert torch.equal(again.batch([3, 1]).reference, taken.data.batch([3, 1]).reference)
    finally:
        live.close(), taken.close()


def test_kept_log_probs_are_those_of_this_precision(pairs):
    """Beside those of float32 in the cache, log-probs under autocast are taken anew."""
    whole = pairs("whole", precompute_ref_log_probs=True, mixed_precision="no")
    half = pairs("half", precompute_ref_log_probs=True, mixed_precision="bf16")
    live = pairs("live", mixed_precision="bf16")
    try:
        assert torch.equal(half.collate().reference, live.collate().reference)
        assert not torch.allclose(half.collate().reference, whole.collate().reference, rtol=1e-5, atol=1e-5)
    finally:
        whole.close(), half.close(), live.close()


def test_log_probs_that_cannot_be_kept_are_used_all_the_same(pairs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RLX_CACHE", str(tmp_path / "file"))
    run = pairs("taken", precompute_ref_log_probs=True)
    try:
        assert run.collate().reference is not None
        lines = [line for line in run.plan if "taken once, not kept: " in line]
        assert len(lines) == 2 and "Not a directory" in lines[0]
    finally:
        run.close()


def test_a_full_disk_keeps_nothing_of_them(pairs, tmp_path, monkeypatch):
    def full(tensors, file):
        """What safetensors does where a write fails: a part of the file, and an error of its own."""
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setenv("RLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("safetensors.torch.save_file", full)
    run = pairs("taken", precompute_ref_log_probs=True)
    try:
        assert run.collate().reference is not None
        assert any("taken once, not kept: " in line and "No space left" in line for line in run.plan)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    finally:
        run.close()


def test_precomputing_is_refused_where_nothing_can_use_it(tmp_path):
    from rlx.core.errors import ConfigError

    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        prepare(
            algo="kto", output_dir=str(tmp_path / "kto"), max_rows=8, max_steps=1, batch_size=4,
            precompute_ref_log_probs=True, progress="none",
        )  # fmt: skip
