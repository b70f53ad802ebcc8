"""The reward runner: calls the rewards of a run, checks what they return, and adds it up.

A reward is a callable ``reward(prompts=…, completions=…, completion_ids=…, **columns)``, plain or ``async``,
that returns one number a completion, a list of one number a token, or None where it does not apply. It is
given copies, and only what its signature takes. Whatever else comes back is an error that names the reward
and the row, or is counted under the policy that the user chose; nothing unusable enters a batch.

Legend: N completions, S completion tokens of all completions one after another.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from rlx.core.batch import Prompts
from rlx.core.closing import close_all
from rlx.core.errors import CheckpointError, ConfigError, RewardError
from rlx.core.reward_call import Outcome, Signature, Unusable, Value, definition, read_value, start
from rlx.core.reward_mix import NamedReward, Scored, check_mix, combine, with_unique_names
from rlx.core.reward_pieces import Asked, Part, Piece, arguments, seconds, taken_apart, together
from rlx.core.text import safe_text

if TYPE_CHECKING:
    from rlx.core.overlap import Overlap

__all__ = ["NamedReward", "RewardRunner", "Scored"]


class RewardRunner:
    """Scores completions with the rewards of a run.

    Args:
        rewards: at least one; a name that occurs twice gets a suffix (``length``, ``length_2``).
        on_error: what something unusable does: ``raise`` stops the run, ``none`` counts as not applicable,
            ``value`` counts as ``error_value``.
        error_value: score of something unusable under ``value``.

    Raises:
        ConfigError: no reward, a weight that is not finite, nothing but weights of 0, or an unknown policy.
        PluginError: something that cannot be called as a reward.
    """

    def __init__(
        self, rewards: Sequence[NamedReward], on_error: str = "raise", error_value: float = 0.0
    ) -> None:
        check_mix(rewards, on_error, error_value)
        self.rewards = with_unique_names(rewards)
        self._signatures = {reward.name: Signature.of(reward.fn, reward.name) for reward in self.rewards}
        self._on_error = on_error
        self._substitute = error_value if on_error == "value" else None
        self._said: set[tuple[str, str]] = set()
        # Names of rewards that score with the policy's weights; plain functions need not have the attribute.
        self.waiting = [r.name for r in self.rewards if getattr(r.fn, "needs_policy", False)]

    @property
    def columns_needed(self) -> dict[str, tuple[str, ...]]:
        """Reward name → data-set columns without which it cannot be called; empty ones are left out."""
        return {name: signature.needed for name, signature in self._signatures.items() if signature.needed}

    def score(
        self,
        prompts: Prompts,
        completions: list[str],
        completion_ids: list[list[int]],
        step: int | None = None,
        early: Overlap | None = None,
    ) -> Scored:
        """Score completions. Async rewards run concurrently, also if called from inside a running event loop.

        Args:
            prompts: N prompts, one a completion.
            completions: N texts, special tokens left out; empty ones are legal; if N = 0 no reward is called.
            completion_ids: N lists of token ids, the stop token included.
            step: the run's, as in its log; None outside a run.
            early: what some rewards were asked while the completions were sampled.

        Returns:
            Scores in the order of the completions.

        Raises:
            RewardError: a reward raised, or returned something unusable, under the policy ``raise``; or the
                weighted sum does not fit into float32.
            DataError: a column that a reward needs is not there.
            ConfigError: a reward scores with the policy's weights, and ``attach`` was not called.
            ValueError: prompts, completions and completion_ids differ in number.
        """
        asked = Asked(prompts, completions, completion_ids, step)
        self._check_attached()
        began = time.perf_counter()
        values: dict[str, list[Value]] = {reward.name: [] for reward in self.rewards}
        called = self.rewards if completions else []
        overlapped = () if early is None else early.finish(asked)
        metrics: dict[str, list[float]] = {}
        columns: dict[str, list[Any]] = {}
        calls: dict[str, Future[Outcome]] = {}
        try:
            for reward in called:
                if reward.name not in overlapped:
                    calls[reward.name] = self.start(reward, asked)
            for reward in called:
                if early is not None and reward.name in overlapped:
                    pieces = early.pieces(reward.name)
                else:
                    pieces = [Piece(range(len(asked)), calls[reward.name].result())]
                values[reward.name], errors, own, told = self._settle(reward, pieces, asked)
                metrics[f"reward/{reward.name}/seconds"] = [seconds(pieces)]
                if self._on_error != "raise":
                    metrics[f"reward/{reward.name}/errors"] = [float(errors)]
                metrics |= {f"reward/{reward.name}/{name}": numbers for name, numbers in own.items()}
                columns |= {f"{reward.name}/{name}": column for name, column in told.items()}
        finally:
            for call in calls.values():  # after an error or Ctrl-C nobody waits for the async ones
                call.cancel()
        score, totals, tokens = combine(self.rewards, values, [len(ids) for ids in completion_ids])
        return Scored(score, totals, tokens, time.perf_counter() - began, metrics, columns)

    def _check_attached(self) -> None:
        if self.waiting:
            raise ConfigError(
                f"reward {self.waiting[0]!r} scores with the weights of a run's policy, and there is none",
                code="E-CONFIG-REWARD",
                hint="try it in a run, --max-steps 1; or with a base of its own, --reward reward_model",
            )

    @property
    def independent(self) -> list[NamedReward]:
        """Rewards that may be asked about some completions while others are still being sampled.

        Those that say so, but for rewards that keep a state or score with the policy's weights, which are in
        use while it samples.
        """
        return [
            reward
            for reward in self.rewards
            if getattr(reward.fn, "independent", False)  # plain functions need not have the attribute
            and not getattr(reward.fn, "needs_policy", False)
            and not hasattr(reward.fn, "state_dict")
        ]

    def start(self, reward: NamedReward, asked: Asked) -> Future[Outcome]:
        """Call one reward; a plain one has ended when this returns, an async one goes on in the background.

        Raises:
            DataError: a column that it needs is not there.
        """
        signature = self._signatures[reward.name]
        return start(reward.fn, arguments(reward.name, reward.fn, signature, asked))

    def attach(self, policy: Any) -> None:
        """Give the policy, loaded, to the rewards that score with its weights; see ``Reward.attach``."""
        for reward in self.rewards:
            if reward.name in self.waiting:
                fn: Any = reward.fn
                fn.attach(policy)
        self.waiting = []

    def only(self, names: Collection[str]) -> RewardRunner | None:
        """A runner of some of the rewards, for trying them: each counts once; None for no reward."""
        chosen = [dataclasses.replace(r, weight=1.0) for r in self.rewards if r.name in names]
        if not chosen:
            return None
        some = RewardRunner(chosen, self._on_error, self._substitute or 0.0)
        some.waiting = [name for name in self.waiting if name in names]
        return some

    def state_dict(self) -> dict[str, Any]:
        """Reward name → its state, for the rewards that keep one."""
        return {name: fn.state_dict() for name, fn in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            CheckpointError: the rewards that keep a state are not those of the checkpoint.
        """
        stateful = self._stateful()
        if set(stateful) != set(state):
            raise CheckpointError(
                "the checkpoint holds the state of other rewards than this run has",
                code="E-CHECKPOINT-REWARDS",
                got=", ".join(sorted(state)) or "none",
                expected=", ".join(sorted(stateful)) or "none",
            )
        for name, fn in stateful.items():
            fn.load_state_dict(state[name])

    def close(self) -> None:
        """Let the rewards give back what they hold; they may be called again."""
        close_all(*(reward.fn for reward in self.rewards))

    def _stateful(self) -> dict[str, Any]:
        return {reward.name: reward.fn for reward in self.rewards if hasattr(reward.fn, "state_dict")}

    def _settle(
        self, reward: NamedReward, pieces: Sequence[Piece], asked: Asked
    ) -> tuple[list[Value], int, dict[str, list[float]], dict[str, list[Any]]]:
        """The values of one reward, how many stand in for something unusable, and what else it told."""
        places: Sequence[int] = range(len(asked))
        parts: list[Part] = []
        try:
            for piece in sorted(pieces, key=lambda piece: piece.places[0]):
                places = piece.places
                parts.append(taken_apart(piece))
            if any(part.gradient for part in parts):
                detached = (
                    "returned a tensor that requires grad; it is detached, no gradient flows through a reward"
                )
                self._say_once(reward, "grad", f"reward {reward.name!r} {detached}")
            places = range(len(asked))
            items, metrics, columns = together(parts, len(asked))
        except Unusable as fault:
            # One call that failed is the whole batch's failure, however the batch was cut.
            self._tell(reward, fault, asked, places)
            return [self._substitute] * len(asked), len(asked), {}, {}
        values: list[Value] = []
        errors = 0
        for i, item in enumerate(items):
            try:
                values.append(read_value(item, len(asked.completion_ids[i])))
            except Unusable as fault:
                self._tell(reward, fault, asked, [i], item=True)
                values.append(self._substitute)
                errors += 1
        return values, errors, metrics, columns

    def _tell(
        self, reward: NamedReward, fault: Unusable, asked: Asked, places: Sequence[int], *, item: bool = False
    ) -> None:
        """Raise the fault as a RewardError; or, where the policy goes on, warn of the first one."""
        if self._on_error != "raise" and (reward.name, "error") in self._said:
            return
        first = places[0]
        which = f"data row {asked.prompts.rows[first]}"
        if not item:
            which = f"{len(places)} completions, the first of {which}"
        error = RewardError(
            f"reward {reward.name!r} {fault.what}" + (f" for item {first}" if item else ""),
            code="E-REWARD-VALUE" if fault.__cause__ is None else "E-REWARD-RAISED",
            where=f"{definition(reward.fn)}; {which}: '{safe_text(asked.completions[first], 80)}'",
            got=safe_text(fault.got, 500),
            expected=fault.expected,
            hint=fault.hint
            or "mend the reward, or go on without such scores: --reward-on-error none (or value)",
        )
        if self._on_error == "raise":
            raise error from fault.__cause__
        counted = "not applicable" if self._substitute is None else f"{self._substitute:g}"
        rest = f"counted as {counted}; further ones are only counted, in reward/{reward.name}/errors"
        self._say_once(reward, "error", f"{error}\n  {rest}")

    def _say_once(self, reward: NamedReward, topic: str, text: str) -> None:
        if (reward.name, topic) not in self._said:
            self._said.add((reward.name, topic))
            warnings.warn(text, stacklevel=2)
