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
