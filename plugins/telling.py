"""What a generator may tell while it samples: which completions are complete, so that rewards can begin.

No torch here, as in ``rlx.plugins.contract``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

from rlx.plugins.contract import Completions, Generator, Sampling


@dataclass(frozen=True)
class Complete:
    """A completion that will not change any more, while others may still be sampled.

    Attributes:
        prompt: number of its prompt in the call.
        completion: its number among those of the prompt.
        ids: as ``Completions`` will have them.
        finished: likewise.
    """

    prompt: int
    completion: int
    ids: list[int]
    finished: bool


OnComplete = Callable[[Sequence[Complete]], None]


@runtime_checkable
class TellingGenerator(Generator, Protocol):
    """Samples completions, and tells which ones are complete while it goes on."""

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        on_complete: OnComplete | None = None,
    ) -> Completions:
        """Sample n completions of each prompt.

        Args:
            prompts: as ``Generator`` has them, like all but the last.
            n: likewise.
            sampling: likewise.
            seeds: likewise.
            on_complete: called now and then, in the caller's thread, with those that have become complete,
                each told once. Rewards may then be computed while it samples on.
        """
        ...


def tells(generator: Generator) -> TypeGuard[TellingGenerator]:
    """Whether a generator takes ``on_complete``."""
    return "on_complete" in inspect.signature(generator.generate).parameters
