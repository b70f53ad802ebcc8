"""Rewards that are asked about finished completions while the remaining ones are still being sampled.

What this is: the generator tells which completions are complete; so many of them as make a call worth while
go to one thread, which calls the rewards that declare themselves independent. After sampling that thread gets
what is left, and the other rewards are called as ever, once with everything. Which completions share a call
follows from the order in which they were sampled, never from the clock. The thread meets no other process.
What this leaves out: telling the generator to stop early when a reward has failed.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from rlx.core.reward_pieces import Asked, Piece
from rlx.plugins.contract import CHUNK_SIZE, Generator
from rlx.plugins.telling import Complete, tells

if TYPE_CHECKING:
    from rlx.core.batch import Prompts
    from rlx.core.reward_call import Outcome
    from rlx.core.reward_mix import NamedReward
    from rlx.core.scoring import RewardRunner

MOST_CALLS = 8  # about as many for a batch: each costs a little, and what the last one lacks is waited for
GRACE = 2.0  # seconds that a call under way gets to end after Ctrl-C; an ordinary error waits for it


@dataclass
class _Chunk:
    """Completions that were handed over together.

    Attributes:
        places: theirs, in the batch.
        asked: what rewards are asked.
        calls: reward → its call, once it has begun.
        dropped: nobody wants the results any more.
    """

    places: list[int]
    asked: Asked
    calls: dict[str, Future[Outcome]] = field(default_factory=dict)
    dropped: bool = False

    def drop(self) -> None:
        """Take back what was not called yet, and cancel async calls."""
        self.dropped = True
        for call in list(self.calls.values()):
            call.cancel()


class Overlap:
    """The rewards of one batch that are asked while it is sampled; a context manager.

    At its end nothing of it runs any more, unless Ctrl-C came in the middle of a call that does not end.
    Async calls that nobody needs any more were cancelled; they hear of it a moment later.

    Args:
        rewards: those of the run.
        prompts: B.
        n: completions a prompt.
        decode: the text of a completion.
        step: what rewards are told.
    """

    def __init__(
        self,
        rewards: RewardRunner,
        prompts: Prompts,
        n: int,
        decode: Callable[[list[int]], str],
        step: int | None,
    ) -> None:
        self.rewards, self.prompts, self.n, self.decode, self.step = rewards, prompts, n, decode, step
        self.asking = rewards.independent
        self.total = len(prompts) * n
        self.size = chunk_size(self.asking, self.total)
        self._waiting: dict[int, list[int]] = {}  # place → token ids, in the order in which they were told
        self._chunks: list[_Chunk] = []
        self._queue: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def take(self, complete: Sequence[Complete]) -> None:
        """Completions that will not change any more; the generator's ``on_complete``."""
        for one in complete:
            self._waiting[one.prompt * self.n + one.completion] = one.ids
        ready = len(self._waiting) // self.size * self.size
        told = len(self._waiting) + sum(len(chunk.places) for chunk in self._chunks)
        if ready and told < self.total:  # with the last one sampling is over, and there is nothing to gain
            places = list(itertools.islice(self._waiting, ready))
            self._hand_over(places, [self._waiting.pop(place) for place in places])

    def restart(self) -> None:
        """Sampling begins anew: what was told so far counts for nothing."""
        for chunk in self._chunks:
            chunk.drop()
        self._chunks, self._waiting = [], {}

    def finish(self, asked: Asked) -> Collection[str]:
        """Hand over what was not yet, or was told otherwise; the rewards' answers are in ``pieces``.

        Args:
            asked: all completions of the batch.

        Returns:
            Names of the rewards that nobody else need call; none if no call has begun.
        """
        if self._thread is None:
            return ()
        kept: list[_Chunk] = []
        told: set[int] = set()
        for chunk in self._chunks:
            true = chunk.asked.completion_ids == [asked.completion_ids[place] for place in chunk.places]
            if true and told.isdisjoint(chunk.places):  # one that was told twice counts once
                kept.append(chunk)
                told.update(chunk.places)
            else:
                chunk.drop()
        self._chunks, self._waiting = kept, {}
        rest = [place for place in range(len(asked)) if place not in told]
        if rest:
            self._hand_over(rest, [asked.completion_ids[place] for place in rest])
        self._queue.put(None)
        return [reward.name for reward in self.asking]

    def pieces(self, name: str) -> list[Piece]:
        """How the calls of a reward ended, after ``finish``.

        Raises:
            BaseException: what ended the thread: a column that a reward needs is missing, or SystemExit and
                the like out of a reward.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return [Piece(chunk.places, chunk.calls[name].result()) for chunk in self._chunks]

    def __enter__(self) -> Overlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restart()
        self._queue.put(None)
        if self._thread is not None:
            at_once = error is not None and not isinstance(error, Exception)
            self._thread.join(GRACE if at_once else None)

    def _hand_over(self, places: list[int], ids: list[list[int]]) -> None:
        prompts = self.prompts.take([place // self.n for place in places])
        # Decoded here: a tokenizer that the generator uses at the same time may object.
        texts = [self.decode(one) for one in ids]
        chunk = _Chunk(places, Asked(prompts, texts, ids, self.step))
        self._chunks.append(chunk)
        self._queue.put(chunk)
        if self._thread is None:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            # A daemon: a call that never ends must not keep the process after Ctrl-C.
            self._thread = threading.Thread(
                target=self._work, args=(device,), name="rlx-overlap", daemon=True
            )
            self._thread.start()

    def _work(self, device: int | None) -> None:
        """Ask the rewards about one chunk after the other. Async ones go on while the next is asked about.

        Args:
            device: number of the GPU that "cuda" means where the thread was started; in a new thread it is 0.
        """
        try:
            if device is not None:
                torch.cuda.set_device(device)
            while (chunk := self._queue.get()) is not None:
                for reward in self.asking:
                    if chunk.dropped:
                        break
                    chunk.calls[reward.name] = call = self.rewards.start(reward, chunk.asked)
                    if chunk.dropped:  # meanwhile
                        call.cancel()
        except BaseException as error:  # raised again where the results are asked for
            self._error = error


def overlap(
    rewards: RewardRunner | None,
    generator: Generator,
    prompts: Prompts,
    n: int,
    decode: Callable[[list[int]], str],
    step: int | None,
) -> AbstractContextManager[Overlap | None]:
    """What asks rewards while a batch is sampled; None where nothing can be asked then."""
    if rewards is None or not tells(generator) or not rewards.independent:
        return nullcontext()
    return Overlap(rewards, prompts, n, decode, step)


def chunk_size(rewards: Sequence[NamedReward], total: int) -> int:
    """Completions of one call: as many as the rewards ask for, and a fraction of the batch.

    Args:
        rewards: at least one.
        total: completions of the batch.
    """
    least: int = max(getattr(reward.fn, "chunk_size", CHUNK_SIZE) for reward in rewards)
    return least * max(1, math.ceil(total / MOST_CALLS / least))


def telling(overlap: Overlap | None) -> dict[str, Any]:
    """What a generator is told more by name."""
    return {} if overlap is None else {"on_complete": overlap.take}
