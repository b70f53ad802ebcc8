"""LoRA adapters: new ones, ones from a folder, and switching between them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlx.core import adapters
from rlx.core.errors import ConfigError, DivergedError
from rlx.core.models import load_policy
from rlx.core.reference import build_reference
from rlx.core.settings import Settings

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def stir(model, name: str = "default", scale: float = 0.2) -> None:
    """Give an adapter weights that matter."""
    with torch.no_grad():
        for parameter in adapters.adapter_parameters(model, name).values():
            parameter.add_(torch.randn_like(parameter) * scale)


def adapter_folder(model, folder: Path, rank: int = 4, **options) -> Path:
    """An adapter on disk, as peft itself writes it."""
    adapted = adapters.add_lora(model, rank=rank, alpha=8, **options)
    stir(adapted)
    adapted.save_pretrained(folder)
    return folder


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(make_folder, tiny_model):
    policy = load_policy(Settings(model=str(make_folder()), lora_r=4, lora_alpha=8))
    assert torch.equal(policy.model(IDS).logits, tiny_model()(IDS).logits)
    # 7 linear layers a block, two blocks, an A and a B each; the output head is none of all-linear.
    assert len(policy.trainable()) == 28
    assert all(".lora_" in name and ".default." in name for name in policy.trainable())
    sizes = {
        name.split(".")[-4]: tuple(p.shape) for name, p in policy.trainable().items() if ".lora_A." in name
    }
    assert sizes["down_proj"] == (4, 32) and sizes["q_proj"] == (4, 16)


def test_the_scale_of_an_adapter_is_alpha_over_rank(tiny_model):
    model = adapters.add_lora(tiny_model(), rank=4, alpha=6, target_modules=["q_proj"])
    stir(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(layer(x), layer.base_layer(x) + 6 / 4 * (x @ a.T @ b.T), atol=1e-5)


def test_adapter_weights_are_float32_on_a_half_precision_base(make_folder, tmp_path):
    chosen = Settings(model=str(make_folder()), dtype="bfloat16", lora_r=4)
    policy = load_policy(chosen)
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    stir(policy.model)
    policy.save_pretrained(tmp_path / "saved")
    again = load_policy(Settings(model=chosen.model, dtype="bfloat16", adapter=str(tmp_path / "saved")))
    assert {p.dtype for p in again.trainable().values()} == {torch.float32}
    assert torch.equal(again.model(IDS).logits, policy.model(IDS).logits)


@pytest.mark.parametrize("modules", [["no_such"], ["all-linear", "q_proj"]])
def test_target_modules_that_cannot_be_are_refused(modules, tiny_model):
    with pytest.raises(ConfigError) as caught:
        adapters.add_lora(tiny_model(), rank=4, alpha=8, target_modules=modules)
    assert caught.value.exit_code == 2
    if modules == ["no_such"]:
        assert "q_proj" in caught.value.expected


def test_dropout_is_put_on_the_new_adapter_only_where_asked(make_folder):
    for probability in (0.0, 0.5):
        policy = load_policy(Settings(model=str(make_folder()), lora_r=4, lora_dropout=probability))
        stir(policy.model)
        policy.model.train()
        same = torch.equal(policy.model(IDS).logits, policy.model(IDS).logits)
        assert same == (probability == 0)


def test_an_adapter_that_peft_wrote_is_trained_on(make_folder, tiny_model, tmp_path):
    theirs = adapters.add_lora(tiny_model(), rank=4, alpha=8, dropout=0.5)
    stir(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    policy = load_policy(Settings(model=str(make_folder()), adapter=str(tmp_path / "adapter")))
    assert torch.equal(policy.model(IDS).logits, theirs.eval()(IDS).logits)
    assert len(policy.trainable()) == 28
    policy.model.train()  # its dropout is off, like all of the policy's
    assert torch.equal(policy.model(IDS).logits, theirs(IDS).logits)


def test_peft_reads_what_we_write(make_folder, tiny_model, tmp_path):
    from peft import PeftModel

    policy = load_policy(Settings(model=str(make_folder()), lora_r=4))
    stir(policy.model)
    policy.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    assert torch.equal(again(IDS).logits, policy.model(IDS).logits)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == policy.base.name_or_path and config["inference_mode"] is True
    assert not (tmp_path / "saved" / "config.json").exists()


def test_an_adapter_of_another_name_is_saved_at_the_root(tiny_model, tiny_tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    policy = load_policy(
        Settings(), tokenizer=tiny_tokenizer(), model=get_peft_model(tiny_model(), config, "mine")
    )
    stir(policy.model, "mine")
    wanted = {name: p.detach().clone() for name, p in policy.trainable().items()}
    policy.save_pretrained(tmp_path)
    stir(policy.model, "mine")
    policy.load_trainable(tmp_path)
    assert len(wanted) == 4 and all(torch.equal(p, wanted[name]) for name, p in policy.trainable().items())


def test_a_new_adapter_stands_beside_those_that_are_there(tiny_model, tiny_tokenizer):
    first = adapters.add_lora(tiny_model(), rank=2, alpha=2)
    stir(first)
    kept = {name: p.detach().clone() for name, p in adapters.adapter_parameters(first, "default").items()}
    for given in (first, first.get_base_model()):  # the wrapper, or the base that it is around
        policy = load_policy(Settings(lora_r=4), tokenizer=tiny_tokenizer(), model=given)
        assert policy.model is first
        assert torch.equal(policy.model(IDS).logits, tiny_model()(IDS).logits)
    assert sorted(first.peft_config) == ["default", "default-2", "default-3"]
    assert policy.adapter == first.active_adapter == "default-3"
    now = adapters.adapter_parameters(first, "default")
    assert all(torch.equal(now[name], kept[name]) and now[name].requires_grad for name in kept)


def test_an_adapter_that_does_not_fit_leaves_those_that_are_there(tiny_model):
    model = adapters.add_lora(tiny_model(), rank=2, alpha=2)
    with pytest.raises(ConfigError) as caught:
        adapters.add_lora(model, rank=2, alpha=2, target_modules=["no_such"])
    assert "q_proj" in caught.value.expected and "default" not in caught.value.expected
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"
    assert adapters.add_lora(model, rank=2, alpha=2).active_adapter == "default-2"


def test_a_copy_of_a_base_gets_adapters_of_its_own(tiny_model):
    base = tiny_model()
    first = adapters.add_lora(base, rank=2, alpha=2)
    twin = copy.deepcopy(base)
    second = adapters.add_lora(twin, rank=2, alpha=2)
    assert second is not first and second.get_base_model() is twin
    assert list(first.peft_config) == ["default"] and list(second.peft_config) == ["default", "default-2"]


@pytest.mark.parametrize("trained", ["mine", "default-2"])
def test_of_adapters_from_python_one_trains_one_is_the_reference_and_a_third_is_left(
    trained, tiny_model, tiny_tokenizer
):
    model = adapters.add_lora(tiny_model(), rank=2, alpha=2)
    for name in ("mine", "reference", "judge"):
        model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
        stir(model, name)
    model.delete_adapter("default")
    model.set_adapter("mine")
    if trained == "default-2":
        model.add_adapter("default", copy.deepcopy(model.peft_config["mine"]))
    settings = Settings(lora_r=0 if trained == "mine" else 4)
    policy = load_policy(settings, tokenizer=tiny_tokenizer(), model=model)
    reference = build_reference(settings, policy)
    assert (policy.adapter, reference.kind, reference.adapter) == (trained, "adapter", "reference")
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if f".{trained}." not in name}
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    assert len(before) == 28 and all(".default." in name for name in before)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
    model.set_adapter("judge")
    for _ in range(2):  # a new adapter's A moves only once its B has
        with policy.active(training=True):
            policy.model(IDS).logits.sum().backward()
        optimizer.step()
    assert model.active_adapter == "judge"
    assert not any(torch.equal(p, before[name]) for name, p in policy.trainable().items())
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    with reference.active():
        assert model.active_adapter == "reference"


def test_a_new_adapter_begins_as_the_seed_says(tiny_model, tiny_tokenizer):
    def started(seed: int) -> dict[str, torch.Tensor]:
        policy = load_policy(Settings(lora_r=4, seed=seed), tokenizer=tiny_tokenizer(), model=tiny_model())
        return policy.trainable()

    torch.manual_seed(1)
    one, other = started(0), started(0)
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = started(1)
    assert not any(torch.equal(one[name], different[name]) for name in one if ".lora_A." in name)


def test_a_base_with_adapters_cannot_be_trained_whole(tiny_model, tiny_tokenizer):
    base = tiny_model()
    adapters.add_lora(base, rank=2, alpha=2)
    with pytest.raises(ConfigError, match="carries adapters of an earlier run"):
        load_policy(Settings(), tokenizer=tiny_tokenizer(), model=base)


def other_base(folder: Path, tiny_model) -> None:
    adapter_folder(tiny_model(hidden_size=32), folder)


def other_rank(folder: Path, tiny_model) -> None:
    adapter_folder(tiny_model(), folder, rank=8)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 4}))


def other_layers(folder: Path, tiny_model) -> None:
    adapter_folder(tiny_model(num_hidden_layers=3), folder)


def other_task(folder: Path, tiny_model) -> None:
    adapter_folder(tiny_model(), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "SEQ_CLS"}))


def incomplete(folder: Path, tiny_model) -> None:
    adapter_folder(tiny_model(), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "up_proj.lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors")


def truncated(folder: Path, tiny_model) -> None:
    adapter_folder(tiny_model(), folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "got", "expected"),
    [
        (other_base, "shape (32, 4)", "shape (16, 4), rank 4"),
        (other_rank, "shape (8, 32)", "shape (4, 32), rank 4"),
        (other_layers, "adapter of", "model.layers.2."),
        (other_task, "SEQ_CLS", "CAUSAL_LM"),
        (incomplete, "1 weights are missing, first base_model.model.model.layers.0.mlp.up_proj.lora_B", ""),
        (truncated, "bytes", "bytes"),
    ],
    ids=lambda f: f"fault[T8]-{f.__name__}" if callable(f) else "",
)
def test_an_adapter_that_does_not_fit_is_refused(damage, got, expected, make_folder, tiny_model, tmp_path):
    base = make_folder()
    damage(tmp_path / "adapter", tiny_model)
    with pytest.raises(ConfigError) as caught:
        load_policy(Settings(model=str(base), adapter=str(tmp_path / "adapter")))
    error = caught.value
    assert error.exit_code == 2 and got in error.got and expected in error.expected
    assert str(tmp_path / "adapter") in error.where
    if damage in (other_base, other_rank, other_layers):
        assert str(base) in error.got  # the base that it met; the one it is for is unnamed here


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T7]-adapter")])
def test_an_adapter_that_is_not_finite_is_refused(_, make_folder, tiny_model, tmp_path):
    folder = adapter_folder(tiny_model(), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(DivergedError) as caught:
        load_policy(Settings(model=str(make_folder()), adapter=str(folder)))
    assert caught.value.exit_code == 7


def test_a_folder_without_an_adapter_is_refused(make_folder):
    folder = make_folder()
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        load_policy(Settings(model=str(folder), adapter=str(folder)))


def test_restoring_an_adapter_of_another_rank_changes_nothing(tiny_model, tmp_path):
    folder = adapter_folder(tiny_model(), tmp_path / "adapter", rank=2)
    model = adapters.add_lora(tiny_model(), rank=4, alpha=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="does not fit"):
        adapters.restore_adapter(model, folder, name="default")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", [None, "other"])
def test_switching_adapters_leaves_everything_as_it_was(name, fails, tiny_model):
    model = adapters.add_lora(tiny_model(), rank=4, alpha=8)
    stir(model)
    adapters.snapshot(model, "other", of="default")
    stir(model)
    next(iter(adapters.adapter_parameters(model, "default").values())).requires_grad_(
        False
    )  # the user's choice
    before = {key: (p.requires_grad, p.detach().clone()) for key, p in model.named_parameters()}
    logits = model(IDS).logits
    try:
        with adapters.adapter_switched(model, name):
            assert not torch.equal(model(IDS).logits, logits)
            assert not any(p.requires_grad for p in adapters.adapter_parameters(model, "other").values())
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert model.active_adapter == "default" and torch.equal(model(IDS).logits, logits)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == before[key][0] and torch.equal(parameter, before[key][1]), key


def test_an_adapter_is_an_identity_until_its_b_moves(tiny_model):
    model = adapters.add_lora(tiny_model(), rank=4, alpha=8)
    assert adapters.is_identity(model, "default")
    stir(model)
    assert not adapters.is_identity(model, "default")
