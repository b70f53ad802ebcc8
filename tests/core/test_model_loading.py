"""Classifiers as policies: a new score head, saved and loaded as transformers and peft do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlx.core.batch import Sequences
from rlx.core.classify import classify
from rlx.core.errors import ConfigError
from rlx.core.model_loading import load_adapted_classifier
from rlx.core.models import Policy, load_policy
from rlx.core.settings import Settings

SEQUENCES = Sequences.from_lists([[3, 4], [5], [6, 7, 8]], [[9], [10, 11, 12], []])


def scores(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return classify(policy.model, SEQUENCES)


def load(folder: Path, **options: Any) -> Policy:
    return load_policy(Settings(model=str(folder), **options), classifier=True)


def test_a_language_model_gets_a_score_head_from_the_seed(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    torch.manual_seed(1)
    first, state = load(folder), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(scores(first), scores(load(folder)))
    assert not torch.equal(scores(first), scores(load(folder, seed=5)))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # drawing the head used up no other random number
    assert "score head: new, drawn from the seed" in first.report
    assert "score.weight" in first.trainable()


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_saved_classifier_comes_back_bit_for_bit(
    make_folder: Callable[..., Path], tmp_path: Path, lora_r: int
) -> None:
    folder = make_folder()
    policy = load(folder, lora_r=lora_r)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    policy.save_pretrained(tmp_path / "out")
    again = load(folder, lora_r=lora_r, seed=9)
    assert not torch.equal(scores(again), scores(policy))
    again.load_trainable(tmp_path / "out")
    assert torch.equal(scores(again), scores(policy))
    assert any("score" in name for name in policy.trainable())


def test_a_saved_classifier_is_a_plain_folder(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    policy = load(make_folder())
    policy.save_pretrained(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == policy.tokenizer.pad_token_id
    rows = SEQUENCES.ids.split(SEQUENCES.lengths.tolist())
    with torch.no_grad():
        want = torch.stack([plain(input_ids=ids[None]).logits[0, 0] for ids in rows])
    torch.testing.assert_close(scores(policy), want, rtol=1e-5, atol=1e-5)
    trained = load(tmp_path / "out", seed=3)
    assert torch.equal(scores(trained), scores(policy))  # its own head, not a new one
    assert f"score head: from {tmp_path / 'out'}" in trained.report


def test_a_language_model_object_is_no_classifier(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no head called 'score'"):
        load_policy(Settings(), model=tiny_model(), tokenizer=tiny_tokenizer(), classifier=True)


def test_other_missing_weights_are_not_made_up(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_folder()
    file = folder / "model.safetensors"
    tensors = load_file(str(file))
    del tensors["model.norm.weight"]
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        load(folder)


@pytest.fixture
def judge(make_folder: Callable[..., Path], tmp_path: Path) -> Policy:
    """A classifier whose adapter and score head matter, saved to ``judge``."""
    policy = load(make_folder(), lora_r=4)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    policy.save_pretrained(tmp_path / "judge")
    return policy


def test_training_goes_on_from_the_adapter_of_a_classifier(judge: Policy, tmp_path: Path) -> None:
    again = load(tmp_path / "base", adapter=str(tmp_path / "judge"), seed=9)
    # Weights bit for bit; scores to rounding, which attention backends do each in its own way.
    torch.testing.assert_close(scores(again), scores(judge), rtol=1e-5, atol=1e-5)
    assert again.trainable().keys() == judge.trainable().keys()
    assert all(torch.equal(p, judge.trainable()[name]) for name, p in again.trainable().items())
    assert f"score head: from {tmp_path / 'judge'}" in again.report
    frozen = load_adapted_classifier(tmp_path / "judge", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(classify(frozen, SEQUENCES), scores(judge), rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T8] task")])
def test_an_adapter_must_be_for_the_task(_: int, judge: Policy, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    load_policy(Settings(model=base, lora_r=4)).save_pretrained(tmp_path / "writer")
    with pytest.raises(ConfigError, match="another task") as caught:
        load(Path(base), adapter=str(tmp_path / "writer"))
    assert (caught.value.got, caught.value.expected) == ("CAUSAL_LM", "SEQ_CLS")
    assert "merge it" in caught.value.hint and caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="another task") as caught:
        load_policy(Settings(model=base, adapter=str(tmp_path / "judge")))
    assert (caught.value.got, caught.value.expected) == ("SEQ_CLS", "CAUSAL_LM")
    assert "--algo reward" in caught.value.hint and "lora:" in caught.value.hint


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T10] adapter")])
def test_an_adapter_without_a_head_of_one_score_is_refused(_: int, judge: Policy, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / "judge" / "adapter_model.safetensors"
    tensors = load_file(str(file))
    head = tensors.pop("base_model.model.score.weight")
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no score head"):
        load(tmp_path / "base", adapter=str(tmp_path / "judge"))
    tensors["base_model.model.score.weight"] = head.repeat(3, 1)
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no single score") as caught:
        load(tmp_path / "base", adapter=str(tmp_path / "judge"))
    assert caught.value.got == "3 labels" and caught.value.exit_code == 2
