"""transformers' own ``generate`` as a generator: the plain peer of ``native``, with the same draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlx.plugins.contract import Completions, Sampling
from rlx.plugins.telling import OnComplete

if TYPE_CHECKING:
    from rlx.core.models import Policy


class Plain:
    """``model.generate`` on the live policy, without shared prompts and dropped rows."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to choose."""

    def __init__(self, config: Any) -> None:
        self.policy: Policy | None = None

    def sync(self, policy: Any) -> None:
        """Sample from this policy; its weights are read where they are."""
        self.policy = policy

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        on_complete: OnComplete | None = None,
    ) -> Completions:
        """Sample n completions of each prompt; see ``rlx.core.generation.generate``."""
        if self.policy is None:
            raise RuntimeError("a generator samples only after sync(policy)")
        options = {
            "tokenizer": self.policy.tokenizer,
            "batch_size": sampling.batch_size,
            "on_complete": on_complete,
        }
        return self.sample(self.policy.model, prompts, n, sampling, seeds, **options)

    def sample(self, *args: Any, **options: Any) -> Completions:
        """The call itself, of a policy that is there."""
        from rlx.core.generation import generate

        return generate(*args, **options, plain=True)

    def close(self) -> None:
        """Let go of the policy."""
        self.policy = None
