"""Sampling and measuring: what happens when memory runs out, and what the numbers of a batch are."""

from __future__ import annotations

import pytest
import torch

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


def test_sampling_goes_on_with_fewer_rows_when_memory_runs_out(run, monkeypatch):
    # fault[N12]
    prompts, seeds = run.data.take([0, 1, 2, 3]), [1, 2, 3, 4]
    whole = run.studio.sample(prompts, 2, seeds)
    monkeypatch.setattr(run.studio, "generator", Small(run.studio.generator, 2))
    assert run.studio.sample(prompts, 2, seeds).ids == whole.ids
    assert run.studio.generator.asked == [None, 4, 2]
    run.studio.sample(prompts, 2, seeds)
    assert run.studio.generator.asked[3:] == [2]  # what fitted is remembered


def test_sampling_that_never_fits_says_what_to_change(run, monkeypatch):
    monkeypatch.setattr(run.studio, "generator", Small(run.studio.generator, 0))
    with pytest.raises(MemoryExhausted, match="sampling one completion") as caught:
        run.studio.sample(run.data.take([0]), 2, [1])
    assert caught.value.exit_code == 5 and "max_completion_length" in caught.value.hint


def test_scoring_goes_on_with_a_smaller_budget_when_memory_runs_out(run, monkeypatch):
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


def test_precomputing_is_refused_where_nothing_can_use_it(tmp_path):
    from rlx.core.errors import ConfigError

    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        prepare(
            algo="kto", output_dir=str(tmp_path / "kto"), max_rows=8, max_steps=1, batch_size=4,
            precompute_ref_log_probs=True, progress="none",
        )  # fmt: skip
