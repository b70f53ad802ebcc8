"""Loading, checking, saving and restoring the policy and its tokenizer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlx.core.errors import ConfigError, DivergedError
from rlx.core.models import Policy, load_policy, resolve_dtype
from rlx.core.settings import Settings

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def settings(folder: Path | str, **options) -> Settings:
    return Settings(model=str(folder), **options)


def poke(folder: Path, change) -> None:
    """Rewrite the weights of a folder after changing the dict of tensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_policy_loads_by_path_in_float32_on_cpu_and_computes_what_the_model_computed(
    make_folder, tiny_model
):
    policy = load_policy(settings(make_folder()))
    assert next(policy.model.parameters()).dtype == torch.float32
    assert torch.equal(policy.model(IDS).logits, tiny_model()(IDS).logits)


def test_the_embedded_model_loads_by_its_name():
    policy = load_policy(Settings())
    assert policy.stop_token_ids == (policy.tokenizer.eos_token_id,)
    assert torch.isfinite(policy.model(IDS).logits).all()


@pytest.mark.parametrize(
    ("device", "dtype", "lora_r", "expected"),
    [
        ("cpu", "auto", 0, torch.float32),
        ("cpu", "auto", 4, torch.float32),
        ("cuda", "auto", 0, torch.float32),
        ("cuda", "auto", 4, torch.bfloat16),
        ("cuda", "float16", 0, torch.float16),
        ("cpu", "bfloat16", 0, torch.bfloat16),
    ],
)
def test_dtype_auto_is_bfloat16_for_the_frozen_base_of_an_adapter_on_cuda(device, dtype, lora_r, expected):
    assert resolve_dtype(Settings(dtype=dtype, lora_r=lora_r), torch.device(device)) == expected


@pytest.mark.parametrize(
    "option",
    [{"dtype": "float16"}, {"generation_dtype": "float16"}],
    ids=lambda option: f"fault[T13]-{next(iter(option))}",
)
def test_float16_on_a_cpu_is_refused_before_loading(option, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_policy(settings(tmp_path / "does-not-even-exist", **option))
    assert caught.value.code == "E-DTYPE" and caught.value.exit_code == 2
    assert next(iter(option)) in caught.value.what and "bfloat16" in caught.value.expected


def test_stop_tokens_are_those_of_the_tokenizer_and_of_the_generation_config(make_folder):
    folder = make_folder()
    edit(folder / "generation_config.json", eos_token_id=[5, 1])
    assert load_policy(settings(folder)).stop_token_ids == (1, 5)


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T4]")])
def test_a_token_without_an_embedding_row_is_named(_, make_folder):
    with pytest.raises(ConfigError, match="id 18 ≥ 18") as caught:
        load_policy(settings(make_folder(vocab_size=18)))
    assert "'w15'" in caught.value.got and caught.value.exit_code == 2


@pytest.mark.parametrize("damage", ["truncated", "header", "length", "empty"], ids=lambda d: f"fault[T5]-{d}")
def test_a_damaged_weights_file_is_named_with_its_sizes(damage, make_folder):
    folder = make_folder()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "truncated": whole[:-100],
            "header": whole[:8] + b"{{{" + whole[11:],
            "length": (2**40).to_bytes(8, "little") + whole[8:],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(ConfigError) as caught:
        load_policy(settings(folder))
    assert caught.value.where == str(file) and caught.value.exit_code == 2
    assert f"{file.stat().st_size} bytes" in caught.value.got
    if damage == "truncated":
        assert caught.value.expected == f"{len(whole)} bytes"


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T5]-shard")])
def test_a_missing_shard_is_named(_, make_folder, tiny_model):
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="4KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    assert load_policy(settings(folder)).trainable()
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        load_policy(settings(folder))


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T6]")])
def test_missing_weights_are_listed_and_never_made_up(_, make_folder):
    folder = make_folder()

    def drop(tensors: dict) -> None:
        for name in [name for name in tensors if "layers.1" in name]:
            del tensors[name]

    poke(folder, drop)
    with pytest.raises(ConfigError) as caught:
        load_policy(settings(folder))
    assert caught.value.code == "E-MODEL-INCOMPLETE"
    assert caught.value.got.startswith("9 missing: model.layers.1.input_layernorm.weight")
    assert "and 4 more" in caught.value.got


def test_tied_weights_are_not_missing(make_folder):
    folder = make_folder(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_policy(settings(folder)).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=lambda v: f"fault[T7]-{v}")
def test_a_base_weight_that_is_not_finite_is_named(value, make_folder):
    folder = make_folder()
    poke(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(DivergedError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        load_policy(settings(folder))
    assert caught.value.exit_code == 7 and "16 of 512" in caught.value.got


@pytest.mark.parametrize(
    "where", ["config.json", "tokenizer_config.json"], ids=lambda w: f"fault[T11]-fault[S1]-{w}"
)
def test_code_beside_a_model_does_not_run_without_consent(where, make_folder, tmp_path):
    folder, sentinel = make_folder(), tmp_path / "sentinel"
    module = f"import pathlib\npathlib.Path({str(sentinel)!r}).touch()\n"
    (folder / "modeling_evil.py").write_text(module)
    kind = "AutoModelForCausalLM" if where == "config.json" else "AutoTokenizer"
    named = "modeling_evil.Evil" if where == "config.json" else ["modeling_evil.Evil", None]
    edit(folder / where, auto_map={kind: named, "AutoConfig": "modeling_evil.EvilConfig"})
    with pytest.raises(ConfigError) as caught:
        load_policy(settings(folder))
    assert caught.value.code == "E-MODEL-CODE" and caught.value.exit_code == 2
    assert "modeling_evil" in caught.value.got and not sentinel.exists()


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[S2]")])
def test_pickled_weights_are_refused_unread(_, make_folder, tmp_path):
    folder, sentinel = make_folder(), tmp_path / "sentinel"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(sentinel),)

    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors") as caught:
        load_policy(settings(folder))
    assert "pytorch_model.bin" in caught.value.got and not sentinel.exists()


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T12]")])
def test_offline_and_not_cached_says_what_to_fetch_and_where_to(_):
    with pytest.raises(ConfigError) as caught:
        load_policy(settings("some-owner/some-model"))
    error = caught.value
    assert error.exit_code == 2 and "'some-owner/some-model'" in error.what
    assert (
        "offline" in error.got
        and "cache" in error.where
        and error.hint.endswith("hf download some-owner/some-model")
    )
    assert len(error.lines()) <= 5


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "..."])
def test_a_folder_that_does_not_exist_is_not_asked_of_the_hub(name):
    with pytest.raises(ConfigError, match="does not exist"):
        load_policy(settings(name))


def test_a_folder_without_a_model_and_an_adapter_in_its_place_are_told_apart(tmp_path, tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_policy(settings(tmp_path), tokenizer=tiny_tokenizer())
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "my/base"}')
    with pytest.raises(ConfigError) as caught:
        load_policy(settings(tmp_path), tokenizer=tiny_tokenizer())
    assert caught.value.hint == f"--model my/base --adapter {tmp_path}"


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T14]")])
def test_a_frozen_model_is_refused(_, tiny_model, tiny_tokenizer):
    with pytest.raises(ConfigError, match="0 trainable parameters"):
        load_policy(
            Settings(), tokenizer=tiny_tokenizer(), model=tiny_model().requires_grad_(False), values=True
        )


def test_a_model_object_is_taken_as_it_is(tiny_model, tiny_tokenizer):
    model = tiny_model().bfloat16()
    policy = load_policy(Settings(), tokenizer=tiny_tokenizer(), model=model)
    assert policy.model is model and next(model.parameters()).dtype == torch.bfloat16


def test_a_model_object_finds_its_tokenizer_by_its_name(make_folder, tiny_tokenizer, tiny_model):
    from transformers import AutoModelForCausalLM

    named = AutoModelForCausalLM.from_pretrained(make_folder())
    assert load_policy(Settings(), model=named).tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(ConfigError, match="tokenizer"):
        load_policy(Settings(), model=tiny_model())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_is_off_in_training_and_the_saved_config_keeps_it(
    kind, make_folder, tmp_path, tiny_tokenizer
):
    if kind == "llama":
        folder, names = make_folder(attention_dropout=0.4), ["attention_dropout"]
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        folder, names = tmp_path / "gpt2", ["attn_pdrop", "resid_pdrop", "embd_pdrop"]
        config = GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
            **dict.fromkeys(names, 0.4),
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    passes = {}
    for off in (True, False):
        policy = load_policy(settings(folder, disable_dropout=off), tokenizer=tiny_tokenizer())
        policy.model.train()
        passes[off] = [policy.model(IDS).logits for _ in range(2)]
        policy.save_pretrained(tmp_path / f"saved-{off}")
        saved = json.loads((tmp_path / f"saved-{off}" / "config.json").read_text())
        assert [saved[name] for name in names] == [0.4] * len(names)
    assert torch.equal(*passes[True]) and not torch.equal(*passes[False])


@pytest.mark.parametrize("lora_r", [0, 2])
def test_gradient_checkpointing_gives_the_same_gradients_and_saves_use_cache(lora_r, make_folder, tmp_path):
    folder, grads = make_folder(), {}
    for on in (False, True):
        torch.manual_seed(0)
        policy = load_policy(settings(folder, gradient_checkpointing=on, lora_r=lora_r))
        policy.model.train()
        calls = []
        first = policy.base.model.layers[0].self_attn
        first.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        policy.model(IDS, labels=IDS).loss.backward()
        grads[on] = {name: p.grad for name, p in policy.trainable().items()}
        assert len(calls) == 1 + on  # once more in the backward pass
        policy.save_pretrained(tmp_path / "saved")
        if not lora_r:
            assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_cache"] is True
    assert all(torch.allclose(grads[True][name], grads[False][name], atol=1e-6) for name in grads[False])


def change(policy: Policy) -> dict[str, torch.Tensor]:
    """Move every trained weight, as an optimizer would; the new values."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}


CASES = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "upcast_norms": True},
    {"lora_r": 4},
    {"dtype": "bfloat16", "lora_r": 4},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_trained_weights_come_back_bit_for_bit(options, tied, make_folder, tmp_path):
    chosen = settings(make_folder(tie_word_embeddings=tied), **options)
    policy = load_policy(chosen, values=True)
    wanted = change(policy)
    policy.save_pretrained(tmp_path / "saved")
    fresh = load_policy(chosen, values=True)
    places = {name: p.data_ptr() for name, p in fresh.trainable().items()}
    fresh.load_trainable(tmp_path / "saved")
    assert fresh.trainable().keys() == wanted.keys()
    for name, parameter in fresh.trainable().items():
        assert parameter.dtype == wanted[name].dtype and torch.equal(parameter, wanted[name]), name
        assert parameter.data_ptr() == places[name]  # in place: an optimizer still holds them
    assert torch.equal(fresh.model(IDS).logits, policy.model(IDS).logits)


def test_a_saved_policy_is_a_plain_folder(make_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = make_folder()
    edit(folder / "generation_config.json", eos_token_id=[1, 5])
    policy = load_policy(settings(folder), values=True)
    change(policy)
    policy.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, policy.model(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == policy.tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [1, 5]
    assert (tmp_path / "saved" / "value_head.safetensors").is_file()


@pytest.mark.parametrize("lora_r", [0, 2])
def test_an_inconsistent_generation_config_of_the_base_does_not_prevent_saving(lora_r, make_folder, tmp_path):
    folder = make_folder()
    edit(folder / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)
    load_policy(settings(folder, lora_r=lora_r)).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize("name", ["model.norm.weight", "value.bias"], ids=lambda n: f"fault[N16]-{n}")
def test_weights_that_are_not_finite_are_not_saved(name, make_folder, tmp_path):
    policy = load_policy(settings(make_folder()), values=True)
    policy.trainable()[name].data.fill_(float("nan"))
    with pytest.raises(DivergedError, match=name) as caught:
        policy.save_pretrained(tmp_path / "saved")
    assert caught.value.exit_code == 7 and not (tmp_path / "saved").exists()


def test_restoring_from_another_model_changes_nothing(make_folder, tmp_path):
    policy = load_policy(settings(make_folder()))
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    with pytest.raises(ConfigError, match="does not fit"):
        policy.load_trainable(make_folder("other", intermediate_size=48))
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())


def test_names_of_trained_weights_are_stable_and_tied_ones_stand_once(make_folder):
    policy = load_policy(settings(make_folder(tie_word_embeddings=True)), values=True)
    names = list(policy.trainable())
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["value.weight", "value.bias"]
    assert "lm_head.weight" not in names
    again = load_policy(replace(settings(policy.model.name_or_path)), values=True)
    assert list(again.trainable()) == names
