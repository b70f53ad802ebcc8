import pytest
from transformers import AutoTokenizer

from rlx.plugins.datasets import tiny_path


@pytest.fixture(scope="session")
def chat_tokenizer():
    """The packaged tokenizer; it has a chat template."""
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="session")
def plain_tokenizer():
    """The same without a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.chat_template = None
    return tokenizer
