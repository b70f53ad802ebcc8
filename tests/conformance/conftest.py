"""Models that some built-in components are built with."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small random model that gives each text a score."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from rlx.plugins.datasets import tiny_path

    folder = tmp_path_factory.mktemp("classifier")
    config = AutoConfig.from_pretrained(tiny_path(), num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random LoRA adapter of the packaged model that gives each text a score."""
    import torch

    from rlx.core.models import load_policy
    from rlx.core.settings import Settings

    folder = tmp_path_factory.mktemp("adapter")
    policy = load_policy(Settings(lora_r=2), classifier=True)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.save_pretrained(folder)
    return str(folder)
