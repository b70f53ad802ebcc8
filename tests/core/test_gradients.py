"""Gradients added up in place: those of autograd, in memory that stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlx.core import gradients
from rlx.core.batch import Sequences
from rlx.core.gradients import GradientBuffers
from rlx.core.lm_head import head_logps
from rlx.core.logprobs import score
from rlx.core.memory import estimate
from rlx.core.settings import Settings


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights count as large."""
    monkeypatch.setattr(gradients, "LEAST_BYTES", 0)


def batch(seed: int = 0, rows: int = 4) -> Sequences:
    random = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(32, (count,), generator=random).tolist()

    return Sequences.from_lists([draw(5) for _ in range(rows)], [draw(4) for _ in range(rows)])


def backward(model: Any, *parts: Sequences) -> dict[str, Tensor]:
    """Gradients of a few micro-batches, copied."""
    for sequences in parts:
        found = score(model, sequences, entropy=True, in_place=True)
        assert found.entropy is not None
        (found.logps * torch.linspace(-1, 2, len(found.logps)) + found.entropy).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert float((got[name] - want[name]).norm()) <= 1e-5 * float(want[name].norm()) + 1e-7, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_they_are_those_of_autograd(tiny_model: Callable[..., Any], tied: bool, parts: int) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    buffers = GradientBuffers([model, None], list(model.parameters()))
    assert len(buffers.weights) == 2 - tied
    batches = [batch(seed) for seed in range(parts)]
    want = backward(model, *batches)
    for _ in range(2):  # the second time the buffers have been used
        model.zero_grad(set_to_none=True)
        with buffers.attached():
            got = backward(model, *batches)
        assert_same(got, want)


def test_the_memory_stays(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    buffers, seen = GradientBuffers([model], list(model.parameters())), []
    for seed in range(3):
        model.zero_grad(set_to_none=True)
        with buffers.attached():
            backward(model, batch(seed), batch(seed + 9))
        seen.append([weight.grad.data_ptr() for weight in buffers.weights])
    assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2]
    assert buffers.size == 2 * 32 * 16 * 4


def test_autograd_makes_no_gradient_of_that_size(tiny_model: Callable[..., Any]) -> None:
    """What the buffers are for: no tensor of the weights' size is made while gradients are computed."""
    model = tiny_model(vocab_size=500)
    buffers = GradientBuffers([model], list(model.parameters()))

    few = [batch(seed, rows=3) for seed in range(2)]  # 12 scored tokens: no other tensor has the shape
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == (500, 16) and out.data_ptr() not in known:
                made.append(str(function))
            return out

    known = {p.data_ptr() for p in model.parameters()}
    backward(model, few[0])  # the first time a model is probed
    model.zero_grad(set_to_none=True)
    with Watch():
        backward(model, few[1])
    assert len(made) >= 2
    made.clear()
    model.zero_grad(set_to_none=True)
    with buffers.attached():
        known |= {weight.grad.data_ptr() for weight in buffers.weights}
        with Watch():
            score(model, few[1], in_place=True).logps.sum().backward()
    assert made == []


def test_a_gradient_that_nothing_was_added_to_is_none(tiny_model: Callable[..., Any]) -> None:
    """As with autograd: then the optimizer leaves the weight alone, or all gradients are made zeros."""
    model = tiny_model()
    buffers = GradientBuffers([model], list(model.parameters()))
    with buffers.attached():
        pass
    assert all(p.grad is None for p in model.parameters())
    with buffers.attached():
        model.get_input_embeddings()(torch.tensor([3])).sum().backward()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert head.grad is None and embedding.grad is not None
    assert embedding.grad[3].tolist() == [1.0] * 16 and float(embedding.grad.sum()) == 16


def test_forward_passes_are_put_back_even_by_an_error(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    buffers = GradientBuffers([model], list(model.parameters()))
    with pytest.raises(RuntimeError, match="on purpose"), buffers.attached():
        assert "forward" in vars(model.get_input_embeddings())
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(module) for module in model.modules())


@given(
    ids=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=4),
    padding=st.none() | st.integers(0, 6),
)
@settings(max_examples=50, deadline=None)
def test_rows_of_an_embedding(ids: list[list[int]], padding: int | None) -> None:
    """Any ids, repeated or not; the padding row learns nothing."""
    table = nn.Embedding(7, 5, padding_idx=padding)
    taken, weights = torch.tensor(ids), torch.randn(len(ids), 3, 5)
    want = torch.autograd.grad((table(taken) * weights).sum(), table.weight)[0]
    buffers = GradientBuffers([nn.Sequential(table)], [table.weight])
    with buffers.attached():
        before = table(taken)
        (before * weights).sum().backward()
        assert table.weight.grad is not None
        torch.testing.assert_close(table.weight.grad, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(before, table(taken))


def test_what_does_not_qualify(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    trained = list(model.parameters())

    def count() -> int:
        return len(GradientBuffers([model], trained).weights)

    assert count() == 2
    monkeypatch.setattr(gradients, "LEAST_BYTES", 32 * 16 * 4 + 1)
    assert count() == 0  # small
    monkeypatch.setattr(gradients, "LEAST_BYTES", 0)
    assert not GradientBuffers([model], trained[1:-1]).weights  # frozen
    assert not GradientBuffers([model.to(torch.bfloat16)], trained).weights  # half precision
    model.float()
    scaled = tf.Gemma3TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    gemma = tf.AutoModelForCausalLM.from_config(scaled)
    found = GradientBuffers([gemma], list(gemma.parameters()))
    assert not found.embeddings  # its embedding does more than look up; its head is like any other
    assert [id(w) for w in found.weights] == [id(gemma.get_output_embeddings().weight)]
    assert not GradientBuffers([nn.Sequential(nn.Embedding(4, 4, max_norm=1.0))], trained).embeddings


def test_adapters_have_no_use_for_them(tiny_model: Callable[..., Any]) -> None:
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert not GradientBuffers([model], [p for p in model.parameters() if p.requires_grad]).weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_adds_to_what_is_there(dtype: torch.dtype) -> None:
    """Under autocast too, where the weight is cast and its gradient is still float32."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 5, generator=random), torch.randn(13, 5, generator=random)
    targets = torch.randint(13, (9,), generator=random)
    leaf = weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        want = torch.autograd.grad(head_logps(hidden, leaf, None, targets)[0].sum(), leaf)[0]
        leaf.grad = torch.ones_like(leaf)
        there = leaf.grad
        head_logps(hidden, leaf, None, targets, in_place=True)[0].sum().backward()
    assert leaf.grad is there
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(leaf.grad - 1, want, **close)
    leaf.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        head_logps(hidden, leaf, None, targets, in_place=True)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-6)  # none there: autograd's business


def test_the_estimate_counts_them_as_staying(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    report = estimate(model, Settings(), token_budget=16, generation_rows=2)
    every = sum(p.nbytes for p in model.parameters())
    assert report.parts["kept gradients"] == 2 * 32 * 16 * 4
    assert report.parts["gradients"] + report.parts["kept gradients"] == every
    assert report.loaded == report.parts["weights"]
