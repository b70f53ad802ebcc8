from __future__ import annotations

from types import SimpleNamespace

import yaml

from rlx.callbacks.model_card import ModelCard

HISTORY = [{"step": 0, "eval/reward": 0.402}, {"step": 10, "reward": 0.6}, {"step": 45, "eval/reward": 0.91}]


def card(run) -> str:
    ModelCard(None).on_save(run, run.folder.path)
    return (run.folder.path / "README.md").read_text()


def test_the_card_says_what_it_is_how_it_went_and_how_to_load_it(make_run):
    run = make_run(learning_rate=0.001)
    run.metrics_history, run.global_step = HISTORY, 45
    text = card(run)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "tiny" and front["tags"] == ["rlx", "ppo"]
    assert front["library_name"] == "transformers"
    assert "| `eval/reward` | 0.402 | 0.91 |" in text and "45 steps" in text
    assert "| `learning_rate` | `0.001` |" in text
    assert 'AutoModelForCausalLM.from_pretrained("run")' in text and "PeftModel" not in text


def test_the_card_of_an_adapter_loads_it_on_its_base(make_run):
    run = make_run()
    run.policy = SimpleNamespace(model=SimpleNamespace(peft_config={}))
    text = card(run)
    assert "AutoModelForCausalLM.from_pretrained(tiny_path())" in text  # the embedded model is on no hub
    assert 'PeftModel.from_pretrained(base, "run")' in text and "library_name: peft" in text


def test_snippets_are_valid_python(make_run):
    run = make_run()
    for model in (object(), SimpleNamespace(peft_config={})):
        run.policy = SimpleNamespace(model=model)
        snippet = card(run).split("```python\n")[1].split("```")[0]
        compile(snippet, "card", "exec")


def test_a_checkpoint_gets_no_card(make_run, tmp_path):
    run = make_run()
    ModelCard(None).on_save(run, run.folder.path / "checkpoint-3")
    assert not (run.folder.path / "README.md").exists()
