"""PPO on real questions, with the reward of an installed package."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlx
from rlx.plugins.datasets import tiny_path

REPOSITORY = Path(__file__).parents[2]
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k_train.jsonl.gz"
LONGEST = 12

pytestmark = [
    pytest.mark.skipif(not GSM8K.exists(), reason=f"the data is not at {GSM8K}"),
    # Not ours: peft asks for a property that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """examples/my_pkg as pip installs it, importable for these tests alone."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    subprocess.run(
        [*pip, "--target", str(site), str(REPOSITORY / "examples" / "my_pkg")], check=True, timeout=120
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield site
    sys.modules.pop("my_pkg", None)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a random Qwen2 of 50 million parameters and a tokenizer learnt from the questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["question"] for line, _ in zip(lines, range(500), strict=False)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=2048, hidden_size=640, intermediate_size=2048, num_hidden_layers=10,
            num_attention_heads=10, num_key_value_heads=2, tie_word_embeddings=True,
            max_position_embeddings=1024, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    assert 45e6 < sum(parameter.numel() for parameter in model.parameters()) < 55e6
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(folder: Path, **changes: Any) -> Any:
    values = {
        "algo": "ppo",
        "reward": "my_pkg:MyReward",
        "dataset": str(GSM8K),
        "columns": {"prompt": "question"},
        "max_rows": 64,
        "batch_size": 4,
        "num_ppo_epochs": 1,
        "max_completion_length": LONGEST,
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "log_completions": -1,
        "progress": "none",
        "output_dir": str(folder / "run"),
    }
    return rlx.run(**{**values, **changes})


CASES = [
    pytest.param("tiny", 0, id="tiny"),
    pytest.param("tiny", 8, id="tiny, LoRA"),
    pytest.param("qwen", 0, id="Qwen2 of 50M", marks=pytest.mark.slow),
    pytest.param("qwen", 8, id="Qwen2 of 50M, LoRA", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "rank"), CASES)
def test_ppo_on_real_questions(model, rank, installed, request, tmp_path, check, recwarn):
    name = "tiny" if model == "tiny" else str(request.getfixturevalue("qwen"))
    base = tiny_path() if model == "tiny" else name
    result = train(tmp_path, model=name, lora_r=rank)

    check(result.metrics, length=LONGEST)
    assert [str(w.message) for w in recwarn] == []

    assert len(result.completions) == 8  # two steps of four
    for sample in result.completions:
        assert 0 <= sample["score"] == sample["rewards"]["MyReward"] <= 1
        assert sample["prompt"].strip() and len(sample["completion"]) > 0
    assert [line["step"] for line in result.metrics] == [1, 2]
    on_disk = (result.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in on_disk] == result.metrics
    assert json.loads((result.folder / "manifest.json").read_text())["status"] == "finished"
    assert "MyReward" in (result.folder / "README.md").read_text()
    assert (result.folder / "plots" / "overview.png").read_bytes()[:4] == b"\x89PNG"
    assert (result.folder / "value_head.safetensors").is_file()

    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    if rank:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), result.folder
        )
    else:
        loaded = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    ids = tokenizer("How many apples are left?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ours = result.policy.model.eval()(input_ids=ids).logits
        assert torch.allclose(loaded.eval()(input_ids=ids).logits, ours, atol=1e-4)


def test_questions_that_are_too_long_are_named(installed, tmp_path):
    with pytest.raises(rlx.DataError) as caught:
        train(tmp_path, max_rows=500)
    assert "1 of 500" in caught.value.what and "gsm8k_train.jsonl.gz:400" in caught.value.where
    assert not (tmp_path / "run").exists()
