"""reward_model: the score that a sequence-classification model gives prompt and completion.

The model reads text through its own tokenizer and chat template; token ids of the policy are never reused, so
the two may differ in both. Leaves out: adapters of the policy's base, and servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._loaded: tuple[Any, Any] | None = None

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
        ids = [self._ids(tokenizer, *pair) for pair in zip(asked, completions, strict=True)]
        sequences = Sequences.from_lists(ids, [[] for _ in ids])
        with torch.no_grad():
            scores: list[float] = classify(model, sequences, token_budget=self.config.batch_tokens).tolist()
        return scores

    def _ids(self, tokenizer: Any, prompt: Any, completion: str) -> list[int]:
        """Prompt and completion as the reward model reads them; never empty."""
        if tokenizer.chat_template is not None:
            asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            talk = [*asked, {"role": "assistant", "content": completion}]
            text = tokenizer.apply_chat_template(talk, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        elif isinstance(prompt, list):
            raise ConfigError(
                "the reward model's tokenizer has no chat template, and the prompts are messages",
                code="E-REWARD-MODEL",
                where=self.config.model,
                hint="give the prompts as text, or save the tokenizer with a chat_template",
            )
        else:
            ids = tokenizer(prompt + completion)["input_ids"]
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
        return list(ids[-self.config.max_length :]) or [tokenizer.eos_token_id or 0]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            from rlx.core.pretrained import Source, load_config, load_weights, translated

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            source = Source.of(self.config.model, role="reward model", revision=self.config.revision)
            source.check_exists()
            with translated(source):
                tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
            if source.folder is not None and (Path(source.folder) / "adapter_config.json").is_file():
                model = _adapted(source.folder, dtype)
            else:
                model = load_weights(
                    source, AutoModelForSequenceClassification, load_config(source), dtype=dtype
                )
            self._loaded = model.to(device).eval().requires_grad_(False), tokenizer
        return self._loaded


def _adapted(folder: Path, dtype: Any) -> Any:
    """A reward model that was saved as an adapter with its score head."""
    from peft import AutoPeftModelForSequenceClassification

    return AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=1, dtype=dtype)
