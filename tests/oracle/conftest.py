"""Whole short runs of ours and of TRL's on one small random model, and the comparison of the two."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

STEPS, ROWS, RATE = 3, 4, 1e-3
TOLERANCE = 1e-5
# Adam divides by the root of the second moment. With its usual ε of 1e-8 it makes of a gradient that is mere
# rounding a step of visible size: of the tokens of a completion, say, whose reward is exactly its group's
# mean, and whose advantage is 0 for ours and 3e-8 for TRL. A larger ε keeps such steps small on both sides.
EPSILON = 1e-5
END, PAD = "<|im_end|>", "<|endoftext|>"  # special tokens that any Qwen2 tokenizer has
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
Row = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without TRL there is nothing to compare with."""
    if find_spec("trl") is not None:
        return
    skip = pytest.mark.skip(
        reason="compares with trl, which has an environment of its own: see CONTRIBUTING.md"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


def _tokenizer() -> Any:
    """Bytes, an end and a pad token; a chat template that marks what the assistant says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, END, PAD])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A causal model and a classifier of two layers, random, each saved with the tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    tokenizer, found = _tokenizer(), {}
    for kind, build in {"policy": Qwen2ForCausalLM, "classifier": Qwen2ForSequenceClassification}.items():
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **({"num_labels": 1} if kind == "classifier" else {}),
        )
        torch.manual_seed(1)
        found[kind] = str(tmp_path_factory.mktemp(kind))
        model = build(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they begin at 0, and nothing can be small relative to that
                torch.nn.init.normal_(parameter, std=config.initializer_range)
        model.save_pretrained(found[kind])
        tokenizer.save_pretrained(found[kind])
    return found


@pytest.fixture(scope="session")
def pairs() -> list[Row]:
    """Preference pairs of random words, of all lengths."""
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(
            "".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(draw.randint(1, most))
        )

    return [
        {"prompt": words(4) + ":", "chosen": " " + words(5), "rejected": " " + words(5)}
        for _ in range(STEPS * ROWS)
    ]


@pytest.fixture
def ours(folders: dict[str, str], tmp_path: Path) -> Callable[..., tuple[list[float], dict[str, Any], Any]]:
    """Train with rlx: the loss of each optimizer step, the final weights, and the run."""
    import rlx

    class Losses:
        def __init__(self) -> None:
            self.seen: list[float] = []

        @rlx.hookimpl
        def on_loss(self, loss: float) -> None:
            self.seen.append(loss)

    def train(algo: str, dataset: list[Row], **options: Any) -> tuple[list[float], dict[str, Any], Any]:
        losses = Losses()
        values = {
            "model": folders["classifier" if algo == "reward" else "policy"],
            "dataset": dataset,
            "chat_template": "none",
            "callback": [losses],
            "batch_size": ROWS,
            "max_steps": STEPS,
            "shuffle": False,
            "learning_rate": RATE,
            "adam_epsilon": EPSILON,
            "max_tokens_per_micro_batch": 96,  # several micro-batches a step, against one of TRL's
            "plots": False,
            "progress": "none",
            "output_dir": str(tmp_path / "ours"),
        }
        values = {name: value for name, value in {**values, **options}.items() if value is not ...}
        with rlx.prepare(algo=algo, **values) as run:
            for _ in run:
                pass
        return losses.seen, dict(run.policy.model.state_dict()), run

    return train


@pytest.fixture
def theirs(folders: dict[str, str], tmp_path: Path) -> Callable[..., Any]:
    """A trainer of TRL's, ready to train, with the same settings."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    def build(trainer: type, config: type, rows: list[Row], more: Row | None = None, **options: Any) -> Any:
        kind = "classifier" if trainer.__name__ == "RewardTrainer" else "policy"
        auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
        settings = {
            "output_dir": str(tmp_path / "theirs"),
            "per_device_train_batch_size": ROWS,
            "max_steps": STEPS,
            "learning_rate": RATE,
            "lr_scheduler_type": "linear",
            "adam_epsilon": EPSILON,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trainer(
                model=auto.from_pretrained(folders[kind], dtype=torch.float32),
                args=config(**{**settings, **options}),
                train_dataset=Dataset.from_list(rows),
                processing_class=AutoTokenizer.from_pretrained(folders[kind]),
                **(more or {}),
            )

    return build


@dataclass
class Table:
    """What was compared and how far apart it was."""

    rows: list[tuple[str, str, float, float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            "| algorithm | variant | loss | weights | training moved weights by |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [f"| {a} | {v} | {x:.1e} | {w:.1e} | {m:.1e} |" for a, v, x, w, m in self.rows]
        return "\n".join(lines)


@pytest.fixture(scope="session")
def table() -> Iterator[Table]:
    """The table of a session, printed at its end; ``pytest -s`` shows it."""
    found = Table()
    yield found
    print(f"\n\nLargest relative differences, {STEPS} batches:\n\n{found}")


@pytest.fixture
def same(table: Table, folders: dict[str, str]) -> Callable[..., None]:
    """Asserts that a run of ours and TRL's trainer, which it trains, end with the same losses and weights."""

    def compare(
        variant: str, run: tuple[list[float], dict[str, Any], Any], trainer: Any, *, scale: float = 0
    ) -> None:
        """``scale``: what losses are at least measured by, for those that cancel to about 0."""
        from safetensors.torch import load_file

        losses, weights, done = run
        seen: list[float] = []
        step = trainer.training_step

        def training_step(*arguments: Any, **options: Any) -> Any:
            loss = step(*arguments, **options)
            seen.append(float(loss))
            return loss

        trainer.training_step = training_step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        assert len(seen) == len(losses) > 0
        theirs = dict(trainer.model.state_dict())
        start = load_file(
            Path(folders["classifier" if "score.weight" in theirs else "policy"]) / "model.safetensors"
        )
        assert set(theirs) == set(weights) == set(start)
        apart = max(abs(a - b) / max(abs(b), scale) for a, b in zip(losses, seen, strict=True))
        far = max(
            float((weights[n] - w).abs().max() / w.abs().max().clamp(min=RATE)) for n, w in theirs.items()
        )
        moved = max(float((w - start[n]).abs().max() / w.abs().max()) for n, w in theirs.items())
        table.rows.append((done.config.settings.algo, variant, apart, far, moved))
        assert moved > 100 * TOLERANCE
        assert apart <= TOLERANCE, f"losses {losses}, TRL's {seen}"
        assert far <= TOLERANCE

    return compare
