"""The memory estimate: exact where shapes decide, within a factor of a measured run elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlx.core import memory
from rlx.core.models import load_policy
from rlx.core.optim import build_optimizer
from rlx.core.reference import build_reference
from rlx.core.settings import Settings

IDS = torch.arange(3, 19).view(2, 8)
FACTOR = 1.5


def measured(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_for_backward(trunk: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, weights left out, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in trunk.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trunk(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"lora_r": 4}, {"dtype": "bfloat16", "lora_r": 4}, {"optim": "sgd"}],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_optimizer_are_exact(options, tied, make_folder):
    chosen = Settings(model=str(make_folder(tie_word_embeddings=tied)), **options)
    policy = load_policy(chosen, values=True)
    report = memory.estimate(policy.model, chosen, token_budget=16, generation_rows=2, value=policy.value)
    optimizer = build_optimizer(policy.trainable(), chosen)
    sum(p.float().square().sum() for p in policy.trainable().values()).backward()
    optimizer.step()
    assert report.parts["weights"] == measured([*policy.model.parameters(), *policy.model.buffers()])
    assert report.parts["value"] == 17 * 4
    assert report.parts["gradients"] == measured(p.grad for p in policy.trainable().values())
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert report.parts.get("optimizer", 0) == measured(state)


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_configuration_alone_gives_the_numbers_of_the_loaded_model(lora_r, tied, make_folder):
    chosen = Settings(model=str(make_folder(tie_word_embeddings=tied)), lora_r=lora_r, dtype="bfloat16")
    policy = load_policy(chosen)
    empty = memory.empty_model(policy.base.config, chosen, torch.bfloat16)
    sizes = {"token_budget": 64, "generation_rows": 4, "device": torch.device("cpu")}
    loaded, planned = (memory.estimate(model, chosen, **sizes) for model in (policy.model, empty))
    assert loaded.parts == planned.parts and loaded.peak == planned.peak
    assert planned.loaded == 0 and loaded.loaded == loaded.parts["weights"]
    assert all(p.device.type == "meta" for p in empty.parameters())


@pytest.mark.parametrize("kind", ["copy", "adapter off", "model"])
def test_the_reference_counts_what_it_adds(kind, make_folder):
    folder = str(make_folder())
    chosen = Settings(
        model=folder,
        lora_r=4 if kind == "adapter off" else 0,
        reference_model=folder if kind == "model" else None,
    )
    policy = load_policy(chosen)
    reference = build_reference(chosen, policy)
    report = memory.estimate(
        policy.model,
        chosen,
        token_budget=16,
        generation_rows=2,
        reference=reference.kind,
        reference_model=reference.model if kind == "model" else None,
    )
    added = (
        0 if kind == "adapter off" else measured([*reference.model.parameters(), *reference.model.buffers()])
    )
    assert report.parts.get("reference", 0) == added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 64, "intermediate_size": 128},
        {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4},
        {"hidden_size": 96, "intermediate_size": 256, "num_key_value_heads": 4},
    ],
    ids=["narrow", "deep", "many-heads"],
)
def test_activations_are_within_the_stated_factor_of_what_autograd_keeps(dtype, shape, tiny_model):
    model = tiny_model(**shape).to(dtype).train()
    ids = torch.randint(3, 32, (8, 32))
    ratio = memory.activation_bytes(model, ids.numel()) / saved_for_backward(model.model, ids)
    assert 1 / FACTOR <= ratio <= FACTOR


def test_checkpointing_keeps_one_state_a_layer_and_one_whole_block(tiny_model):
    model = tiny_model(num_hidden_layers=4)
    whole = memory.activation_bytes(model, 10)
    # 4 layers × hidden 16 × 4 bytes × 10 tokens, and one block of the four.
    assert memory.activation_bytes(model, 10, checkpointing=True) == 4 * 16 * 4 * 10 + whole // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_kv_cache_is_what_a_run_holds(dtype, heads, tiny_model):
    model = tiny_model(num_key_value_heads=heads).to(dtype)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    held = measured(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert memory.kv_cache_bytes(model.config, 2, 8, dtype) == held


def test_generation_weights_count_when_they_are_cast(make_folder):
    folder = str(make_folder())
    for dtype, factor in (("none", 0), ("float32", 0), ("bfloat16", 0.5)):
        chosen = Settings(model=folder, generation_dtype=dtype)
        policy = load_policy(chosen)
        report = memory.estimate(policy.model, chosen, token_budget=16, generation_rows=2)
        assert report.parts.get("generation weights", 0) == factor * measured(policy.model.parameters())


def test_training_and_sampling_take_turns():
    report = memory.MemoryReport({"weights": 10}, {"activations": 5}, {"kv cache": 7}, available=8, loaded=10)
    assert report.peak == 17 and report.fits and len(report.lines()) == 1
    assert not memory.MemoryReport({"weights": 10}, {"activations": 5}, {"kv cache": 7}, available=16).fits


def test_the_lines_say_the_parts_and_what_to_make_smaller():
    report = memory.MemoryReport({"weights": 3 * 2**20, "value": 0}, {"logits": 2**30}, {}, available=2**20)
    first, second = report.lines()
    assert first == "memory: about 1.0 GiB at most (weights 3.0 MiB, logits 1.0 GiB); 1.0 MiB free"
    assert "--max-tokens-per-micro-batch" in second


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (20 * 2**30, "20 GiB"), (5 * 2**50, "5120 TiB")],
)
def test_sizes_are_shown_for_people(size, shown):
    assert memory.show_bytes(size) == shown
