"""What ``prepare`` sees, batches for it, a loss put together as the loop does it, cases of all algorithms."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlx.testing.data import FORMS, row


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


# Every algorithm, and its variants whose loss looks at more than one row or counts in another way.
CASES: dict[str, dict[str, Any]] = {
    "ppo": {"num_mini_batches": 1, "num_ppo_epochs": 2, "vf_coef": 0.5},
    "ppo adapter": {"num_mini_batches": 1, "num_ppo_epochs": 2, "lora_r": 4},
    "rloo": {"num_iterations": 2},
    "rloo normalised": {"num_iterations": 2, "normalize_advantages": True, "missing_eos_penalty": 0.1},
    **{
        f"grpo {kind}": {"loss_type": kind, "num_iterations": 2, "num_generations": 2}
        for kind in ("grpo", "bnpo", "dapo", "dr_grpo")
    },
    "grpo cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2, "num_generations": 2},
    "grpo sequence": {
        "importance_sampling_level": "sequence", "scale_rewards": "batch", "beta": 0.1, "num_generations": 2,
        "num_iterations": 2,
    },
    "grpo entropy": {
        "top_entropy_quantile": 0.5, "entropy_coef": 0.01, "num_iterations": 2, "num_generations": 2,
        "off_policy_mask_threshold": 1.0,
    },
    "online_dpo": {},
    "online_dpo ipo": {"loss_type": "ipo", "beta": 1.0, "num_generations": 3},
    "dpo": {},
    "dpo adapter": {"lora_r": 4},
    "dpo aot": {"loss_type": ["aot"]},
    "dpo aot_unpaired": {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1},
    "dpo sft": {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
    "dpo weighted": {"use_weighting": True, "beta": 2.0},
    "kto": {},
    "kto apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "orpo": {},
    "cpo": {},
    "cpo simpo": {"loss_type": "simpo"},
    "sft": {},
    "sft dft": {"loss_type": "dft"},
    "sft packing": {"packing": True, "max_length": 96},
    "reward": {"center_rewards_coefficient": 0.01},
    "reward adapter": {"lora_r": 4},
}  # fmt: skip
EATS = {
    "prompts": ("ppo", "rloo", "grpo", "online_dpo"),
    "pairs": ("dpo", "orpo", "cpo", "reward"),
    "labeled": ("kto",),
    "demonstrations": ("sft",),
}
ALGORITHMS = {algo: eats for eats, algorithms in EATS.items() for algo in algorithms}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with training and evaluation data of every form."""
    folder = tmp_path_factory.mktemp("data")
    for form in FORMS:
        for name, numbers in (("train", range(9)), ("eval", range(20, 25))):
            lines = [json.dumps(row(number, form)) for number in numbers]
            (folder / f"{form}, {name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def of(files: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Options of two steps of four rows, of a case or an algorithm; keywords change them, ``...`` removes."""
    import torch

    torch.set_num_threads(1)

    def options(case: str, form: str | None = None, **changes: Any) -> dict[str, Any]:
        algo = case.split()[0]
        eats = ALGORITHMS[algo]
        form = form or next(one for one in FORMS if one.startswith(eats))
        given: dict[str, Any] = {
            "algo": algo, "seed": 5, "batch_size": 4, "max_steps": 2, "max_length": 128,
            "dataset": str(files / f"{form}, train.jsonl"), "learning_rate": 1e-3,
            "output_dir": str(tmp_path / "run"), "logging_steps": 1, "log_completions": 0, "plots": False,
            "progress": "none", "mixed_precision": "no",
        }  # fmt: skip
        if eats == "prompts":
            given |= {
                "reward": "rlx.testing.data:ranked",
                "max_completion_length": 8,
                "max_length": ...,
            }
            given |= {} if algo == "ppo" else {"num_generations": 2}
        given |= CASES.get(case, {}) | changes
        return {name: value for name, value in given.items() if value is not ...}

    return options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of ``case``, ``algo`` or ``fed`` run for every one of them."""
    fed = [
        (algo, form, adapter)
        for number, form in enumerate(FORMS)
        for algo in EATS[form.split(",")[0]]
        for adapter in (False, True)
        # Where there are two forms of text and two of messages, one of each is enough.
        if algo not in EATS["pairs"] + EATS["demonstrations"] or adapter == (number % 4 in (1, 2))
    ]
    if "test_every" not in metafunc.module.__name__:
        return
    for name, values in (("case", list(CASES)), ("algo", list(ALGORITHMS)), ("fed", fed)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=lambda v: v if isinstance(v, str) else named(*v))


def named(algo: str, form: str, adapter: bool) -> str:
    """The name of a test of ``fed``."""
    return f"{algo}, {'adapter' if adapter else 'full'}, {form}"


@pytest.fixture(scope="session")
def cases() -> list[str]:
    """The names of all cases."""
    return list(CASES)
