"""The tokenizer: its pad token, and whether completions can end."""

from __future__ import annotations

import pytest

from rlx.core.errors import ConfigError
from rlx.core.models import load_policy
from rlx.core.settings import Settings
from rlx.core.tokenizer import load_tokenizer, ready_tokenizer


@pytest.mark.parametrize(
    ("special", "pad", "told"),
    [
        ({"pad_token": None}, "<pad>", "chosen"),
        ({"pad_token": "<eos>"}, "<eos>", "pad token is the EOS token"),
    ],
    ids=["fault[T1]", "fault[T2]"],
)
def test_the_pad_token_is_an_existing_one_and_is_reported(
    special, pad, told, tiny_tokenizer, tmp_path, tiny_model
):
    tiny_tokenizer(**special).save_pretrained(tmp_path)
    report = []
    tokenizer = load_tokenizer(Settings(tokenizer=str(tmp_path)), report=report)
    assert tokenizer.pad_token == pad and len(tokenizer) == 19
    assert told in "\n".join(report)
    policy = load_policy(Settings(), tokenizer=tokenizer, model=tiny_model())
    assert policy.model.get_input_embeddings().weight.shape[0] == 32  # nothing was resized


def test_without_a_reserved_token_the_pad_token_is_unknown_and_then_eos(tiny_tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for special, chosen in [({"unk_token": "<unk>", "eos_token": "b"}, "<unk>"), ({"eos_token": "b"}, "b")]:
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
        tokenizer = ready_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words, **special))
        assert tokenizer.pad_token == chosen and len(tokenizer) == 3


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T3]")])
def test_a_tokenizer_without_eos_is_refused_unless_something_else_ends_a_completion(
    _, tiny_tokenizer, tmp_path
):
    tiny_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(Settings(tokenizer=str(tmp_path)))
    assert caught.value.code == "E-TOKENIZER-EOS" and caught.value.exit_code == 2
    assert load_tokenizer(Settings(tokenizer=str(tmp_path), stop_strings=["."])).eos_token_id is None
    assert load_tokenizer(Settings(tokenizer=str(tmp_path)), stop_token_ids=(3,)).eos_token_id is None
