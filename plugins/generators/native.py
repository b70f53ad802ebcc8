"""The default generator: rlx's own decode loop on the live policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Completions
from rlx.plugins.generators.plain import Plain

if TYPE_CHECKING:
    from rlx.core.cuda_graphs import GraphGenerator


class Native(Plain):
    """Shared prompts, finished rows dropped, log-probs recorded: see ``rlx.core.generation``."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ``native``."""

        packed_weights: bool = opt(True, "lay weights out for products of few rows while sampling, on a CPU")
        cuda_graphs: bool = opt(False, "replay a captured decode step; CUDA only")

    def __init__(self, config: Native.Config) -> None:
        super().__init__(config)
        self.config = config
        self.graphs: GraphGenerator | None = None

    def sync(self, policy: Any) -> None:
        """Sample from this policy; its weights are read where they are.

        Raises:
            ConfigError: CUDA graphs are asked for, and there are none here.
        """
        if self.config.cuda_graphs and self.graphs is None:
            device = policy.base.device
            if device.type != "cuda":
                raise ConfigError(
                    "there are no CUDA graphs here to replay",
                    code="E-CONFIG-CONFLICT",
                    got=f"cuda_graphs: true, device {device}",
                    expected="generator native on a CUDA device",
                    hint="leave cuda_graphs out",
                )
            from rlx.core.cuda_graphs import GraphGenerator

            self.graphs = GraphGenerator()
        super().sync(policy)

    def sample(self, *args: Any, **options: Any) -> Completions:
        """The call itself: captured steps, or those of the loop."""
        from rlx.core.generation import generate

        if self.graphs is not None:
            return self.graphs.generate(*args, **options)
        return generate(*args, **options, packed_weights=self.config.packed_weights)

    def close(self) -> None:
        """Let go of the policy, and of what was captured."""
        super().close()
        if self.graphs is not None:
            self.graphs.release()
            self.graphs = None
