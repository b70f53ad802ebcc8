"""The default generator: rlx's own decode loop on the live policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlx.core.options import opt
from rlx.plugins.contract import Completions, Sampling

if TYPE_CHECKING:
    from rlx.core.models import Policy


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Options of the generators that run the policy in this process."""

    generation_batch_size: int | None = opt(
        None, "completions sampled at a time (default: as many as memory allows)", gt=0
    )


class Native:
    """Shared prompts, finished rows dropped, log-probs recorded: see ``rlx.core.generation``."""

    Config: ClassVar[type] = GeneratorConfig
    plain: ClassVar[bool] = False

    def __init__(self, config: GeneratorConfig) -> None:
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
            batch_size=self.config.generation_batch_size,
            plain=self.plain,
        )

    def close(self) -> None:
        """Let go of the policy."""
        self.policy = None
