"""reward_model: the model's own score of prompt and completion, through its own tokenizer."""

from __future__ import annotations

import json

import pytest
import torch

from rlx.core.batch import Prompts
from rlx.core.errors import ConfigError, RlxError
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.plugins.datasets import tiny_path
from rlx.plugins.references import make

PROMPTS = ["How many?", "Tom has 3 toys."]
COMPLETIONS = ["Answer: 4", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_path())
    config.num_labels = 1
    path = tmp_path_factory.mktemp("judge")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(path)
    return path


def own_scores(folder, texts, special):
    """The model's own forward on each text alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [
            float(model(**tokenizer(text, add_special_tokens=special, return_tensors="pt")).logits[0, 0])
            for text in texts
        ]


def test_scores_are_the_models_own_of_the_rendered_conversation(folder):
    reward = make("reward", "reward_model", {"model": str(folder)})
    texts = [f"<|user|>{p}<|end|><|assistant|>{c}<|end|>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    got = reward(prompts=["ignored"] * 2, completions=COMPLETIONS, prompt=PROMPTS)
    assert got == pytest.approx(own_scores(folder, texts, False), abs=1e-5)
    messages = [[{"role": "user", "content": p}] for p in PROMPTS]
    assert reward(prompts=messages, completions=COMPLETIONS) == pytest.approx(got, abs=1e-6)
    one_by_one = [reward(prompts=messages[i : i + 1], completions=COMPLETIONS[i : i + 1])[0] for i in (1, 0)]
    assert one_by_one == pytest.approx(got[::-1], abs=1e-6)


def test_without_a_chat_template_the_text_ends_with_eos(folder, tmp_path):
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    reward = make("reward", "reward_model", {"model": str(plain)})
    texts = [p + c + "<|end|>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(
        own_scores(plain, texts, False), abs=1e-5
    )
    with pytest.raises(ConfigError, match="no chat template"):
        reward(prompts=[[{"role": "user", "content": "x"}]], completions=["y"])


def test_the_runner_gives_it_the_prompt_as_the_data_has_it(folder):
    reward = make("reward", "reward_model", {"model": str(folder)})
    prompts = Prompts([[1]] * 2, ["<rendered>"] * 2, [None] * 2, {"prompt": PROMPTS}, [0, 1])
    scored = RewardRunner([NamedReward("judge", reward)]).score(prompts, COMPLETIONS, [[1], []])
    assert scored.score.tolist() == pytest.approx(reward(prompts=PROMPTS, completions=COMPLETIONS), abs=1e-6)


def test_a_missing_model_is_named():
    with pytest.raises(RlxError, match="no-such-judge") as caught:  # when it is built
        make("reward", "reward_model", {"model": "./no-such-judge"})
    assert caught.value.exit_code == 2


def test_the_weights_have_the_type_that_is_asked_for(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    given = {"prompts": PROMPTS, "completions": COMPLETIONS}
    auto, full, half = (
        make("reward", "reward_model", {"model": str(folder), "dtype": dtype})(**given)
        for dtype in ("auto", "float32", "bfloat16")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
    text = f"<|user|>{PROMPTS[0]}<|end|><|assistant|>{COMPLETIONS[0]}<|end|>"
    with torch.no_grad():
        own = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
    assert auto == full != half
    # One unit in the last place of bfloat16: a row in a padded batch may be summed in another order.
    assert half[0] == pytest.approx(float(own), rel=2**-7)


def test_an_adapter_with_its_score_head_is_loaded(tmp_path):
    import rlx

    run = rlx.run(
        algo="reward", lora_r=2, max_steps=1, batch_size=4, max_rows=8, max_eval_rows=4, plots=False,
        progress="none", output_dir=str(tmp_path / "judge"),
    )  # fmt: skip
    reward = make("reward", "reward_model", {"model": str(tmp_path / "judge")})
    got = reward(prompts=PROMPTS, completions=COMPLETIONS)
    text = [f"<|user|>{p}<|end|><|assistant|>{c}<|end|>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad(), run.policy.active() as model:
        ids = [run.policy.tokenizer(t, add_special_tokens=False, return_tensors="pt") for t in text]
        expected = [float(model(**i).logits[0, 0]) for i in ids]
    assert got == pytest.approx(expected, abs=1e-5)
