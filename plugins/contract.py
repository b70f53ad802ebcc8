"""What a plugin may be: one structural type a kind, and thin base classes with defaults.

No torch here: a component's Config and metadata are read before the training stack is imported.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from rlx.core.batch import Batch, Loss, Rollouts, Scores, Sequences

CHUNK_SIZE = 16
KINDS = ("algorithm", "reward", "transform", "callback", "generator", "judge", "dataset")


@dataclass(frozen=True)
class NoOptions:
    """The Config of a component without options."""


class Scorer(Protocol):
    """What ``Algorithm.prepare`` gets to look at more than its batch.

    Attributes:
        max_completion_length: the longest completion that sampling allows, in tokens.
        reward_weights: name of each reward → its factor in the weighted sum.
    """

    max_completion_length: int
    reward_weights: Mapping[str, float]

    def __call__(self, sequences: Sequences, model: str = "policy", needs: Collection[str] = ()) -> Scores:
        """Log-probs without gradient of the scored tokens under ``policy`` or ``reference``.

        Args:
            sequences: any, not only those of the batch.
            model: ``policy`` or ``reference``.
            needs: more than log-probs: any of ``entropy``, ``values``, ``correct``, ``square``.
        """
        ...

    def total(self, values: Tensor) -> Tensor:
        """The element-wise sum of values over all processes."""
        ...


class Algorithm:
    """Base of an algorithm: what it eats, what it needs, and a loss.

    A batch's way: ``prepare`` once, without gradient; then for each epoch and mini-batch ``loss`` on every
    micro-batch, ``verdict`` before the optimizer steps.

    Class attributes, those from ``needs`` on also set for one instance in ``__init__``:
        Config: frozen dataclass of ``rlx.opt`` fields.
        eats: ``prompts`` (online), ``pairs``, ``labeled`` or ``demonstrations``.
        defaults: core options for which this algorithm has another default.
        needs: what the loop must provide, any of ``reference`` (log-probs under the reference, in the batch
            before ``prepare``), ``mismatched`` (with it, those of labeled rows' mismatched sequences),
            ``values`` (a value function, before the update and in it), ``kl`` (the exact
            KL(policy‖reference) at each sampled token), and in ``Scores``: ``entropy``, ``correct`` (was the
            token the most likely one), ``square`` (log Σ p²), ``reward`` (the policy is a classifier).
        completions_per_prompt: how many completions of each prompt are sampled.
        epochs: how often one batch is gone through.
        mini_batches: into how many optimizer steps one pass over a batch is cut.
        stop_token_ids: tokens that end a completion, beside the model's own end-of-sequence tokens.
        loss_per: the counts that ``Loss.terms`` are divided by.
        learns_from_prompts: tokens of prompts get a gradient too.
        judged: it can learn from ``Rollouts.wins``, what a judge says, in the place of rewards.
    """

    Config: ClassVar[type] = NoOptions
    eats: ClassVar[str] = "prompts"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    needs: frozenset[str] = frozenset()
    completions_per_prompt: int = 1
    epochs: int = 1
    mini_batches: int = 1
    stop_token_ids: tuple[int, ...] = ()
    loss_per: tuple[str, ...] = ("tokens",)
    learns_from_prompts: bool = False
    judged: bool = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare(self, batch: Any, score: Scorer) -> Any:
        """The batch with what the loss needs; it may change kind. Runs once a batch, without gradient."""
        return batch

    def loss(self, batch: Any, now: Scores) -> Loss:
        """The loss of one micro-batch, from the policy's scores on it."""
        raise TypeError(f"{type(self).__qualname__} has no loss(batch, now)")

    def size(self, batch: Batch, by: str) -> Tensor:
        """() float64, the count named in ``Loss.terms`` for one mini-batch of this process."""
        return batch.size(by)

    def idle(self, batch: Rollouts) -> Tensor | None:
        """(N,) bool, sequences of a mini-batch whose terms have no gradient; None where that is not known.

        They are not put through the model. ``loss`` is still asked for their terms and metrics, with the
        log-probs that they were sampled with and nothing else in ``now``. Counts are those of the whole
        mini-batch.

        Args:
            batch: a mini-batch of this process; other kinds of batches are not asked about.
        """
        return None

    def verdict(self, means: Mapping[str, float]) -> str:
        """What becomes of a mini-batch, its metrics known: ``step``, ``skip`` it, or ``stop`` the update.

        Args:
            means: the metrics of its Loss, averaged over the mini-batch and all processes.
        """
        return "step"

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must keep: numbers, text, lists and dicts of them, tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


class Reward:
    """Base of a reward with options; a plain function does as well.

    Class attributes:
        Config: frozen dataclass of ``rlx.opt`` fields.
        columns: data-set columns it needs, checked before weights load; an instance may set its own.
        needs_policy: it scores with the policy's own weights. Then ``attach`` is called before it scores, and
            it is tried after the weights are loaded, not before.
        independent: what it says of a completion depends on that completion, its prompt and its columns
            alone, and a metric that it gives as one number is a count. Then it may be called several times
            for a batch, from another thread, while other completions are still being sampled; an async one
            also before its last call has ended. Of no effect with ``needs_policy`` or a ``state_dict``.
        chunk_size: completions that such a call is worth, at least; an instance may set its own.
    """

    Config: ClassVar[type] = NoOptions
    columns: tuple[str, ...] = ()
    needs_policy: ClassVar[bool] = False
    independent: ClassVar[bool] = False
    chunk_size: int = CHUNK_SIZE

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[str],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> RewardResult | Awaitable[RewardResult]:
        """One number a completion, or a list of one number a token; None where the reward does not apply.

        One that names ``run_step`` is given the run's step too, None outside a run.
        """
        raise TypeError(f"{type(self).__qualname__} has no __call__")

    def attach(self, policy: Any) -> None:
        """Take the policy, once, before the first step; called where ``needs_policy`` is set.

        Args:
            policy: ``rlx.core.models.Policy``. What the reward adds to it is frozen, and whatever a call does
                to modes, adapters and gradients is undone before it returns or raises.
        """

    def close(self) -> None:
        """Give back what it holds, processes for example; called when a run ends, another may follow."""


@dataclass(frozen=True)
class Failed:
    """One item that a reward could not score; it goes the way of ``reward_on_error``, as an exception does.

    Attributes:
        reason: what went wrong, to follow the reward's name: ``took longer than 5 s``.
        hint: what to do about it; empty for what is said of every unusable score.
    """

    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Rewarded:
    """What a reward returns that has more to tell than its values, for N completions.

    Attributes:
        values: N items, as a reward returns them alone.
        metrics: name → a number, or N numbers of which those that are not None are averaged; logged as
            ``reward/<reward>/<name>``. Names are words of letters, digits, ``_``, ``-`` and ``.``.
        columns: name → N values, each a text, a finite number, a bool or None; they stand beside the
            completion in completions.jsonl as ``<reward>/<name>``.
    """

    values: Sequence[float | Sequence[float] | Failed | None]
    metrics: Mapping[str, float | Sequence[float | None]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


RewardResult = Sequence[float | Sequence[float] | Failed | None] | Rewarded


class Transform:
    """Base of a data transform: rows in, rows out.

    Class attributes:
        Config: frozen dataclass of ``rlx.opt`` fields.
        takes: columns it needs.
        gives: columns it adds.
        stage: ``rows``: it acts in the order given. ``template``: it renders the rows in place of the option
            chat_template, a ``ChatTemplate``. ``packing``: it puts tokenised demonstrations together in place
            of the option packing, a ``Packing``. Those two act after the others, wherever they stand.
    """

    Config: ClassVar[type] = NoOptions
    stage: ClassVar[str] = "rows"
    takes: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
        """The transformed rows; a row left out is counted and reported.

        Raises:
            rlx.BadRow: a row that cannot be used; ``on_bad_row`` decides what becomes of it. Any other
                exception is a fault of the transform.
        """
        raise TypeError(f"{type(self).__qualname__} has no __call__")


class Callback:
    """Base of a callback: any subset of the run events, marked with ``rlx.hookimpl``.

    Class attributes:
        Config: frozen dataclass of ``rlx.opt`` fields.
        observer: True if a failure here switches the callback off instead of stopping the run.
        collective: True if an event of it waits for other processes. It has to see for itself that what fails
            on one of them fails on all.
        changes_training: True if weights, batches or the reference may be others with it than without it.
    """

    Config: ClassVar[type] = NoOptions
    observer: ClassVar[bool] = False
    collective: ClassVar[bool] = False
    changes_training: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""

    def close(self) -> None:
        """Give back what it holds; called where it was built for a run that did not begin.

        At the end of one that did ``on_run_end`` is told instead.
        """


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Every field is explicit; no model's own defaults leak in.

    Attributes:
        max_new_tokens: longest completion, in tokens.
        temperature: logits are divided by it.
        top_k: 0 for all tokens.
        top_p, min_p, repetition_penalty: 1, 0 and 1 switch them off.
        stop_token_ids: tokens that end a completion, end-of-sequence tokens included; they are kept in it.
        stop_strings: texts that end a completion; they are kept in it.
        greedy: take the most likely token.
        batch_size: completions sampled at a time; None leaves it to the generator.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    greedy: bool = False
    batch_size: int | None = None


@dataclass(frozen=True)
class Completions:
    """What a generator returns: ``n`` adjacent completions a prompt, in the order of the prompts.

    Attributes:
        ids: one list of token ids a completion, stop token included, nothing after it.
        logprobs: one list a completion, the log-prob of each token under softmax(logits / temperature),
            before truncation by top-k and the like; None if the generator cannot tell.
        finished: True where a stop token or stop string ended it, False where it was cut.
    """

    ids: list[list[int]]
    logprobs: list[list[float]] | None
    finished: list[bool]


@runtime_checkable
class Generator(Protocol):
    """Samples completions.

    One whose ``generate`` has a parameter ``on_complete`` is told there whom to
    tell which completions are complete: ``rlx.plugins.telling.TellingGenerator``.
    """

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Completions:
        """Sample n completions of each prompt.

        Args:
            prompts: token ids, none empty.
            n: completions a prompt.
            sampling: how to draw.
            seeds: one a prompt: the same seed, prompt and weights give the same completions whatever else is
                in the batch.
        """
        ...

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights; called before each round of sampling."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Says which of two completions is better.

    Whoever asks shows each pair in an order that is drawn, and undoes it. ``judge`` may take more by
    name, one value a pair: columns of the data, ``pair_ids`` (token ids of both completions),
    ``prompt_texts`` (prompts as the model sees them), ``rows`` (row numbers of the data), or all of it as
    ``**columns``. An attribute ``columns`` names columns that it cannot do without. Where they exist,
    ``state_dict`` and ``load_state_dict`` are for checkpoints, ``close`` is called when the run is over, and
    with ``needs_policy = True`` a run gives its policy to ``attach(policy)`` before it asks.
    """

    def judge(self, prompts: list[Any], pairs: list[tuple[str, str]]) -> list[int | None]:
        """0 or 1 for the better one of each pair, None for no verdict.

        Args:
            prompts: N message lists, or N texts.
            pairs: N pairs of completions, no two texts of a pair equal.
        """
        ...


@runtime_checkable
class Dataset(Protocol):
    """A named data set, built in code or loaded.

    One whose Config has a field ``eats`` is told what the algorithm eats, and may give rows for it.
    """

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The rows of ``train`` or ``test``."""
        ...


Reference = str | type | Callable[..., Any] | object
