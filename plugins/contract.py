"""What a plugin may be: one structural type a kind, and thin base classes with defaults.

No torch here: a component's Config and metadata are read before the training stack is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from rlx.core.batch import Batch, Loss, Scores, Sequences

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
            before ``prepare``), ``values`` (a value function, before the update and in it), ``kl`` (the exact
            KL(policy‖reference) at each sampled token), and in ``Scores``: ``entropy``, ``correct`` (was the
            token the most likely one), ``square`` (log Σ p²), ``reward`` (the policy is a classifier).
        completions_per_prompt: how many completions of each prompt are sampled.
        epochs: how often one batch is gone through.
        mini_batches: into how many optimizer steps one pass over a batch is cut.
        stop_token_ids: tokens that end a completion, beside the model's own end-of-sequence tokens.
        loss_per: the counts that ``Loss.terms`` are divided by.
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
    """

    Config: ClassVar[type] = NoOptions
    columns: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[str],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> Sequence[float | Sequence[float] | None]:
        """One number a completion, or a list of one number a token; None where the reward does not apply."""
        raise TypeError(f"{type(self).__qualname__} has no __call__")


class Transform:
    """Base of a data transform: rows in, rows out.

    Class attributes:
        Config: frozen dataclass of ``rlx.opt`` fields.
        takes: columns it needs.
        gives: columns it adds.
    """

    Config: ClassVar[type] = NoOptions
    takes: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
        """The transformed rows; a row left out is counted and reported."""
        raise TypeError(f"{type(self).__qualname__} has no __call__")


class Callback:
    """Base of a callback: any subset of the run events, marked with ``rlx.hookimpl``.

    Class attributes:
        Config: frozen dataclass of ``rlx.opt`` fields.
        observer: True if a failure here switches the callback off instead of stopping the run.
    """

    Config: ClassVar[type] = NoOptions
    observer: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


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
    """Samples completions."""

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
    """Says which of two completions is better."""

    def judge(self, prompts: list[Any], pairs: list[tuple[str, str]]) -> list[int | None]:
        """0 or 1 for the better one of each pair, None for no verdict."""
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
