"""The default generator: rlx's own decode loop on the live policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rlx.plugins.contract import Completions, NoOptions, Sampling

if TYPE_CHECKING:
    from rlx.core.models import Policy


class Native:
    """Shared prompts, finished rows dropped, log-probs recorded: see ``rlx.core.generation``."""

    Config: ClassVar[type] = NoOptions
    plain: ClassVar[bool] = False

    def __init__(self, config: NoOptions) -> None:
        self.config = config
        self.policy: Policy | None = None

    def sync(self, policy: Any) -> None:
        """Sample from this policy; its weights are read where they are."""
        self.policy = policy

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Completions:
        """Sample n completions of each prompt; see ``rlx.core.generation.generate``."""
        from rlx.core.generation import generate

        if self.policy is None:
            raise RuntimeError("a generator samples only after sync(policy)")
        return generate(
            self.policy.model,
            prompts,
            n,
            sampling,
            seeds,
            tokenizer=self.policy.tokenizer,
            batch_size=sampling.batch_size,
            plain=self.plain,
        )

    def close(self) -> None:
        """Let go of the policy."""
        self.policy = None
