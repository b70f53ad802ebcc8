"""Weights laid out for sampling: the same numbers, for the length of a block, where it pays."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rlx.core import generation, packed_linear
from rlx.core.generation import generate
from rlx.core.packed_linear import packed
from rlx.plugins.contract import Sampling

if not torch.backends.mkldnn.is_available():
    pytest.skip("this build of torch has no oneDNN", allow_module_level=True)


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80), nn.SiLU(), nn.Linear(80, 40, bias=False)).to(dtype)


@pytest.fixture(scope="module")
def llama():
    """A model whose larger layers qualify without being asked for."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=2000, hidden_size=128, intermediate_size=1700, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("rows", [1, 7, 15, 33, 200])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_products_are_those_of_the_layers(rows, dtype, exact):
    model = layers(dtype)
    x = torch.randn(rows, 1, 48).to(dtype)
    with torch.no_grad():
        plain = model(x)
        with packed(model, least=1) as count:
            assert count == 2
            found = model(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, plain, atol=exact, rtol=exact)


def test_autocast_decides_the_type():
    model = layers()
    x = torch.randn(5, 48)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
        with packed(model, least=1):
            found = model(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, atol=8e-3, rtol=8e-3)


def test_layers_are_left_as_they_were_whatever_happens():
    model = layers()
    x = torch.randn(3, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match="poked"), packed(model, least=1):
        raise RuntimeError("poked")
    assert all("forward" not in vars(module) for module in model.modules())
    model(x).sum().backward()
    assert model[0].weight.grad is not None and x.grad is not None


def test_weights_are_read_anew_each_time():
    model = layers()
    x = torch.randn(3, 48)
    for _ in range(2):
        with torch.no_grad():
            plain = model(x)
            with packed(model, least=1):
                torch.testing.assert_close(model(x), plain)
            model[0].weight += 1


def test_only_plain_layers_that_are_large_enough():
    model = layers()
    with packed(model) as count:
        assert count == 0  # 3840 weights are fewer than LEAST_WEIGHTS
    with packed(model, least=3300) as count:
        assert count == 1 and "forward" in vars(model[0]) and "forward" not in vars(model[2])
    hook = model[0].register_forward_hook(lambda *given: None)
    with packed(model, least=1) as count:
        assert count == 1  # a hook would not be heard
    hook.remove()
    model.half()
    with packed(model, least=1) as count:
        assert count == 0
    with packed(model.to("meta"), least=1) as count:
        assert count == 0


def test_copies_stay_within_a_share_of_the_memory(monkeypatch):
    model = layers()
    monkeypatch.setattr(packed_linear, "SHARE", 1e-9)
    with packed(model, least=1) as count:
        assert count == 0


def test_operators_that_changed_are_done_without(monkeypatch):
    monkeypatch.setattr(packed_linear, "_ops", lambda: torch.ops.no_such_operators)
    packed_linear._works.cache_clear()
    with packed(layers(), least=1) as count:
        assert count == 0
    monkeypatch.undo()
    packed_linear._works.cache_clear()
    with packed(layers(), least=1) as count:
        assert count == 2


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the setting is one of x86")
def test_a_type_that_the_processor_lacks_is_left_alone():
    """oneDNN held to AVX2, which has no bfloat16: layers of that type stay as they are, the others do not."""
    program = (
        "import torch\n"
        "from rlx.core.packed_linear import packed\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    with packed(torch.nn.Linear(48, 80, dtype=dtype), least=1) as count:\n"
        "        print(count)\n"
    )
    held = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=held, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "0"]), done.stderr


def test_sampling_lays_weights_out_and_draws_the_same(llama, monkeypatch):
    counted = []
    block = generation.packed

    @contextmanager
    def spy(model):
        with block(model) as count:
            counted.append(count)
            yield count

    monkeypatch.setattr(generation, "packed", spy)
    prompts, sampling = [[5, 9, 17], [71, 2, 8, 40, 3]], Sampling(24, stop_token_ids=tuple(range(50)))
    on = generate(llama, prompts, 6, sampling, [1, 2])
    assert counted == [7]  # gate, up and down of two layers, and the head, whose weight the embedding shares
    off = generate(llama, prompts, 6, sampling, [1, 2], packed_weights=False)
    assert generate(llama, prompts, 6, Sampling(8), [1, 2]).ids  # too short to pay
    assert counted == [7]
    assert (on.ids, on.finished) == (off.ids, off.finished)
    for mine, theirs in zip(on.logprobs, off.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-5, rtol=1e-5)


def test_an_adapter_keeps_its_part(llama):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    sampling = Sampling(20, greedy=True)
    with model.disable_adapter():
        bare = generate(model, [[5, 9, 17]], 1, sampling, [0])
    on = generate(model, [[5, 9, 17]], 1, sampling, [0])
    off = generate(model, [[5, 9, 17]], 1, sampling, [0], packed_weights=False)
    assert on.ids == off.ids != bare.ids
    model.unload()
