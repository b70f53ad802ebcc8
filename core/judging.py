"""Which of two completions is better: a judge is asked, its answers are checked and counted.

The order in which a judge sees a pair is drawn from the seed and the pair's own key, and undone afterwards: a
judge that likes the first place better favours neither side. Two equal texts are a tie, and nobody is asked.
Whatever a judge returns that is no verdict is an error that names the judge, the row and what came back.

Legend: N pairs; a pair's sides are 0 and 1.
"""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlx.core.batch import Prompts, Rollouts
from rlx.core.errors import ConfigError, DataError, PluginError, RewardError, RlxError
from rlx.core.options import close
from rlx.core.reward_call import definition, kind
from rlx.core.streams import stream_seed
from rlx.core.text import safe_text

STANDARD = ("prompts", "pairs", "prompt_texts", "pair_ids", "rows")
Z = 1.959964  # two-sided 95 %

Verdict = int | None
TokenPair = tuple[list[int], list[int]]


class JudgeRunner:
    """Asks one judge.

    Args:
        name: how it is called in messages.
        judge: built; see ``rlx.plugins.contract.Judge``.
        seed: of the order in which pairs are shown.

    Raises:
        PluginError: something that cannot be asked as a judge.
    """

    def __init__(self, name: str, judge: Any, seed: int = 0) -> None:
        self.name, self.judge, self.seed = name, judge, seed
        if isinstance(judge, type) or not callable(getattr(judge, "judge", None)):
            raise PluginError(
                f"judge {name!r} cannot be asked",
                code="E-PLUGIN-JUDGE",
                got=safe_text(repr(judge), 80),
                expected="an object with judge(prompts, pairs)",
            )
        parameters = list(inspect.signature(judge.judge).parameters.values())
        more = [p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._names, self._taken = {p.name for p in more}, {p.name for p in parameters[:2]}
        self._everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        required = [p.name for p in more if p.default is p.empty and p.name not in STANDARD]
        declared = getattr(judge, "columns", ())  # optional: not every judge looks at the data
        self.columns_needed = tuple(dict.fromkeys([*declared, *required]))
        # It judges with the policy's weights, and has not got them yet; few judges have the attribute.
        self.waiting = bool(getattr(judge, "needs_policy", False))

    def attach(self, policy: Any) -> None:
        """Give the policy, loaded, to a judge that judges with its weights.

        Args:
            policy: ``rlx.core.models.Policy``.
        """
        if self.waiting:
            self.judge.attach(policy)
            self.waiting = False

    def check_policy(self) -> None:
        """See that a judge that needs a policy has one.

        Raises:
            ConfigError: it has none.
        """
        if self.waiting:
            raise ConfigError(
                f"judge {self.name!r} judges with the weights of a run's policy, and there is none",
                code="E-CONFIG-REWARD",
                hint="ask a reward model with a base of its own, reward_model, in the place of lora",
            )

    def check_columns(self, columns: Collection[str]) -> None:
        """See that the data have the columns that the judge needs.

        Raises:
            DataError: for the first that is missing.
        """
        for column in self.columns_needed:
            if column not in columns:
                raise DataError(
                    f"judge {self.name!r} needs the column {column!r}{close(column, list(columns))}",
                    code="E-DATA-COLUMN",
                    where=definition(self.judge.judge),
                    got=", ".join(columns) or "no columns beside the prompt",
                )

    def verdicts(
        self,
        prompts: Prompts,
        pairs: Sequence[tuple[str, str]],
        pair_ids: Sequence[TokenPair],
        keys: Sequence[Sequence[int]],
    ) -> list[Verdict]:
        """The better side of each pair.

        Args:
            prompts: N prompts, one a pair.
            pairs: N pairs of completions.
            pair_ids: their token ids.
            keys: N tuples of numbers; pair and seed being the same, the same key shows the pair in the same
                order.

        Returns:
            0 or 1; None for a tie of equal texts and where the judge gives no verdict.

        Raises:
            RewardError: the judge raised, or returned something that is no list of verdicts.
            DataError: a column that it needs is not there.
            ConfigError: it judges with the policy's weights, and ``attach`` was not called.
        """
        self.check_policy()
        self.check_columns(prompts.columns)
        found: list[Verdict] = [None] * len(pairs)
        asked = [i for i, (one, other) in enumerate(pairs) if one != other]
        if not asked:
            return found
        turned = [bool(stream_seed(self.seed, "judge", *keys[i]) & 1) for i in asked]
        shown = [_turned(pairs[i], turn) for i, turn in zip(asked, turned, strict=True)]
        ids = [_turned(pair_ids[i], turn) for i, turn in zip(asked, turned, strict=True)]
        answers = self._ask(prompts.take(asked), shown, ids)
        for i, turn, answer in zip(asked, turned, answers, strict=True):
            found[i] = answer if answer is None else int(answer) ^ turn
        return found

    def _ask(
        self, prompts: Prompts, pairs: list[tuple[str, str]], pair_ids: list[TokenPair]
    ) -> Sequence[Verdict]:
        """What the judge says of pairs as they are shown, checked."""
        either = zip(prompts.messages, prompts.texts, strict=True)
        asked = [text if messages is None else messages for messages, text in either]
        named: dict[str, Any] = {
            **prompts.columns,
            "prompt_texts": prompts.texts,
            "pair_ids": pair_ids,
            "rows": prompts.rows,
        }
        wanted = set(named) - self._taken if self._everything else self._names
        named = {name: list(values) for name, values in named.items() if name in wanted}
        try:
            answers = self.judge.judge(asked, list(pairs), **named)
        except RlxError as error:
            error.add_note(f"judge {self.name!r}, {_places(prompts.rows)}")
            raise
        except Exception as error:
            what = f"raised {type(error).__name__}"
            raise self._fault(what, f"{type(error).__name__}: {error}", prompts, pairs) from error
        if not isinstance(answers, list | tuple):
            raise self._fault(f"returned {kind(answers)}", repr(answers), prompts, pairs)
        if len(answers) != len(pairs):
            what = f"returned {len(answers)} verdicts, but {len(pairs)} were expected (one a pair)"
            raise self._fault(what, f"{len(answers)} values", prompts, pairs)
        for i, answer in enumerate(answers):
            if answer is None:
                continue
            if isinstance(answer, bool) or not isinstance(answer, numbers.Integral) or answer not in (0, 1):
                raise self._fault(f"returned {kind(answer)}", repr(answer), prompts, pairs, i)
        return answers

    def _fault(
        self, what: str, got: str, prompts: Prompts, pairs: list[tuple[str, str]], item: int | None = None
    ) -> RewardError:
        first = item or 0
        which = _places(prompts.rows) if item is None else f"data row {prompts.rows[item]}"
        one, other = (safe_text(text, 60) for text in pairs[first])
        return RewardError(
            f"judge {self.name!r} {what}" + ("" if item is None else f" for pair {item}"),
            code="E-JUDGE-RAISED" if what.startswith("raised") else "E-JUDGE-VALUE",
            where=f"{definition(self.judge.judge)}; {which}: '{one}' against '{other}'",
            got=safe_text(got, 160),
            expected=f"a list of {len(pairs)} verdicts: 0 or 1 for the better one, None for no verdict",
            hint="mend the judge",
        )

    def rank(self, rollouts: Rollouts, ids: Sequence[list[int]], step: int) -> Rollouts:
        """Rollouts with ``wins``: every two completions of a prompt are compared.

        Args:
            rollouts: completions with their prompts; groups are those of one prompt.
            ids: token ids of each completion.
            step: the batch's number, part of the keys.
        """
        groups = rollouts.sequences.groups.tolist()
        places: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            places.setdefault(group, []).append(place)
        duels = [duel for members in places.values() for duel in itertools.combinations(members, 2)]
        texts = rollouts.texts
        pairs = [(texts[one], texts[other]) for one, other in duels]
        members = {place: rank for group in places.values() for rank, place in enumerate(group)}
        verdicts = self.verdicts(
            rollouts.prompts.take([one for one, _ in duels]),
            pairs,
            [(ids[one], ids[other]) for one, other in duels],
            [(step, groups[one], members[one], members[other]) for one, other in duels],
        )
        won, decided = torch.zeros(len(groups)), torch.zeros(len(groups))
        for (one, other), verdict in zip(duels, verdicts, strict=True):
            if verdict is not None:
                won[(one, other)[verdict]] += 1
                decided[[one, other]] += 1
        tied = torch.tensor([float(one == other) for one, other in pairs])
        silent = torch.tensor([float(verdict is None) for verdict in verdicts]) - tied
        metrics = {**rollouts.metrics, "judge/ties": tied, "judge/no_verdict": silent}
        wins = (won / decided).to(rollouts.sequences.ids.device)  # 0/0 is NaN: nothing decided
        return replace(rollouts, wins=wins, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        """The judge's state, empty for one that keeps none."""
        state: dict[str, Any] = self.judge.state_dict() if hasattr(self.judge, "state_dict") else {}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        if hasattr(self.judge, "load_state_dict"):
            self.judge.load_state_dict(state)

    def close(self) -> None:
        """Let the judge give back what it holds; it may be asked again."""
        if hasattr(self.judge, "close"):
            self.judge.close()


@dataclass(frozen=True)
class Tally:
    """How often each side won.

    Attributes:
        wins: pairs that side 0 won.
        losses: pairs that side 1 won.
        ties: pairs of equal texts; not in the rate.
        no_verdict: pairs of which the judge did not say; not in the rate.
    """

    wins: int
    losses: int
    ties: int
    no_verdict: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], pairs: Sequence[tuple[str, str]]) -> Tally:
        """Count N verdicts on N pairs."""
        tied = sum(one == other for one, other in pairs)
        return cls(verdicts.count(0), verdicts.count(1), tied, verdicts.count(None) - tied)

    @property
    def decided(self) -> int:
        """Pairs that one side won."""
        return self.wins + self.losses

    @property
    def total(self) -> int:
        """All pairs."""
        return self.decided + self.ties + self.no_verdict

    @property
    def rate(self) -> float:
        """Share of the decided pairs that side 0 won; 0.5 where none was decided."""
        return self.wins / self.decided if self.decided else 0.5

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate."""
        return wilson(self.wins, self.decided)


def wilson(wins: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; (0, 1) without any observation.

    Args:
        wins: how often it happened, 0 to count.
        count: how often it could have.

    Source: Wilson (1927), Journal of the American Statistical Association 22.
    """
    if count == 0:
        return 0.0, 1.0
    share, spread = wins / count, Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def _turned(pair: tuple[Any, Any], turn: bool) -> tuple[Any, Any]:
    return (pair[1], pair[0]) if turn else pair


def _places(rows: Sequence[int]) -> str:
    return f"{len(rows)} pairs, the first of data row {rows[0]}"
