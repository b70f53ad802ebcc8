"""A run as callbacks see it: real settings, a real run folder, real rollouts; no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


def build_rollouts(
    texts: list[str], *, prompt: str = "What is 3 + 4?", scores: list[float] | None = None
) -> Any:
    """One completion a text, each of a prompt of its own."""
    import torch

    from rlx.core.batch import Prompts, Rollouts, Sequences

    n = len(texts)
    score = torch.tensor(scores if scores is not None else [1.0] * n)
    return Rollouts(
        Sequences.from_lists([[1, 2]] * n, [[3]] * n),
        prompts=Prompts([[1, 2]] * n, [prompt] * n, [None] * n, {}, list(range(n))),
        texts=texts,
        finished=torch.tensor([True] * n),
        score=score,
        rewards={"exact_match": score},
    )


@pytest.fixture
def make_run(tmp_path):
    """A function that makes a run; what it says is in ``run.said``."""
    from rlx.core.config import from_mapping
    from rlx.core.folder import RunFolder

    folders = []

    def make(**options: Any) -> Any:
        config = from_mapping({"algo": "ppo", "reward": ["exact_match"], **options})
        folder = RunFolder.create(tmp_path / f"run-{len(folders)}" if folders else tmp_path / "run")
        folders.append(folder)
        said: list[str] = []
        run = SimpleNamespace(
            config=config, folder=folder, global_step=10, total_steps=45, metrics_history=[], rollouts=None,
            evaluated=None, is_main=True, printers=[said.append], said=said,
            policy=SimpleNamespace(model=object()), final_checkpoint=None, eval_data=None, stop_reason="",
        )  # fmt: skip
        run.say = lambda line: run.printers[-1](line)
        run.stop = lambda reason: setattr(run, "stop_reason", run.stop_reason or reason)
        return run

    yield make
    for folder in folders:
        folder.close()


@pytest.fixture
def rollouts():
    """The function ``build_rollouts``."""
    return build_rollouts
