"""Runs that sample by continuous batching."""

from __future__ import annotations

import pytest

import rlx


def figures(result) -> list[dict[str, float]]:
    """The log lines, but for what a clock said."""
    return [
        {name: value for name, value in line.items() if "second" not in name and "time/" not in name}
        for line in result.metrics
    ]


@pytest.mark.parametrize(
    "changes", [pytest.param({}, marks=pytest.mark.slow, id="full"), pytest.param({"lora_r": 4}, id="lora")]
)
def test_grpo_trains_as_with_the_native_generator(changes, options, tmp_path):
    runs = [
        rlx.run(
            **options(
                algo="grpo", num_ppo_epochs=..., num_generations=3, generator=generator, **changes,
                output_dir=str(tmp_path / generator),
            )
        )
        for generator in ("native", "paged")
    ]  # fmt: skip
    native, paged = map(figures, runs)
    assert len(native) == len(paged) == 2
    for one, other in zip(native, paged, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_under_mixed_precision_log_probs_are_recomputed(options, check):
    """In bfloat16 what is sampled comes from float32; the ratio is 1 as the update computes both."""
    check(rlx.run(**options(generator="paged", mixed_precision="bf16")).metrics)


@pytest.mark.parametrize(
    "changes", [{"repetition_penalty": 1.2}, {"stop_strings": ["."]}], ids=["penalty", "strings"]
)
def test_what_it_cannot_do_is_refused_before_anything_loads(changes, options):
    with pytest.raises(rlx.ConfigError, match="generator 'paged' has no") as caught:
        rlx.prepare(**options(generator="paged", model="no/such/model", **changes))
    assert "--generator native" in caught.value.hint
