"""benchmarks/gpu.py, tried on the CPU with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", ["tiny", "0.1B"])
def test_parameters_are_counted_as_the_model_has_them(gpu, size):
    numbers = gpu.counts(size)
    matrices = [p for name, p in gpu.build(size, "meta").model.layers.named_parameters() if p.ndim == 2]
    assert numbers["trunk"] == sum(p.numel() for p in matrices)


def test_bytes_of_decoding_by_hand(gpu):
    """tiny: 2 layers of 64·64·2 + 64·32·2 + 3·64·172 numbers, a head of 1000·64, 2·2·2·16 of keys a token."""
    trunk, head, cache = 2 * (8192 + 4096 + 33024), 64_000, 128
    spared = 8192 + 33024  # of the last layer: queries, output map and MLP
    assert gpu.counts("tiny") == {"trunk": trunk, "head": head, "cache": cache, "spared": spared}
    # Two steps; each of 3 rows reads 5 keys at the first step, 6 at the second; 2 bytes a number.
    assert gpu.bytes_read("tiny", rows=3, prompt=5, completion=2) == 2 * (2 * (trunk + head) + 3 * 11 * cache)


@pytest.mark.slow
def test_a_try_on_the_cpu_fills_both_tables(tmp_path):
    command = "--device cpu --sizes tiny --batches 4 --prompt 8 --completion 4 --runs 1".split()
    subprocess.run([sys.executable, FILE, *command, "--results", tmp_path], check=True, capture_output=True)
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [one["work"] for one in results if "rows" in one] == ["native", "graphs", "transformers", "paged"]
    assert [one["shape"] for one in results if "shape" in one] == ["GRPO", "DPO"]
    for one in results:
        assert "failed" not in one and one.get("layout", "shared") == "shared"
        for name in ("tokens_per_second", "bandwidth_share", "mfu", "peak_bytes"):
            assert one.get(name, 1) > 0
    # 8 groups of 8: prompts of 16 tokens once, completions of 4 whose last token is not fed.
    assert next(one["tokens_fed"] for one in results if one.get("shape") == "GRPO") == 8 * (16 + 8 * 3)
    assert "| tiny | paged | 4 |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_what_was_not_reached_is_named(tmp_path):
    subprocess.run(
        [sys.executable, FILE, "--device", "cpu", "--sizes", "tiny", "--seconds", "0", "--results", tmp_path],
        check=True,
        capture_output=True,
    )
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert {one["failed"] for one in results} == {"no time was left"}
