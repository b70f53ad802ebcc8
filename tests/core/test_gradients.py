"""Gradients added up in place: those of autograd, in memory that stays."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlx.core import gradients, update
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


def backward(model: Any, *parts: Sequences, buffers: GradientBuffers | None = None) -> dict[str, Tensor]:
    """Gradients of a few micro-batches, copied."""
    for sequences in parts:
        found = score(model, sequences, entropy=True, buffers=buffers)
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
            got = backward(model, *batches, buffers=buffers)
        assert_same(got, want)


def test_the_memory_stays(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    buffers, seen = GradientBuffers([model], list(model.parameters())), []
    for seed in range(3):
        model.zero_grad(set_to_none=True)
        with buffers.attached():
            backward(model, batch(seed), batch(seed + 9), buffers=buffers)
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
            score(model, few[1], buffers=buffers).logps.sum().backward()
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
    for options in ({}, {"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        table = nn.Embedding(4, 4, **options)  # type: ignore[arg-type]
        assert bool(GradientBuffers([nn.Sequential(table)], [table.weight]).embeddings) == (not options)
    table = nn.Embedding(4, 4)
    table.forward = lambda ids: ids  # type: ignore[method-assign]
    assert not GradientBuffers([nn.Sequential(table)], [table.weight]).embeddings


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

    def logps(into: Tensor | None) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found: Tensor = head_logps(hidden, leaf, None, targets, into=into)[0]
        return found.sum()

    want = torch.autograd.grad(logps(None), leaf)[0]
    there = leaf.grad = torch.ones_like(leaf)
    logps(there).backward()
    assert leaf.grad is there
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(leaf.grad - 1, want, **close)
    last = logps(there)
    leaf.grad = None  # somebody has zeroed the gradients in between
    last.backward()
    torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cast", [False, True])
def test_who_asks_autograd_for_a_gradient_gets_it(tiny_model: Callable[..., Any], cast: bool) -> None:
    """As a loss that weighs its terms by their gradients does; what has been added up stays as it is."""
    model = tiny_model()
    buffers = GradientBuffers([model], list(model.parameters()))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    middle = model.model.layers[0].mlp.down_proj.weight

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            return score(model, batch(), buffers=buffers).logps.sum()

    three = [embedding, head, middle]
    want = torch.autograd.grad(loss(), three)
    with buffers.attached():
        total = loss()
        for asked in ([middle], [head], [embedding], three):
            found = torch.autograd.grad(total, asked, retain_graph=True)
            for mine, one in zip(found, asked, strict=True):
                place = next(i for i, other in enumerate(three) if other is one)
                torch.testing.assert_close(mine, want[place])
            assert embedding.grad is not None and head.grad is not None
            assert not embedding.grad.any() and not head.grad.any()
        total.backward(inputs=[middle], retain_graph=True)
        assert not embedding.grad.any() and not head.grad.any()
        total.backward()
        torch.testing.assert_close(embedding.grad, want[0])
        torch.testing.assert_close(head.grad, want[1], rtol=1e-5, atol=0.02 if cast else 1e-6)


def _first_rows_to_zero(weight: Tensor) -> None:
    assert weight.grad is not None
    weight.grad[:30] = 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("when", ["first", "after"])
def test_hooks_on_a_gradient_see_all_of_it(tiny_model: Callable[..., Any], tied: bool, when: str) -> None:
    """The usual way to train some rows of the vocabulary alone."""
    model = tiny_model(tie_word_embeddings=tied)
    buffers = GradientBuffers([model], list(model.parameters()))
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for weight in dict.fromkeys(weights):
        if when == "first":
            weight.register_hook(lambda grad: grad * (torch.arange(32) >= 30)[:, None])
        else:
            weight.register_post_accumulate_grad_hook(_first_rows_to_zero)
    with buffers.attached():
        backward(model, batch(0), batch(1), buffers=buffers)
        assert all(buffers.of(weight) is None for weight in weights)
    for weight in weights:
        assert weight.grad is not None
        assert not weight.grad[:30].any() and weight.grad[30:].any()


def test_what_has_been_put_around_an_embedding_since_stays(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    buffers, table = GradientBuffers([model], list(model.parameters())), model.get_input_embeddings()
    inner = table.forward

    def theirs(input: Tensor) -> Tensor:
        return inner(input) + 1

    table.forward = theirs
    with buffers.attached():
        assert vars(table)["forward"] is theirs
        want = table(torch.tensor([3]))
    assert vars(table)["forward"] is theirs and torch.equal(table(torch.tensor([3])), want)


def test_sums_over_processes_stay_where_the_gradients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as views of the message, which would keep all of it; messages of at most 24 bytes here."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3,), (1, 5))]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    places = [parameter.grad.data_ptr() for parameter in parameters if parameter.grad is not None]
    sizes: list[int] = []

    def twice(_: Any, flat: Tensor) -> Tensor:
        """As if another process had the same gradients."""
        sizes.append(flat.nbytes)
        return flat * 2

    monkeypatch.setattr(update, "MESSAGE", 24)
    monkeypatch.setattr(update, "total", twice)
    update.sum_gradients(parameters, SimpleNamespace(num_processes=2))  # type: ignore[arg-type]
    assert sizes == [16, 12, 20]
    for number, (parameter, place) in enumerate(zip(parameters, places, strict=True)):
        assert parameter.grad is not None and parameter.grad.data_ptr() == place
        assert parameter.grad.flatten().tolist() == [2.0 * (number + 1)] * parameter.numel()


class TestOfARun:
    """Through the updater: the buffers are what a run's optimizer sees."""

    @pytest.fixture
    def run(self, started: Callable[..., Any]) -> Any:
        """One that samples and updates with PPO, a policy and a value head."""
        return started(optim="sgd", max_tokens_per_micro_batch=40, lora_r=0)

    def gradients(self, run: Any, batch: Any) -> dict[str, Tensor]:
        run.updater.accumulate(batch, run.updater.sizes(batch))
        found = {name: p.grad.clone() for name, p in run.updater.parameters.items() if p.grad is not None}
        return found

    def test_gradients_are_autograds_and_the_memory_stays(self, run: Any) -> None:
        batch, updater = run.prepare(run.roll_out()), run.updater
        buffers, asked = updater.buffers, []
        assert len(buffers.weights) >= 1 and len(updater.micro_batches(batch)) > 1
        inner = buffers.of
        buffers.of = lambda weight: asked.append(inner(weight)) or asked[-1]
        got, places = self.gradients(run, batch), []
        assert len(asked) == len(updater.micro_batches(batch))
        assert all(one is run.policy.model.get_output_embeddings().weight.grad for one in asked)
        for _ in range(2):
            places.append([weight.grad.data_ptr() for weight in buffers.weights])
            updater.optimizer.zero_grad(set_to_none=True)
            again = self.gradients(run, batch)
        assert places[0] == places[1] and all(torch.equal(again[name], got[name]) for name in got)
        updater.buffers = GradientBuffers([], [])
        updater.optimizer.zero_grad(set_to_none=True)
        assert_same(got, self.gradients(run, batch))

    def test_nothing_stays_attached_after_a_step(self, run: Any) -> None:
        batch = run.prepare(run.roll_out())
        run.update(batch)
        assert all(p.grad is None for p in run.updater.parameters.values())
        assert not any("forward" in vars(module) for module in run.policy.model.modules())


def test_the_estimate_counts_them_as_staying(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    report = estimate(model, Settings(), token_budget=16, generation_rows=2)
    every = sum(p.nbytes for p in model.parameters())
    assert report.parts["kept gradients"] == 2 * 32 * 16 * 4
    assert report.parts["gradients"] + report.parts["kept gradients"] == every
    assert report.loaded == report.parts["weights"]
