"""The types of a batch on its way through the house. Flat tensors with lengths, never a pad token.

Legend: N sequences, R rows (a row is one sequence, or two in a preference pair), T tokens of all sequences
one after another, S scored tokens of all sequences one after another (the completion tokens, unless a
transform says otherwise). A batch is frozen; a room of the house returns a new one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

if TYPE_CHECKING:
    from torch import Tensor


def _layout(kind: str) -> Any:
    return field(default=None, metadata={"layout": kind})


@dataclass(frozen=True)
class Sequences:
    """Token ids of N sequences, stored flat.

    Attributes:
        ids: (T,) int64, sequences one after another.
        lengths: (N,) int64, tokens of each sequence; they add up to T.
        prompt_lengths: (N,) int64, leading tokens that are prompt.
        groups: (N,) int64, sequences with the same number share a prompt.
        scored: (T,) bool, tokens whose log-prob is asked for. The first token of a sequence never is.
    """

    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    groups: Tensor
    scored: Tensor

    def __post_init__(self) -> None:
        if self.ids.device.type != "cpu":
            return  # checked when it was made on the CPU; here looking would wait for the device
        if int(self.lengths.sum()) != len(self.ids) or len(self.scored) != len(self.ids):
            raise ValueError(
                f"lengths add up to {int(self.lengths.sum())}, but there are {len(self.ids)} ids and "
                f"{len(self.scored)} scored flags"
            )
        starts = self.starts[self.lengths > 0]
        if bool(self.scored[starts].any()):
            raise ValueError("the first token of a sequence cannot be scored: no token precedes it")

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        groups: Sequence[int] | None = None,
    ) -> Self:
        """Sequences of prompt plus completion, completion tokens scored.

        Args:
            prompts: N lists of token ids, none empty (its last token predicts the completion's first).
            completions: N lists of token ids, empty ones allowed.
            groups: N group numbers; default: every sequence its own group.

        Raises:
            ValueError: if the lists differ in length or a prompt is empty.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts, but {len(completions)} completions")
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError(
                f"prompt {[len(p) for p in prompts].index(0)} is empty; put a start token before it"
            )
        flat, scored = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            flat += [*prompt, *completion]
            scored += [False] * len(prompt) + [True] * len(completion)
        prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.long)
        return cls(
            ids=torch.tensor(flat, dtype=torch.long),
            lengths=prompt_lengths + torch.tensor([len(c) for c in completions], dtype=torch.long),
            prompt_lengths=prompt_lengths,
            groups=torch.arange(len(prompts)) if groups is None else torch.tensor(groups, dtype=torch.long),
            scored=torch.tensor(scored, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Tensor:
        """(N,) int64, position in ``ids`` at which each sequence begins."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def owners(self) -> Tensor:
        """(T,) int64, number of the sequence that each token belongs to."""
        return torch.repeat_interleave(self.lengths, output_size=len(self.ids))  # or it waits for the device

    @property
    def counts(self) -> Tensor:
        """(N,) int64, scored tokens of each sequence."""
        zeros = torch.zeros(len(self), dtype=torch.long, device=self.ids.device)
        return zeros.index_add(0, self.owners, self.scored.long())

    def take(self, index: Tensor) -> Sequences:
        """The sequences numbered by index (K,) int64, in that order."""
        tokens = flat_index(self.lengths, index)
        return Sequences(
            self.ids[tokens],
            self.lengths[index],
            self.prompt_lengths[index],
            self.groups[index],
            self.scored[tokens],
        )

    def joined(self, others: Sequences) -> Sequences:
        """These and the others after them; equal group numbers are one group."""
        names = [f.name for f in dataclasses.fields(self)]
        return Sequences(*(torch.cat([getattr(self, name), getattr(others, name)]) for name in names))

    def to(self, device: torch.device | str) -> Sequences:
        """The same on another device."""
        return Sequences(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


def flat_index(lengths: Tensor, index: Tensor) -> Tensor:
    """Positions, in a flat vector of segments, of the segments numbered by index.

    Args:
        lengths: (N,) int64, length of each segment.
        index: (K,) int64, segment numbers.

    Returns:
        (sum of lengths[index],) int64.
    """
    starts, taken = (lengths.cumsum(0) - lengths)[index], lengths[index]
    total = int(taken.sum())
    within = torch.arange(total, device=lengths.device)
    within = within - torch.repeat_interleave(taken.cumsum(0) - taken, taken, output_size=total)
    return torch.repeat_interleave(starts, taken, output_size=total) + within


@dataclass(frozen=True)
class Prompts:
    """Prompts ready to be completed; what transforms give to online algorithms.

    Attributes:
        ids: B lists of token ids, none empty.
        texts: B rendered prompts, as the model sees them.
        messages: B message lists for conversational data, None for plain text.
        columns: every other data-set column, B values each.
        rows: B row numbers in the data set.
    """

    ids: list[list[int]]
    texts: list[str]
    messages: list[list[dict[str, Any]] | None]
    columns: dict[str, list[Any]]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Sequence[int]) -> Prompts:
        """The prompts numbered by index, in that order; numbers may repeat."""

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in index]

        columns = {name: pick(values) for name, values in self.columns.items()}
        return Prompts(pick(self.ids), pick(self.texts), pick(self.messages), columns, pick(self.rows))


@dataclass(frozen=True)
class Batch:
    """What an algorithm trains on: sequences, and values a token, a sequence or a row.

    Attributes:
        sequences: N sequences; ``per_row`` adjacent ones make a row.
        metrics: name → values to be averaged into the log, for what ``prepare`` has to report.
    """

    per_row: ClassVar[int] = 1

    sequences: Sequences
    metrics: dict[str, Tensor] = field(default_factory=dict, kw_only=True)

    def __len__(self) -> int:
        return len(self.sequences) // self.per_row

    def take(self, rows: Tensor) -> Self:
        """The rows numbered by rows (K,) int64, in that order, with everything that belongs to them."""
        each = torch.arange(self.per_row, device=rows.device)
        index = (rows[:, None] * self.per_row + each).flatten()
        tokens = flat_index(self.sequences.counts, index)
        picks = {"token": tokens, "sequence": index, "row": rows}
        changed: dict[str, Any] = {"sequences": self.sequences.take(index), "metrics": {}}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Sequences) and f.name != "sequences":
                changed[f.name] = None  # sequences of the whole batch, not of its rows
            if "layout" not in f.metadata or value is None:
                continue
            pick = picks[f.metadata["layout"]]
            if isinstance(value, torch.Tensor):
                changed[f.name] = value[pick]
            elif isinstance(value, Prompts):
                changed[f.name] = value.take(pick.tolist())
            elif isinstance(value, dict):
                changed[f.name] = {
                    name: item[pick] if isinstance(item, torch.Tensor) else [item[i] for i in pick.tolist()]
                    for name, item in value.items()
                }
            else:
                changed[f.name] = [value[i] for i in pick.tolist()]
        return dataclasses.replace(self, **changed)

    def size(self, by: str) -> Tensor:
        """() float64: how many ``tokens`` (scored), ``sequences`` or ``rows`` this batch has.

        Raises:
            ValueError: for any other name.
        """
        sizes = {"tokens": self.sequences.scored.sum(), "sequences": len(self.sequences), "rows": len(self)}
        if by not in sizes:
            raise ValueError(f"a loss is divided by one of {', '.join(sizes)}, not by {by!r}")
        return torch.as_tensor(sizes[by], dtype=torch.float64)

    def to(self, device: torch.device | str) -> Self:
        """The same with every tensor on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(item) for name, item in value.items()}
            return value.to(device) if isinstance(value, torch.Tensor | Sequences) else value

        return dataclasses.replace(
            self, **{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)}
        )


@dataclass(frozen=True)
class Rollouts(Batch):
    """Sampled completions with everything that was measured on them.

    Attributes:
        prompts: the prompt of each sequence.
        texts: N completions as text, special tokens left out.
        finished: (N,) bool, ended by a stop token or stop string rather than cut.
        old: (S,) float32, log-prob of each token when it was sampled, at the sampling temperature.
        score: (N,) float32, weighted sum of the rewards; NaN where no reward applies.
        rewards: name → (N,) float32, one entry a reward, NaN for None.
        reward_columns: ``<reward>/<column>`` → N values that a reward told of the completions.
        wins: (N,) float32, share of the comparisons with the other completions of its prompt that a judge
            decided for it; NaN where none was decided.
        token_scores: (S,) float32, rewards given for single tokens, zeros elsewhere; None without any.
        reference: (S,) float32, log-prob under the reference.
        kl: (S,) float32, exact KL(policy‖reference) at each token, for ``kl_estimator: full``.
        values: (S,) float32, value of the state before each token.
        advantages: (S,) float32.
        returns: (S,) float32.
        entropy: (S,) float32, of the sampling policy, where an algorithm's ``prepare`` asked for it.

    All but the first three are None until they were measured.
    """

    prompts: Prompts = _layout("sequence")
    texts: list[str] = _layout("sequence")
    finished: Tensor = _layout("sequence")
    old: Tensor = _layout("token")
    score: Tensor = _layout("sequence")
    rewards: dict[str, Tensor] = _layout("sequence")
    reward_columns: dict[str, list[Any]] = _layout("sequence")
    wins: Tensor = _layout("sequence")
    token_scores: Tensor = _layout("token")
    reference: Tensor = _layout("token")
    kl: Tensor = _layout("token")
    values: Tensor = _layout("token")
    advantages: Tensor = _layout("token")
    returns: Tensor = _layout("token")
    entropy: Tensor = _layout("token")

    @property
    def total_score(self) -> Tensor:
        """(N,) float32, ``score`` plus the rewards given for single tokens; NaN where no reward applies."""
        if self.token_scores is None:
            return self.score
        return self.score.index_add(0, torch.repeat_interleave(self.sequences.counts), self.token_scores)


@dataclass(frozen=True)
class Pairs(Batch):
    """Preference pairs: sequences 2i and 2i+1 are the chosen and the rejected answer to one prompt.

    Attributes:
        reference: (S,) float32, log-prob under the reference.
        margin: (R,) float32, how much better the chosen one is, where the data says so.
        weights: (R,) float32, what an algorithm's ``prepare`` makes each pair count, detached.
        anchors: (R, K) float32, K numbers a pair that an algorithm's ``prepare`` took over the whole batch.
    """

    per_row: ClassVar[int] = 2

    reference: Tensor = _layout("token")
    margin: Tensor = _layout("row")
    weights: Tensor = _layout("row")
    anchors: Tensor = _layout("row")


@dataclass(frozen=True)
class Labeled(Batch):
    """Unpaired preference: each sequence is desirable or not.

    Attributes:
        desirable: (N,) bool.
        mismatched: N sequences for the KL estimate: each prompt with the completion of the next row of the
            batch, over all processes. Whole batches only; mini-batches do without.
        mismatched_reference: log-prob of their scored tokens under the reference, until ``prepare``.
        reference: (S,) float32, log-prob under the reference.
        kl: (N,) float32, KL(policy‖reference) estimate that ``prepare`` took over the whole batch.
        contrast: (N,) float32, n/n₊ for the n₊ desirable of n rows, −n/n₋ for the others: the mean of
            contrast · x is the difference of the two means of x.
    """

    desirable: Tensor = _layout("sequence")
    mismatched: Sequences | None = None
    mismatched_reference: Tensor | None = None
    reference: Tensor = _layout("token")
    kl: Tensor = _layout("sequence")
    contrast: Tensor = _layout("sequence")


@dataclass(frozen=True)
class Demonstrations(Batch):
    """Texts to imitate; ``sequences.scored`` says which tokens are learned."""


@dataclass(frozen=True)
class Scores:
    """What one forward gives, a value a scored token.

    Attributes:
        logps: (S,) float32, log-prob of each scored token. A classifier has none.
        entropy: (S,) float32, nats, of the distribution that the token was drawn from.
        values: (S,) float32, value of the state before the token.
        correct: (S,) bool, whether the token was the most likely one.
        square: (S,) float32, log Σ_v p(v)² of that distribution, without gradient.
        reward: (N,) float32, a classifier's score of each sequence.

    All but ``logps`` are None unless ``Algorithm.needs`` asks for them.
    """

    logps: Tensor
    entropy: Tensor = _layout("token")
    values: Tensor = _layout("token")
    correct: Tensor = _layout("token")
    square: Tensor = _layout("token")
    reward: Tensor = _layout("sequence")


@dataclass(frozen=True)
class Loss:
    """What ``Algorithm.loss`` returns for one micro-batch.

    Attributes:
        terms: name of a count (``tokens``, ``sequences``, ``rows`` or one that ``Algorithm.size`` knows) →
            tensor of terms. The loss is the sum over names of sum(terms) / that count, the count being that
            of the whole mini-batch over all processes.
        metrics: name → detached values, averaged over the mini-batch into the log.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
