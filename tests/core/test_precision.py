"""Precision of weights while sampling, and of normalisation layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rlx.core.precision import generation_precision, upcast_norms

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_weights_are_cast_inside_and_the_same_tensors_afterwards(tied, name, tiny_model):
    model = tiny_model(tie_word_embeddings=tied)
    before, places = bits(model), [p.data_ptr() for p in model.parameters()]
    with generation_precision(model, name):
        assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}
        assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
        logits = model(IDS).logits
        assert logits.dtype == getattr(torch, name)
        # Casting a copy for good gives the same. Rotary frequencies stay float32.
        other = copy.deepcopy(model).to(getattr(torch, name))
        other.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
        assert torch.equal(logits, other(IDS).logits)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_weights_come_back_after_an_exception_inside(tiny_model):
    model = tiny_model()
    before = bits(model)
    with pytest.raises(KeyError), generation_precision(model, torch.bfloat16):
        raise KeyError("inside")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [None, "none", "float32", torch.float32])
def test_the_same_type_changes_nothing(dtype, tiny_model):
    model = tiny_model()
    places = [p.data_ptr() for p in model.parameters()]
    with generation_precision(model, dtype):
        assert [p.data_ptr() for p in model.parameters()] == places


def test_an_optimizer_goes_on_with_the_weights_it_knows(tiny_model):
    model, twin = tiny_model(), tiny_model()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    for _ in range(2):
        with generation_precision(model, "bfloat16"), torch.no_grad():
            model(IDS)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(IDS, labels=IDS).loss.backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_norms_compute_in_float32_inside_a_half_precision_model(tiny_model):
    model = tiny_model().bfloat16()
    names = list(model.state_dict())
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    assert upcast_norms(model) == 5  # two a layer, and the last
    norm = model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    assert norm.weight.dtype == torch.float32 and list(model.state_dict()) == names
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16 and seen == [(torch.bfloat16, torch.bfloat16)]
    # One norm against the formula in float32, rounded once at the end.
    hidden = torch.randn(3, 16).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
    wide = hidden.float()
    wanted = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
    assert torch.equal(norm(hidden), wanted.bfloat16())


def test_raised_norms_learn_survive_copies_and_are_raised_once(tiny_model):
    model = tiny_model().bfloat16()
    upcast_norms(model)
    assert upcast_norms(model) == 0
    twin = copy.deepcopy(model)
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    model(IDS, labels=IDS).loss.backward()
    grad = model.model.norm.weight.grad
    assert grad is not None and grad.dtype == torch.float32 and bool(grad.any())
    with generation_precision(model, "float16"):  # the raised layers follow their weights
        assert torch.isfinite(model(IDS).logits).all()


def test_layer_norms_are_raised_and_float32_models_left_alone(tiny_model):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).bfloat16()
    assert upcast_norms(model) == 1 and model[1].bias.dtype == torch.float32
    assert model(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16
    assert upcast_norms(tiny_model()) == 0
