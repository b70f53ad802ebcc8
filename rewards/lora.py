"""lora: the score of a LoRA adapter of the policy's own base, a reward model that costs no second base.

The adapter is a sequence classifier's, as ``--algo reward --lora-r 16`` saves it on the base that the policy
is trained on. For a score it takes the policy's place on the base for a moment, its own head reads the last
token, and the policy is put back. Leaves out: policies that train the base itself, for which ``reward_model``
has a base of its own.

Run it: ``rlx run --reward lora:DIR --lora-r 16``
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlx.core.errors import ConfigError
from rlx.core.options import opt
from rlx.plugins.contract import Reward
from rlx.rewards.reward_model import token_ids


class LoraReward(Reward):
    """Scores of a classifier's LoRA adapter on the policy's base, read as ``reward_model`` reads them.

    The adapter's own tokenizer and chat template are used where they lie beside it, else the policy's.

    Source: arXiv:2203.02155, section 3.5; one base for all arXiv:2106.09685
    """

    @dataclass(frozen=True)
    class Config:
        """Options of lora."""

        path: str = opt(doc="folder of a LoRA adapter with a score head, trained on the policy's base")
        max_length: int = opt(1024, "longest text; what is longer loses its beginning", gt=1, unit="tokens")
        batch_tokens: int = opt(4096, "padded tokens of one forward pass", gt=0, unit="tokens")

    needs_policy: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._attached: tuple[Any, Any] | None = None
        if not (Path(config.path) / "adapter_config.json").is_file():
            raise ConfigError(
                f"the reward adapter {config.path!r} does not exist",
                code="E-ADAPTER",
                expected="a local folder with adapter_config.json",
                hint="train one: rlx run --algo reward --lora-r 16 --output-dir DIR",
            )

    def attach(self, policy: Any) -> None:
        """Put the adapter on the policy's base, frozen, beside the policy's own.

        Raises:
            ConfigError: the policy trains its base, or the adapter is none of a classifier on this base.
            DivergedError: one of its weights is not finite.
        """
        from rlx.core.adapter_classifier import AdapterClassifier
        from rlx.core.pretrained import Source, translated
        from rlx.core.tokenizer import check_vocabulary

        folder, tokenizer = Path(self.config.path), policy.tokenizer
        classifier = AdapterClassifier(policy, folder)
        if (folder / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer

            source = Source.of(str(folder), role="reward adapter")
            with translated(source):
                tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
            check_vocabulary(policy.base, tokenizer)
        self._attached = classifier, tokenizer

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[str],
        prompt: list[Any] | None = None,
        **columns: list[Any],
    ) -> list[float]:
        """One score a completion; arguments as of ``reward_model``."""
        from rlx.core.batch import Sequences

        if self._attached is None:
            raise ConfigError("the reward lora scores with a run's policy; attach(policy) was not called")
        classifier, tokenizer = self._attached
        asked = prompts if prompt is None else prompt
        ids = [
            token_ids(tokenizer, *pair, longest=self.config.max_length, where=self.config.path)
            for pair in zip(asked, completions, strict=True)
        ]
        sequences = Sequences.from_lists(ids, [[] for _ in ids])
        scores: list[float] = classifier.scores(sequences, self.config.batch_tokens).tolist()
        return scores


def check_policy(config: Any) -> None:
    """Refuse a run that trains its base: the adapter belongs to the base as it was.

    Args:
        config: the resolved ``rlx.core.config.RunConfig``.

    Raises:
        ConfigError: neither ``lora_r`` nor ``adapter`` is set, and the model is no object from Python.
    """
    settings = config.settings
    if settings.lora_r or settings.adapter or settings.model.startswith("object-"):
        return
    from rlx.core.adapter_classifier import base_moves

    for path in _paths(config):
        raise base_moves(path, "lora_r: 0, which trains all weights")


def _paths(config: Any) -> Iterator[str]:
    """The adapters that score: a run's rewards, and those that its judge and that of win_rate ask."""
    from rlx.core.components import choose_judge, read_specs

    yield from (component.options["path"] for component, _ in config.rewards if component.ref == "lora")
    judges = [] if config.judge is None else [config.judge]
    for callback in config.callbacks:
        if callback.ref == "win_rate":
            judges.append(choose_judge(callback.options["judge"], callback.options["rewards"]))
    for judge in judges:
        if judge.ref == "reward":
            specs, _ = read_specs("reward", judge.options["rewards"], "rewards", {})
            yield from (spec.given.get("path", "") for spec in specs if spec.ref == "lora")
