"""The chunked head against full logits, in values, gradients, rows computed and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlx.core import lm_head
from rlx.core.lm_head import head_logps, module_logps

K, V, D = 23, 41, 12


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float |
    None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits = nn.functional.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = torch.log_softmax(logits / temperature, -1)
    return logps[torch.arange(len(targets)), targets], -(logps.exp() * logps).sum(-1)


def inputs(seed: int = 0, *, bias: bool = True, dtype: torch.dtype = torch.float32, k: int = K) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in ((k, D), (V, D), (V,))]
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    return [*leaves[:2], leaves[2] if bias else None, torch.randint(V, (k,), generator=generator)]


def gradients(outputs: tuple[Tensor, Tensor | None], leaves: list[Any], seed: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs if x is not None)
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(total, wanted))


@pytest.mark.parametrize("keep", [True, False, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 0.25)])
def test_equals_full_logits(
    keep: bool | None, bias: bool, softcap: float | None, temperature: float, scale: float
) -> None:
    args = inputs(bias=bias)
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "scale": scale}
    want = naive(*args, **options)
    got = head_logps(*args, **options, entropy=True, chunk_bytes=5 * V * 4, keep=keep)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(got, args), gradients(want, args), rtol=1e-5, atol=2e-6)
    logps, none = head_logps(*args, **options, chunk_bytes=5 * V * 4, keep=keep)
    assert none is None
    torch.testing.assert_close(logps, want[0], rtol=1e-5, atol=1e-6)
    want_logps = naive(*args, **options)[0]
    torch.testing.assert_close(
        gradients((logps, None), args), gradients((want_logps, None), args), rtol=1e-5, atol=2e-6
    )


@given(
    k=st.integers(0, 9), rows=st.integers(1, 12), temperature=st.floats(0.1, 5), scale=st.floats(0.05, 4),
    softcap=st.none() | st.floats(1, 50), keep=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_chunking_never_shows(
    k: int, rows: int, temperature: float, scale: float, softcap: float | None, keep: bool, seed: int
) -> None:
    """Values and gradients do not depend on the chunks, nor on keeping or recomputing."""
    args = inputs(seed, k=k)
    options: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "scale": scale,
        "entropy": True,
    }
    one = head_logps(*args, **options, keep=True)
    cut = head_logps(*args, **options, chunk_bytes=rows * V * 4, keep=keep)
    torch.testing.assert_close(cut, one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(cut, args), gradients(one, args), rtol=1e-4, atol=1e-4)


def test_keep_and_recompute_give_the_same_bits() -> None:
    args = inputs()
    both = [
        head_logps(*args, softcap=5.0, entropy=True, chunk_bytes=7 * V * 4, keep=k) for k in (True, False)
    ]
    for kept, again in zip(gradients(both[0], args), gradients(both[1], args), strict=True):
        assert torch.equal(kept, again)


def test_backward_twice_through_kept_logits() -> None:
    args = inputs()
    logps, _ = head_logps(*args, keep=True)
    first = torch.autograd.grad(logps.sum(), args[0], retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(logps.sum(), args[0])[0])


def test_gradcheck_in_each_input() -> None:
    """Finite differences of the float32 function, so only to 1e-2; the sign and every term must be there."""
    args = inputs(k=3)
    loss: Callable[[], Tensor] = lambda: sum(  # noqa: E731
        x.double().sum() for x in head_logps(*args, softcap=4.0, temperature=1.5, entropy=True)
    )
    for leaf in args[:3]:
        (grad,) = torch.autograd.grad(loss(), leaf)
        with torch.no_grad():
            spot, step = leaf.view(-1), 1e-2
            for i in range(0, leaf.numel(), 7):
                spot[i] += step
                up = loss()
                spot[i] -= 2 * step
                down = loss()
                spot[i] += step
                assert float((up - down) / (2 * step)) == pytest.approx(
                    float(grad.view(-1)[i]), abs=1e-2, rel=1e-2
                )


def test_half_precision_reduces_in_float32() -> None:
    """bf16 products, float32 softmax: equal to the naive order of dtypes; gradients to a few units in 2⁻⁸."""
    args = inputs(dtype=torch.bfloat16, bias=False)
    got = head_logps(*args, entropy=True, chunk_bytes=5 * V * 4)
    want = naive(*args, temperature=1.0, softcap=None, scale=1.0)
    assert got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients(got, args), gradients(want, args), strict=True):
        assert x.dtype == torch.bfloat16
        assert float((x - y).float().norm() / y.float().norm()) < 2**-7


def test_weight_gradient_of_many_chunks_is_summed_in_float32() -> None:
    """128 chunks of equal rows: bf16 sums stop growing once an addend is below half a last place."""
    hidden, weight = torch.ones(1024, D).bfloat16(), torch.zeros(V, D).bfloat16().requires_grad_()
    targets = torch.zeros(1024, dtype=torch.long)
    logps, _ = head_logps(hidden, weight, None, targets, chunk_bytes=8 * V * 4)
    logps.sum().backward()
    # Uniform distribution: row 0 gains 1 − 1/V a token, every other row loses 1/V.
    torch.testing.assert_close(
        weight.grad[0].float(), torch.full((D,), 1024 * (1 - 1 / V)), rtol=2**-8, atol=0
    )
    torch.testing.assert_close(weight.grad[1].float(), torch.full((D,), -1024 / V), rtol=2**-7, atol=0)


def test_autocast_runs_the_products_in_its_dtype_forward_and_backward() -> None:
    args = inputs(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head_logps(*args, chunk_bytes=5 * V * 4, keep=False)
        want = naive(*args, temperature=1.0, softcap=None, scale=1.0)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients(got, args), gradients((want[0], None), args), strict=True):
        assert x.dtype == torch.float32
        assert float((x - y).norm() / y.norm()) < 2**-7


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, targets = inputs()
    logps, _ = head_logps(hidden, weight.detach(), None, targets)
    (got,) = torch.autograd.grad(logps.sum(), hidden)
    (want,) = torch.autograd.grad(naive(hidden, weight, None, targets, 1.0, None, 1.0)[0].sum(), hidden)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Adapted(nn.Module):
    """A head with a low-rank adapter and dropout, which only a call of the module can apply."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            nn.Linear(D, V),
            nn.Linear(D, 2, bias=False),
            nn.Linear(2, V, bias=False),
        )
        self.dropout, self.calls = nn.Dropout(dropout), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x)
        return self.base(x) + self.up(self.down(self.dropout(x)))


@pytest.mark.parametrize(("keep", "calls"), [(True, K), (False, 2 * K)])
def test_a_head_that_is_a_module(keep: bool, calls: int) -> None:
    hidden, _, _, targets = inputs()
    head = Adapted(0.0)
    leaves = [hidden, *head.parameters()]
    logps = torch.log_softmax(3.0 * torch.tanh(head(hidden) * 0.5 / 3.0) / 0.7, -1)
    want = (logps[torch.arange(K), targets], -(logps.exp() * logps).sum(-1))
    want_gradients = gradients(want, leaves)
    head.calls = 0
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 3.0, "scale": 0.5, "entropy": True}
    got = module_logps(head, hidden, targets, V, **options, chunk_bytes=5 * V * 4, keep=keep)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(got, leaves), want_gradients, rtol=1e-5, atol=2e-6)
    assert head.calls == calls


def test_recomputing_a_module_repeats_its_dropout() -> None:
    hidden, _, _, targets = inputs()
    head = Adapted(0.5)
    results = []
    for keep in (True, False):
        torch.manual_seed(3)
        logps, _ = module_logps(head, hidden, targets, V, chunk_bytes=5 * V * 4, keep=keep)
        results.append([logps.detach(), *gradients((logps, None), [hidden, *head.up.parameters()])])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def test_no_row() -> None:
    args = inputs(k=0)
    logps, entropy = head_logps(*args, entropy=True)
    assert logps.shape == entropy.shape == (0,)
    assert [float(g.abs().sum()) for g in gradients((logps, entropy), args)] == [0, 0, 0]
    logps, none = module_logps(nn.Linear(D, V), args[0], args[3], V)
    assert logps.shape == (0,)
    assert none is None


def test_free_memory_decides_whether_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs()
    saved: list[bool] = []
    for free in (4 * K * V * 4, 4 * K * V * 4 - 4):  # a quarter of it holds the logits exactly, or not quite
        monkeypatch.setattr(lm_head, "free_bytes", lambda device, free=free: free)
        logps, _ = head_logps(*args)
        saved.append(logps.grad_fn.kept is not None and logps.grad_fn.kept.shape == (K, V))
        logps.sum().backward()
        assert logps.grad_fn.kept is None  # used up
    assert saved == [True, False]


class Largest(TorchDispatchMode):
    """Watches every operation: the largest tensor made, and rows multiplied with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.rows = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        if func.overloadpacket is torch.ops.aten.mm and out.shape[1] == self.vocabulary:
            self.rows += out.shape[0]
        return out

    vocabulary = 4096


def test_recomputing_never_holds_all_logits_and_computes_each_row_twice() -> None:
    rows, vocabulary = 256, Largest.vocabulary
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight, targets = torch.randn(vocabulary, 8, requires_grad=True), torch.zeros(rows, dtype=torch.long)
    with Largest() as watch:
        logps, entropy = head_logps(
            hidden, weight, None, targets, entropy=True, chunk_bytes=16 * vocabulary * 4, keep=False
        )
        assert watch.rows == rows
        (logps.sum() + entropy.sum()).backward()
    assert watch.rows == 2 * rows
    assert watch.numbers == 16 * vocabulary  # a chunk; all logits would be 16 times that


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_extras_equal_full_logits_and_change_nothing_else(
    entropy: bool, keep: bool, softcap: float | None
) -> None:
    args = inputs()
    args[3][:5] = naive_logits(args, softcap).argmax(-1)[:5]  # some targets are the most likely token
    options: dict[str, Any] = {"temperature": 0.7, "softcap": softcap, "keep": keep, "entropy": entropy}
    options["chunk_bytes"] = 5 * V * 4
    plain = head_logps(*args, **options)
    *same, square, correct = head_logps(*args, **options, extras=("square", "correct"))
    assert torch.equal(same[0], plain[0])
    for x, y in zip(gradients(tuple(same), args), gradients(plain, args), strict=True):
        assert torch.equal(x, y)
    logits = naive_logits(args, softcap) / 0.7
    assert correct.dtype == torch.bool and not square.requires_grad and correct[:5].all()
    assert torch.equal(correct, logits.argmax(-1) == args[3])
    torch.testing.assert_close(square, logits.softmax(-1).square().sum(-1).log(), rtol=1e-5, atol=1e-6)
    module = nn.Linear(D, V)
    module.weight, module.bias = nn.Parameter(args[1].detach()), nn.Parameter(args[2].detach())
    found = module_logps(module, args[0], args[3], V, **options, extras=("square", "correct"))
    torch.testing.assert_close(found[2], square, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[3], correct)


def naive_logits(args: list[Any], softcap: float | None) -> Tensor:
    logits = nn.functional.linear(args[0], args[1], args[2]).detach()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def test_the_square_of_a_near_certain_distribution_stays_finite() -> None:
    """Logits 0 and 200: p of one is e⁻²⁰⁰, whose square is no float32; log Σ p² is 0 all the same."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[200.0], [0.0]])
    logps, _, square = head_logps(hidden, weight, None, torch.tensor([1]), extras=("square",))
    assert float(logps) == -200
    assert float(square) == 0


def test_an_entropy_that_only_a_metric_reads_does_not_change_the_gradient() -> None:
    args = inputs()
    plain, _ = head_logps(*args)
    logps, entropy = head_logps(*args, entropy=True)
    assert entropy is not None
    for x, y in zip(gradients((logps, None), args), gradients((plain, None), args), strict=True):
        assert torch.equal(x, y)
    (only,) = torch.autograd.grad(head_logps(*args, entropy=True)[1].sum(), args[0])
    (want,) = torch.autograd.grad(naive(*args, 1.0, None, 1.0)[1].sum(), args[0])
    torch.testing.assert_close(only, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_targets_that_all_but_never_come(keep: bool, softcap: float | None, temperature: float) -> None:
    """Logits from −100 to 100: most p are 0 in float32, the target's own too; no gradient is lost or NaN.

    At temperature 0.1 the soft cap lets 600 between the largest logit and the target's.
    """
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.linspace(-100, 100, 9)[:, None].requires_grad_()
    targets = torch.tensor([0, 8])  # of 9 the least likely
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = torch.log_softmax(logits / temperature, -1)
    want = logps[[0, 1], targets], -(logps.exp() * logps).sum(-1)
    for place, theirs in enumerate(want):
        # Once more each time: what was kept is used up by the first backward pass.
        mine = head_logps(hidden, weight, None, targets, **options, entropy=True, keep=keep)[place]
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
        found = torch.autograd.grad(mine.sum(), [hidden, weight])
        wanted = torch.autograd.grad(theirs.sum(), exact, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_probs_may_be_changed_in_place(softcap: float | None) -> None:
    """As a loss does that masks some of them."""
    args = inputs()
    logps = head_logps(*args, softcap=softcap)[0]
    logps[:3] = 0
    want = naive(*args, 1.0, softcap, 1.0)[0][3:].sum()
    torch.testing.assert_close(
        torch.autograd.grad(logps.sum(), args[:3]), torch.autograd.grad(want, args[:3]), rtol=1e-5, atol=2e-6
    )
