"""What ``prepare`` sees, batches for it, and a loss put together as the loop does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


class Alone:
    """What ``prepare`` sees when there is one process; entropies are those given."""

    def __init__(self, entropy: Any = None, longest: int = 16, weights: Mapping[str, float] = {}) -> None:
        self.entropy, self.max_completion_length, self.reward_weights = entropy, longest, weights

    def __call__(self, sequences: Any, model: str = "policy", needs: Any = ()) -> Any:
        from rlx.core.batch import Scores

        assert model == "policy" and set(needs) == {"entropy"} and self.entropy is not None
        return Scores(self.entropy, entropy=self.entropy)

    def total(self, values: Any) -> Any:
        return values


@pytest.fixture(scope="session")
def alone() -> type[Alone]:
    """Makes ``Alone`` reachable from test modules, which cannot import each other."""
    return Alone


@pytest.fixture(scope="session")
def rollouts() -> Callable[..., Any]:
    """Random rollouts: tokens and scores of each completion given, old and reference log-probs drawn."""
    import torch

    from rlx.core.batch import Prompts, Rollouts, Sequences

    def make(
        counts: Sequence[int], score: Sequence[float], groups: Sequence[int] | None = None, **more: Any
    ) -> Rollouts:
        n, total = len(counts), sum(counts)
        draw = torch.Generator().manual_seed(n + total)
        old = -torch.rand(total, generator=draw) - 0.1
        values: dict[str, Any] = {
            "finished": torch.ones(n, dtype=torch.bool),
            "old": old,
            "reference": old + 0.3 * torch.randn(total, generator=draw),
            "rewards": {},
        }
        values |= {name: torch.tensor(x) if isinstance(x, list) else x for name, x in more.items()}
        return Rollouts(
            Sequences.from_lists([[1]] * n, [[2] * c for c in counts], groups),
            prompts=Prompts([[1]] * n, ["p"] * n, [None] * n, {}, list(range(n))),
            texts=["t"] * n,
            score=torch.tensor(score, dtype=torch.float32),
            **values,
        )

    return make


@pytest.fixture(scope="session")
def value_and_gradient() -> Callable[..., Any]:
    """The loss of a batch and its gradient in the log-probs, in one micro-batch or in several."""
    import torch

    from rlx.core.batch import Scores, flat_index

    def run(
        algorithm: Any,
        batch: Any,
        logps: Any,
        parts: Sequence[Sequence[int]] | None = None,
        **more: Any,
    ) -> tuple[Any, Any]:
        leaf = logps.detach().clone().requires_grad_()
        sizes = {by: algorithm.size(batch, by).clamp(min=1) for by in algorithm.loss_per}
        value = torch.zeros((), dtype=torch.float64)
        for rows in [range(len(batch))] if parts is None else parts:
            index = torch.tensor([r * batch.per_row + i for r in rows for i in range(batch.per_row)])
            tokens = flat_index(batch.sequences.counts, index)
            now = Scores(leaf[tokens], **{name: x[tokens] for name, x in more.items()})
            loss = algorithm.loss(batch.take(torch.tensor(list(rows))), now)
            assert set(loss.terms) == set(algorithm.loss_per)
            part = sum(terms.sum() / sizes[by] for by, terms in loss.terms.items())
            part.backward()
            value = value + part.detach()
        return value.float(), leaf.grad

    return run
