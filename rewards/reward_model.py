"""reward_model: the score that a sequence-classification model gives prompt and completion.

The model reads text through its own tokenizer and chat template; token ids of the policy are never reused, so
the two may differ in both. An adapter of the policy's own base is ``lora``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Reward


class RewardModel(Reward):
    """Scores of a model with one label, for example one that ``--algo reward`` trained.

    Source: arXiv:2203.02155, section 3.5
    """

    @dataclass(frozen=True)
    class Config:
        """Options of reward_model."""

        model: str = opt(doc="a folder or hub id of a sequence-classification model, or of an adapter of one")
        revision: str | None = opt(None, "branch, tag or commit on the hub")
        max_length: int = opt(1024, "longest text; what is longer loses its beginning", gt=1, unit="tokens")
        batch_tokens: int = opt(4096, "padded tokens of one forward pass", gt=0, unit="tokens")
        dtype: str = opt(
            "auto",
            "of its weights: auto is bfloat16 on a GPU, float32 on a CPU",
            choices=("auto", "float32", "bfloat16", "float16"),
        )

    def __init__(self, config: Config) -> None:
        from rlx.core.pretrained import Source

        super().__init__(config)
        self._loaded: tuple[Any, Any] | None = None
        self._source = Source.of(config.model, role="reward model", revision=config.revision)
        self._source.check_exists()

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[str],
        prompt: list[Any] | None = None,
        **columns: list[Any],
    ) -> list[float]:
        """One score a completion.

        Args:
            prompts: N message lists, or N texts as the policy sees them.
            completions: N texts.
            prompt: N prompts as the data has them, before the policy's chat template; used where given.
            columns: the data's other columns, unused.

        Raises:
            ConfigError: the model cannot be loaded or has more than one label.
        """
        import torch

        from rlx.core.batch import Sequences
        from rlx.core.classify import classify

        model, tokenizer = self._load()
        asked = prompts if prompt is None else prompt
        ids = [
            token_ids(tokenizer, *pair, longest=self.config.max_length, where=self.config.model)
            for pair in zip(asked, completions, strict=True)
        ]
        sequences = Sequences.from_lists(ids, [[] for _ in ids])
        with torch.no_grad():
            scores: list[float] = classify(model, sequences, token_budget=self.config.batch_tokens).tolist()
        return scores

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            from rlx.core.model_loading import load_adapted_classifier
            from rlx.core.precision import DTYPES
            from rlx.core.pretrained import (
                ADAPTER_CONFIG_FILE,
                load_config,
                load_weights,
                translated,
            )

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            own = torch.bfloat16 if device.type == "cuda" else torch.float32
            dtype = DTYPES.get(self.config.dtype, own)
            source = self._source
            with translated(source):
                tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
            if source.folder is not None and (source.folder / ADAPTER_CONFIG_FILE).is_file():
                model = load_adapted_classifier(source.folder, dtype)
            else:
                model = load_weights(
                    source, AutoModelForSequenceClassification, load_config(source), dtype=dtype
                )
            self._loaded = model.to(device).eval().requires_grad_(False), tokenizer
        return self._loaded


def token_ids(tokenizer: Any, prompt: Any, completion: str, *, longest: int, where: str) -> list[int]:
    """Prompt and completion as a reward model reads them; never empty.

    Args:
        tokenizer: the reward model's.
        prompt: a message list, or text.
        completion: text.
        longest: tokens; what is over loses its beginning.
        where: the reward model, for messages.

    Raises:
        ConfigError: the prompt is a message list, and the tokenizer has no chat template.
    """
    if tokenizer.chat_template is not None:
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        talk = [*asked, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif isinstance(prompt, list):
        raise ConfigError(
            "the reward model's tokenizer has no chat template, and the prompts are messages",
            code="E-REWARD-MODEL",
            where=where,
            hint="give the prompts as text, or save the tokenizer with a chat_template",
        )
    else:
        ids = tokenizer(prompt + completion)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
    return list(ids[-longest:]) or [tokenizer.eos_token_id or 0]
