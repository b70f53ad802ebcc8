"""The memory estimate: exact where shapes decide, within a factor of a measured run elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import rlx
from rlx.core import memory
from rlx.core.models import load_policy
from rlx.core.optim import build_optimizer
from rlx.core.reference import build_reference
from rlx.core.settings import Settings
from rlx.core.values import ValueHead, ValueModel

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


def test_an_adapter_in_a_folder_counts_as_the_one_that_is_loaded(tmp_path):
    load_policy(Settings(lora_r=4)).save_pretrained(tmp_path / "adapter")
    chosen = Settings(adapter=str(tmp_path / "adapter"))
    policy = load_policy(chosen)
    empty = memory.empty_model(policy.base.config, chosen, torch.float32)
    sizes = {"token_budget": 64, "generation_rows": 4, "device": torch.device("cpu")}
    loaded, planned = (memory.estimate(model, chosen, **sizes) for model in (policy.model, empty))
    assert loaded.parts == planned.parts and all(p.device.type == "meta" for p in empty.parameters())
    pairs = [{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}] * 8
    given = {"algo": "dpo", "dataset": pairs, "chat_template": "none", "output_dir": str(tmp_path / "run")}
    full, adapted = (
        rlx.run(**given, **more, dry_run=True).plan for more in ({}, {"adapter": chosen.adapter})
    )
    assert [any("reference" in line and "iB" in line for line in plan) for plan in (full, adapted)] == [
        True,
        False,
    ]


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


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_that_are_laid_out_for_sampling_are_counted(precision):
    # Queries, keys, values and output 512 x 512 each, three MLP matrices 512 x 1024; the head 4096 x 512: all
    # above the least number of weights in either type.
    config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
                         num_key_value_heads=8, vocab_size=4096, tie_word_embeddings=False)  # fmt: skip
    model = memory.empty_model(config, Settings(), torch.float32)
    chosen = Settings(mixed_precision=precision, max_completion_length=16)
    sizes = {"token_budget": 16, "device": torch.device("cpu")}
    weights = 4 * 512 * 512 + 3 * 512 * 1024 + 4096 * 512
    report = memory.estimate(model, chosen, generation_rows=2, **sizes)
    assert report.sampling["laid-out weights"] == weights * (2 if precision == "bf16" else 4)
    short = Settings(mixed_precision=precision, max_completion_length=15)
    assert memory.estimate(model, short, generation_rows=2, **sizes).sampling["laid-out weights"] == 0
    assert memory.estimate(model, chosen, generation_rows=0, **sizes).sampling["laid-out weights"] == 0


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


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_micro_batch_is_the_largest_power_of_two_that_leaves_a_fifth_free(place, tiny_model, monkeypatch):
    model, chosen, device = tiny_model(), Settings(), torch.device(place)

    def needed(tokens: int) -> int:
        # Two layers of 13 states of 16 numbers and 4 of 32, float32; gradients and AdamW; logits of 32 tokens
        # three times and once more.
        weights = sum(p.numel() for p in model.parameters()) * 4
        steps = 4 * len(list(model.parameters()))
        return 2 * (13 * 16 + 4 * 32) * 4 * tokens + 3 * weights + steps + 4 * 4 * 32 * tokens

    def found(free: float) -> int:
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(free))
        return memory.token_budget(model, chosen, device=device, reference="copy")

    # The copy stands already, so that it is no longer among what is free; its bytes are not asked for again.
    most = {"cpu": 2048, "cuda": 65536}[place]
    for tokens in (2048, most):
        assert found(needed(tokens) / 0.8 + 8) == tokens
        assert found(needed(tokens) / 0.8 - 8) == tokens // 2
    assert found(1e15) == most and found(0) == 1024


def test_tokens_that_are_asked_for_are_not_looked_into(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert memory.token_budget(tiny_model(), Settings(max_tokens_per_micro_batch=99_999)) == 99_999


def test_a_value_model_of_its_own_keeps_activations_too(tiny_model):
    policy, other = tiny_model(), tiny_model(num_hidden_layers=4)
    value = ValueModel(other.model, ValueHead(16))
    parts = [
        memory.estimate(policy, Settings(), token_budget=64, generation_rows=1, value=one).parts[
            "activations"
        ]
        for one in (None, value)
    ]
    assert parts[1] == 3 * parts[0]  # two layers and four


def test_the_budget_of_a_checkpoint_stays_unless_another_was_asked_for_since():
    free, asked = Settings(), Settings(max_tokens_per_micro_batch=512)
    assert memory.kept_budget({"budget": 1024, "asked": None}, free, 4096) == 1024
    assert memory.kept_budget({"budget": 1024, "asked": None}, asked, 512) == 512
    assert memory.kept_budget({"budget": 256, "asked": 512}, asked, 512) == 256


@pytest.mark.parametrize(("free", "rows"), [(10_000_000, 53), (1000, 1)])
def test_rows_that_fit_take_half_of_the_free_memory(free, rows, monkeypatch):
    """Two layers, two heads of keys of 8 numbers, 4 bytes each, 100 tokens: 25,600 bytes of keys and values,
    twice while they are copied; six float32 tensors of 1750 logits: 42,000. Half of 10 MB holds 53 of 93,200.
    """
    from types import SimpleNamespace

    from rlx.core import kv_cache

    config = LlamaConfig(
        vocab_size=1750, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = SimpleNamespace(config=config, dtype=torch.float32)
    monkeypatch.setattr(kv_cache, "free_bytes", lambda device: free)
    assert kv_cache.rows_that_fit(model, 100, torch.device("cpu")) == rows
