"""transformers' continuous batching as a generator: a paged cache, rows refilled as they are freed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Completions, Sampling
from rlx.plugins.telling import OnComplete

if TYPE_CHECKING:
    from rlx.core.models import Policy
    from rlx.core.settings import Settings

HINT = "use --generator native, which can"


class Paged:
    """Many prompts with completions of unlike lengths, on a GPU; see ``rlx.core.paged_generation``.

    The options are fields of transformers' ``ContinuousBatchingConfig``, by their own names.
    """

    @dataclass(frozen=True)
    class Config:
        """Options of paged."""

        max_memory_percent: float = opt(0.8, "share of the free memory that its cache may take", gt=0, le=1)
        max_batch_tokens: int | None = opt(
            None, "tokens of one step, prompts included; none: as many as there are, at most 8192", gt=0
        )
        page_size: int = opt(256, "tokens of a page of the cache", ge=4, unit="tokens")
        num_blocks: int | None = opt(
            None, "pages of each layer; none: for all completions at once, or what the memory allows", gt=0
        )
        use_cuda_graph: bool | None = opt(
            None, "capture steps as CUDA graphs; none: where attention is a flash kernel"
        )

    def __init__(self, config: Config) -> None:
        self.config = config
        self.policy: Policy | None = None

    def sync(self, policy: Any) -> None:
        """Sample from this policy; its weights are read where they are.

        Raises:
            ConfigError: on first sight of a model that continuous batching does not serve.
        """
        if policy is self.policy:
            return
        from rlx.core.paged_generation import why_not

        with policy.active() as model:
            reason = why_not(model, asdict(self.config))
        if reason is not None:
            raise ConfigError(
                f"generator 'paged' cannot sample from {type(policy.base).__name__}",
                code="E-CONFIG-CONFLICT",
                got=reason[:400],
                expected="full or sliding attention layers, and log-probs of a plain forward",
                hint=HINT,
            )
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
        """Sample n completions of each prompt; see ``rlx.core.paged_generation.generate_paged``."""
        from rlx.core.paged_generation import generate_paged

        if self.policy is None:
            raise RuntimeError("a generator samples only after sync(policy)")
        _refuse(sampling.repetition_penalty, sampling.stop_strings)
        limits = asdict(self.config)
        return generate_paged(self.policy.model, prompts, n, sampling, seeds, limits, on_complete)

    def close(self) -> None:
        """Let go of the policy."""
        self.policy = None


def check_settings(settings: Settings) -> None:
    """Refuse sampling options that paged does not have, before anything loads.

    Raises:
        ConfigError: a repetition penalty or stop strings.
    """
    _refuse(settings.repetition_penalty, tuple(settings.stop_strings))


def _refuse(repetition_penalty: float, stop_strings: tuple[str, ...]) -> None:
    given = {
        "repetition_penalty": (repetition_penalty, repetition_penalty != 1),
        "stop_strings": (stop_strings, bool(stop_strings)),
    }
    for name, (value, is_set) in given.items():
        if is_set:
            raise ConfigError(
                f"generator 'paged' has no {name}: it does not see what a completion began with",
                code="E-CONFIG-CONFLICT",
                got=f"{name} {value!r}"[:200],
                expected="1" if name == "repetition_penalty" else "none",
                hint=HINT,
            )
