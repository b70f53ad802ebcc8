"""Value functions: a scalar head on the policy's own backbone, or a separate model with such a head.

A head is a module of its own, so that a policy's folder stays a plain Hugging Face folder; it is kept beside
it as ``value_head.safetensors``. Heads that other tools saved under ``v_head.summary.{weight,bias}`` load as
well.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlx.core.batch import Sequences, flat_index
from rlx.core.errors import ConfigError
from rlx.core.pretrained import Source, check_safetensors_file, load_config, load_weights, restore_weights
from rlx.core.states import micro_batches, states

VALUE_HEAD_FILE = "value_head.safetensors"
_PREFIXES = (
    "",
    "v_head.summary.",
    "summary.",
    "score.",
)  # ours, TRL's, TRL's without its module, a classifier's


class ValueHead(nn.Module):
    """A linear map from a hidden state to one number, in float32 whatever the backbone's type.

    It starts at zero, so that every first value is 0: the first advantages are then the returns themselves.

    Args:
        hidden_size: D, numbers of a hidden state.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) hidden states → (…,) float32 values."""
        # float32 also under autocast: a value is a regression target, and bf16 keeps three digits of it.
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight.float() + self.bias.float()


class ValueModel(nn.Module):
    """A value function with a backbone of its own.

    Args:
        backbone: a transformers decoder without output head.
        head: hidden states → values.
    """

    def __init__(self, backbone: Any, head: ValueHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def load(cls, source: Source, *, dtype: torch.dtype, report: list[str] | None = None) -> ValueModel:
        """A value model from a reward model, a causal language model or a saved value model.

        A reward model's ``score`` becomes the head. Otherwise the head is read from
        ``value_head.safetensors`` in the folder, or from ``v_head.summary`` among the model's weights; where
        neither exists it starts at zero.

        Args:
            source: a folder or hub id.
            dtype: type of the backbone's weights.
            report: gets a line that says where the head comes from.

        Raises:
            ConfigError: weights are missing, or a classifier has several outputs.
        """
        from transformers import AutoModel, AutoModelForSequenceClassification

        config = load_config(source)
        if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            if config.num_labels != 1:
                raise _several_outputs(source.name, config.num_labels)
            model = cls.around(load_weights(source, AutoModelForSequenceClassification, config, dtype=dtype))
            origin = "the reward model's score"
        else:
            model = cls.around(load_weights(source, AutoModel, config, dtype=dtype))
            origin = load_head_beside(model.head, [] if source.folder is None else [source.folder])
        if report is not None:
            report.append(f"value model: {source.name}, head from {origin}")
        return model

    @classmethod
    def around(cls, model: Any) -> ValueModel:
        """A value model on the weights of a model object: a reward model's with its score, others from zero.

        Raises:
            ConfigError: a classifier with several outputs.
        """
        if isinstance(model, ValueModel):
            return model
        head = ValueHead(_hidden_size(model.config))
        if type(model).__name__.endswith("ForSequenceClassification"):
            if model.config.num_labels != 1:
                raise _several_outputs(model.name_or_path, model.config.num_labels)
            fill_value_head(head, model.score.weight, model.score.bias, where=model.name_or_path)
        return cls(model.base_model, head)

    def values(self, sequences: Sequences, token_budget: int = 4096) -> Tensor:
        """The value of the state before each scored token.

        With gradients enabled this is one differentiable pass over all sequences: cut them before. Without,
        they are cut here by token budget.

        Args:
            sequences: on any device.
            token_budget: tokens of a forward pass, when no gradient is wanted.

        Returns:
            (S,) float32, in the order of the scored tokens, on the model's device.
        """
        sequences = sequences.to(self.head.weight.device)
        some = sequences.counts.nonzero().squeeze(1)
        if not len(some):
            return self.head.weight.new_zeros(0)
        if torch.is_grad_enabled():
            return self.forward(sequences)
        taken = sequences.take(some)
        parts = [some[part] for part in micro_batches([self.backbone], taken, token_budget)]
        out = self.head.weight.new_zeros(int(sequences.scored.sum()))
        out[flat_index(sequences.counts, torch.cat(parts))] = torch.cat(
            [self.forward(sequences.take(part)) for part in parts]
        )
        return out

    def forward(self, sequences: Sequences) -> Tensor:
        """Values (S,) of sequences on the model's device, in one pass."""
        before = sequences.scored.nonzero().squeeze(1) - 1  # the state before a token is one to its left
        return self.head.forward(states(self.backbone, sequences, before))

    def save_pretrained(self, folder: Path) -> None:
        """Write the backbone as a plain Hugging Face folder, and the head beside it."""
        self.backbone.save_pretrained(str(folder))
        save_value_head(self.head, folder)

    def restore(self, folder: Path) -> None:
        """Take back, bit for bit, what ``save_pretrained`` wrote."""
        restore_weights(self.backbone, folder)
        load_value_head(self.head, folder / VALUE_HEAD_FILE)


def _hidden_size(config: Any) -> int:
    return int(config.get_text_config(decoder=True).hidden_size)


def _several_outputs(name: str, outputs: int) -> ConfigError:
    return ConfigError(
        f"value_model {name!r} has {outputs} outputs",
        code="E-VALUE-HEAD",
        expected="a reward model with num_labels 1, or a causal language model",
    )


def load_head_beside(head: ValueHead, folders: Iterable[Path]) -> str:
    """Fill a head from the first of some model folders that has one.

    Returns:
        Where it came from, for the report; ``zeros`` if none has one and the head is as it was.
    """
    from safetensors import safe_open

    for folder in folders:
        beside, whole = folder / VALUE_HEAD_FILE, folder / "model.safetensors"
        if beside.is_file():
            load_value_head(head, beside)
            return str(beside)
        if whole.is_file():
            with safe_open(str(whole), framework="pt") as tensors:
                weight, bias = "v_head.summary.weight", "v_head.summary.bias"
                if {weight, bias} <= set(tensors.keys()):
                    fill_value_head(
                        head, tensors.get_tensor(weight), tensors.get_tensor(bias), where=str(whole)
                    )
                    return f"v_head.summary in {whole}"
    return "zeros"


def save_value_head(head: ValueHead, folder: Path) -> Path:
    """Write a head beside its model.

    Returns:
        The file.
    """
    from safetensors.torch import save_file

    file = folder / VALUE_HEAD_FILE
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, str(file), metadata={"format": "pt"})
    return file


def load_value_head(head: ValueHead, file: Path) -> None:
    """Fill a head in place from a file, ours or one with ``v_head.summary.{weight,bias}``.

    A head without a bias (a classifier's ``score``) keeps the bias 0.

    Raises:
        ConfigError: no such file or head in it, or one for another hidden size.
    """
    from safetensors.torch import load_file

    if not file.is_file():
        raise ConfigError(
            "there is no value head",
            code="E-VALUE-HEAD",
            where=str(file),
            hint="name a folder with value_head.safetensors, or leave it out to start from zeros",
        )
    check_safetensors_file(file)
    tensors = load_file(str(file))
    for prefix in _PREFIXES:
        if prefix + "weight" in tensors:
            fill_value_head(head, tensors[prefix + "weight"], tensors.get(prefix + "bias"), where=str(file))
            return
    raise ConfigError(
        "the file holds no value head",
        code="E-VALUE-HEAD",
        where=str(file),
        got=", ".join(sorted(tensors)[:5]) or "nothing",
        expected="weight and bias, or v_head.summary.weight and v_head.summary.bias",
    )


def fill_value_head(head: ValueHead, weight: Tensor, bias: Tensor | None, *, where: str) -> None:
    """Copy numbers into a head in place.

    Args:
        head: what is filled.
        weight: D numbers, as (D,) or (1, D).
        bias: one number, as () or (1,); None counts as 0.
        where: what they come from, for messages.

    Raises:
        ConfigError: if there are more or fewer numbers than the head has.
    """
    if weight.numel() != head.weight.numel() or (weight.dim() == 2 and weight.shape[0] != 1):
        raise ConfigError(
            "the value head is for another model",
            code="E-VALUE-HEAD",
            where=where,
            got=f"weights of shape {tuple(weight.shape)}",
            expected=f"one value from hidden states of {head.weight.numel()} numbers",
        )
    with torch.no_grad():
        head.weight.copy_(weight.reshape(-1))
        head.bias.copy_(torch.zeros(()) if bias is None else bias.reshape(()))
