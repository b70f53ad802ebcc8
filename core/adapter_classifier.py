"""A sequence classifier made of the policy's base, a frozen adapter and a score head: one base, used twice.

The adapter is in use for the time of a call alone. Whatever happens inside, the policy and its reference
compute, train and save afterwards what they did before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlx.core import adapters
from rlx.core.adapter_files import (
    ADAPTER_FILE,
    CAUSAL_TASKS,
    CLASSIFIER_TASKS,
    check_folder,
    score_head,
)
from rlx.core.classify import last_token_scores
from rlx.core.errors import ConfigError
from rlx.core.fingerprints import of_folder
from rlx.core.models import VALUE, Policy, in_mode
from rlx.core.pretrained import ADAPTER_CONFIG_FILE, Source, check_finite, read_json
from rlx.core.text import safe_text
from rlx.core.values import VALUE_HEAD_FILE, ValueHead, fill_value_head, load_value_head

if TYPE_CHECKING:
    from rlx.core.batch import Sequences


class AdapterClassifier:
    """Scores sequences with an adapter of the policy's base that was trained as a classifier.

    Args:
        policy: trained with an adapter of its own; gets a further, frozen one.
        folder: a LoRA adapter with a score head: what ``--algo reward`` saves, or a causal adapter with
            ``value_head.safetensors`` beside it.

    Attributes:
        name: of the frozen adapter on the policy's base.

    Raises:
        ConfigError: the policy's base is trained, or the adapter is not of this base, not plain LoRA, or has
            no head of one score.
        DivergedError: one of its weights is not finite.
    """

    def __init__(self, policy: Policy, folder: Path) -> None:
        _check_base_stays(policy, folder)
        self._policy = policy
        self._head = _head(policy, folder)
        policy.report += _check_same_base(policy, folder)
        self.name = adapters.free_name(policy.model, f"{policy.adapter}-reward")
        adapters.add_frozen(policy.model, self.name, *_plain_lora(policy, folder), where=str(folder))

    def scores(self, sequences: Sequences, token_budget: int = 4096) -> torch.Tensor:
        """(N,) float32, the score at each sequence's last token, without gradient.

        Args:
            sequences: none empty.
            token_budget: padded tokens of one forward pass.
        """
        model = self._policy.model
        trunk = self._policy.base.base_model
        with (
            in_mode(model, False),
            torch.no_grad(),
            adapters.adapter_switched(model, self.name),
        ):
            return last_token_scores(trunk, self._head, sequences, token_budget=token_budget)


def _check_base_stays(policy: Policy, folder: Path) -> None:
    """Refuse a policy whose base moves: the adapter belongs to the base as it was."""
    own = {} if policy.adapter is None else adapters.adapter_parameters(policy.model, policy.adapter)
    mine = {id(parameter) for parameter in own.values()}
    moving = [
        name
        for name, parameter in policy.trainable().items()
        if not name.startswith(VALUE) and id(parameter) not in mine
    ]
    if moving:
        raise base_moves(folder, f"{len(moving)} trained weights of the base, first {moving[0]!r}")


def base_moves(folder: str | Path, got: str) -> ConfigError:
    """The error of an adapter that is to score on a base that is trained.

    Args:
        folder: the adapter.
        got: what is trained.
    """
    return ConfigError(
        "the reward adapter belongs to the original base, and this run trains the base itself",
        code="E-ADAPTER",
        where=str(folder),
        got=got,
        expected="a policy that is an adapter: lora_r or adapter",
        hint=f"--lora-r 16; or score with {_own_base(folder)}",
    )


def _own_base(folder: str | Path) -> str:
    """What does the same with more memory."""
    return f"a base of its own: --reward reward_model --reward_model.model {folder}"


def _plain_lora(policy: Policy, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Configuration and weights of the adapter's trunk, its head left out.

    Raises:
        ConfigError: it changes more than what LoRA adds, or its base is another one.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(str(folder))
    drawn = config.init_lora_weights
    beyond = {
        "a method other than LoRA": config.peft_type.value != "LORA",
        f"bias: {config.bias}": config.bias != "none",
        "trainable_token_indices": bool(config.trainable_token_indices),
        f"init_lora_weights: {drawn}, which changes the base": isinstance(drawn, str) and drawn != "gaussian",
        "modules_to_save beside the head": bool(set(config.modules_to_save or ()) - {"score", "classifier"}),
    }
    found = [what for what, there in beyond.items() if there]
    if found:
        raise ConfigError(
            "the reward adapter is more than LoRA matrices and a score head",
            code="E-ADAPTER",
            where=str(folder),
            got=", ".join(found),
            hint=f"score with {_own_base(folder)}",
        )
    config.task_type, config.modules_to_save, config.init_lora_weights = "CAUSAL_LM", None, True
    config.lora_dropout = 0.0
    tensors = load_file(str(folder / ADAPTER_FILE))
    check_finite(tensors, str(folder / ADAPTER_FILE))
    return config, {name: tensor for name, tensor in tensors.items() if ".score." not in name}


def _head(policy: Policy, folder: Path) -> ValueHead:
    """The score head that was saved with the adapter, in float32.

    Raises:
        ConfigError: there is none, or it is for hidden states of another size.
    """
    check_folder(policy.model, folder, (*CAUSAL_TASKS, *CLASSIFIER_TASKS))
    head, found, beside = ValueHead(policy.hidden_size), score_head(folder), folder / VALUE_HEAD_FILE
    if found is not None:
        fill_value_head(head, *found, where=str(folder / ADAPTER_FILE))
    elif beside.is_file():
        load_value_head(head, beside)
    else:
        raise ConfigError(
            "the reward adapter has no score head",
            code="E-ADAPTER",
            where=str(folder),
            got=safe_text(read_json(folder / ADAPTER_CONFIG_FILE).get("task_type"), 40),
            expected=f"a SEQ_CLS adapter with its score head, or {VALUE_HEAD_FILE} beside a CAUSAL_LM one",
            hint="train one: rlx run --algo reward --lora-r 16",
        )
    check_finite(dict(head.named_parameters()), f"score head of {folder}")
    return head.requires_grad_(False).to(next(policy.model.parameters()).device)


def _check_same_base(policy: Policy, folder: Path) -> list[str]:
    """A line that says so where it cannot be known that the adapter was trained on the policy's base.

    Raises:
        ConfigError: it was trained on another one.
    """
    theirs = str(read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path") or "")
    ours = str(policy.base.name_or_path)
    if theirs == ours:
        return []
    places = [Source.of(name, role="base").folder if name else None for name in (theirs, ours)]
    both_here = all(place is not None for place in places)
    # A folder's base may be a copy of the hub's, which nothing here can tell.
    both_on_hub = bool(theirs and ours) and not any(places)
    if both_here and of_folder(places[0]) == of_folder(places[1]):  # type: ignore[arg-type]  # none is None
        return []
    if both_here or both_on_hub:
        raise ConfigError(
            "the reward adapter is for another base",
            code="E-ADAPTER",
            where=str(folder),
            got=f"adapter of {safe_text(theirs, 120)}, policy's base {safe_text(ours, 120)}",
            expected="an adapter that was trained on the policy's base",
            hint=f"score with {_own_base(folder)}",
        )
    return [
        f"reward adapter {folder}: trained on {safe_text(theirs or 'an unnamed base', 120)}, taken to be "
        f"{safe_text(ours or 'the model object', 120)}"
    ]
