"""Letting a model compute what several sequences begin with once, where its numbers stay what they are.

A model that shares carries the attention implementation of ``rlx.core.tree_attention``, which is ``sdpa`` for
everybody else, and a mark on its trunk (``rlx.core.last_layer``). It gets them here, after its states for a
small tree were compared with those for the sequences alone, and after every layer was seen to ask for it: a
layer that carries a state from token to token (convolution, recurrence) would mix the branches, by little
before it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlx.core.batch import Sequences
from rlx.core.last_layer import MARK, read_at, token_wise
from rlx.core.tree import plant
from rlx.core.tree_attention import NAME, in_force

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE, HALF_TOLERANCE = 2e-5, 0.03
"""Largest distance of states of the tree from those of single sequences, as a share of their norm."""

LOCAL = ("sliding_window", "attention_chunk_size")
"""Config names of how far back some layers see; cut down to ``NEAR`` during the check."""
NEAR = 4


def shares(trunk: nn.Module) -> bool:
    """Whether a trunk takes sequences as a tree."""
    return isinstance(trunk, PreTrainedModel) and trunk.config._attn_implementation == NAME


def share(trunk: nn.Module) -> str | None:
    """Let a trunk take sequences as a tree from now on, if it can.

    Args:
        trunk: a decoder without output head, adapters included, on its device. Its attention implementation
            is changed; it computes what it did.

    Returns:
        None if it does; else why not, and the trunk is as it was.
    """
    if not isinstance(trunk, PreTrainedModel):
        return f"{type(trunk).__name__} is no transformers model"
    own = trunk.config._attn_implementation
    if own == NAME:
        _mark(trunk)  # its last layer may be another one since
        return None
    if own != "sdpa":
        return f"its attention implementation is {own}"
    reason: str | None = "the check did not end"
    try:
        found = _why_not(trunk)
        if found is None:
            _mark(trunk)
        reason = found
    finally:
        if reason is not None:
            trunk.set_attn_implementation(own)
    return reason


def share_or_not(trunks: Iterable[nn.Module], wanted: bool) -> str:
    """Let trunks share where they can, or see to it that they do not.

    Args:
        trunks: as in ``share``.
        wanted: the option ``share_prefix``.

    Returns:
        What came of it, a line for the plan.
    """
    if not wanted:
        for trunk in trunks:
            stop_sharing(trunk)
        return "micro-batches: padded, as share_prefix is off"
    reasons = [f"{type(trunk).__name__}: {why}" for trunk in trunks if (why := share(trunk)) is not None]
    if reasons:
        return f"micro-batches: padded; prompts are not shared ({'; '.join(reasons)})"
    return "micro-batches: without padding; a prompt that several sequences have is computed once"


def stop_sharing(trunk: nn.Module) -> None:
    """Take back what ``share`` did."""
    if isinstance(trunk, PreTrainedModel) and shares(trunk):
        trunk.set_attn_implementation("sdpa")
        vars(trunk).pop(MARK, None)


def row_states(
    trunk: nn.Module, sequences: Sequences, places: Tensor, *, merge: bool | None = None
) -> Tensor:
    """States (K, D) after the tokens at places (K,), from a pass over one row.

    Args:
        trunk: one that shares.
        sequences: at least one token, on the trunk's device.
        places: places of the tokens in ``sequences.ids``.
        merge: as in ``plant``; by default where calls cost little.
    """
    tree = plant(sequences, places, merge=places.device.type == "cpu" if merge is None else merge)
    rows = tree.states[places]
    with in_force(tree), read_at(trunk, rows, len(tree)):
        hidden_1MD = trunk(**_inputs(sequences, tree))[0]
    states: Tensor = hidden_1MD[0, rows]
    return states


def _inputs(sequences: Sequences, tree: Any) -> dict[str, Any]:
    return {
        "input_ids": sequences.ids[tree.places][None],
        "position_ids": tree.positions[None],
        # Without it transformers would guess from the positions that sequences are packed, and where.
        "attention_mask": torch.ones_like(tree.places)[None],
        "use_cache": False,
    }


def _why_not(trunk: PreTrainedModel) -> str | None:
    """None if the trunk, which then has the implementation, gives the states that it gave, in a tree too."""
    if _mixes_tokens(trunk):
        return "it has a convolution or recurrence over tokens"
    config = trunk.config.get_text_config(decoder=True)
    sequences = _trial(config.vocab_size).to(trunk.get_input_embeddings().weight.device)
    everywhere = torch.arange(len(sequences.ids), device=sequences.ids.device)
    try:
        with torch.no_grad(), _evaluating(trunk), _near_sighted(config):
            want = _alone(trunk, sequences)
            trunk.set_attn_implementation(NAME)
            if not shares(trunk):
                return "its attention implementation is fixed"
            found = [row_states(trunk, sequences, everywhere, merge=merge) for merge in (False, True)]
            found.append(_alone(trunk, sequences))
            layers = _layers_that_attend(trunk, sequences)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with arguments that it does not know
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    if layers != config.num_hidden_layers:
        return f"only {layers} of its {config.num_hidden_layers} layers are attention alone"
    worst = max(_apart(states, want) for states in found)
    return None if worst <= _tolerance(want) else f"its states would differ by {worst:.2g} of their size"


def _apart(states: Tensor, want: Tensor) -> float:
    """Distance as a share of what is wanted."""
    return float((states.float() - want.float()).norm() / want.float().norm())


def _tolerance(want: Tensor) -> float:
    return TOLERANCE if want.dtype == torch.float32 else HALF_TOLERANCE


def _mark(trunk: PreTrainedModel) -> None:
    """Note on a trunk that shares which modules of its last layer may be given no more rows than are read."""
    config = trunk.config.get_text_config(decoder=True)
    sequences = _trial(config.vocab_size).to(trunk.get_input_embeddings().weight.device)
    some = sequences.scored.nonzero().squeeze(1)
    names = token_wise(trunk)
    vars(trunk).pop(MARK, None)
    with torch.no_grad(), _evaluating(trunk):
        want = row_states(trunk, sequences, some)
        for marked in filter(None, (names, names[:-1])):  # without the MLP, where that is a mixture, say
            if _bears_it(trunk, marked, sequences, some, want):
                vars(trunk)[MARK] = marked
                return


def _bears_it(
    trunk: nn.Module, names: tuple[str, ...], sequences: Sequences, places: Tensor, want: Tensor
) -> bool:
    """Whether the states that are read stay what they are when some modules compute nothing else."""
    vars(trunk)[MARK] = names
    try:
        found = row_states(trunk, sequences, places)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a module does with rows that it did not expect; then it gets all of them
        return False
    finally:
        vars(trunk).pop(MARK)
    return _apart(found, want) <= _tolerance(want)


def _alone(trunk: nn.Module, sequences: Sequences) -> Tensor:
    """States (T, D) of each sequence in a pass of its own."""
    rows = sequences.ids.split(sequences.lengths.tolist())
    return torch.cat([trunk(input_ids=ids[None], use_cache=False)[0][0] for ids in rows])


def _mixes_tokens(trunk: nn.Module) -> bool:
    """Whether it has parts that carry something from token to token beside attention."""
    return any(isinstance(module, nn.Conv1d | nn.RNNBase) for module in trunk.modules())


def _layers_that_attend(trunk: nn.Module, sequences: Sequences) -> int:
    """Calls of the tree's attention in one pass."""
    tree = plant(sequences, torch.arange(len(sequences.ids), device=sequences.ids.device))
    with in_force(tree) as masks:
        trunk(**_inputs(sequences, tree))
    return sum(mask.asked for mask in masks)


def _trial(vocabulary: int) -> Sequences:
    """A prompt of 7 tokens with branches of 6, 3 and 0, between two tokens of another sequence."""
    random = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        drawn: list[int] = torch.randint(vocabulary, (count,), generator=random).tolist()
        return drawn

    prompt, other = draw(7), draw(9)
    return Sequences.from_lists(
        [prompt, other, prompt, prompt], [draw(6), [], draw(3), []], groups=[0, 1, 0, 0]
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, so that nothing is drawn; each module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _near_sighted(config: Any) -> Iterator[None]:
    """Windows shorter than the trial's sequences for a while, so that they matter."""
    names = config.to_dict()
    own = {name: names[name] for name in LOCAL if isinstance(names.get(name), int) and names[name] > NEAR}
    for name in own:
        setattr(config, name, NEAR)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)
