"""Value heads and value models: numbers, files, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlx.core.batch import Sequences
from rlx.core.errors import ConfigError
from rlx.core.logprobs import score
from rlx.core.models import load_policy
from rlx.core.pretrained import Source
from rlx.core.settings import Settings
from rlx.core.sharing import share
from rlx.core.values import ValueHead, ValueModel, load_value_head, save_value_head

SEQUENCES = Sequences.from_lists(
    [[3, 4], [5], [6, 7, 8, 9], [3]], [[10, 11, 1], [12, 1], [], [13, 14, 15, 16, 17]]
)


def reward_model(folder: Path, labels: int = 1, seed: int = 0) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=labels,
        pad_token_id=0,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def filled(size: int = 16) -> ValueHead:
    head = ValueHead(size)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, size))
        head.bias.fill_(0.25)
    return head


def naive_values(model: ValueModel, sequences: Sequences) -> torch.Tensor:
    """One sequence at a time, unpadded: the head on the state to the left of each scored token."""
    out, start = [], 0
    for length in sequences.lengths.tolist():
        ids = sequences.ids[start : start + length]
        hidden = model.backbone(input_ids=ids[None], use_cache=False)[0][0]
        for i in range(1, length):
            if sequences.scored[start + i]:
                out.append(hidden[i - 1].float() @ model.head.weight + model.head.bias)
        start += length
    return torch.stack(out)


def test_a_new_head_gives_zero_for_every_state_and_learns():
    head = ValueHead(16)
    hidden = torch.randn(3, 5, 16)
    assert torch.equal(head(hidden), torch.zeros(3, 5))
    (head(hidden) - 1).square().sum().backward()
    # d/dw Σ (w·h + b − 1)² at w = b = 0 is −2 Σ h, and −2 · 15 for b.
    assert torch.allclose(head.weight.grad, -2 * hidden.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert head.bias.grad.item() == -30


def test_a_head_computes_in_float32_from_half_precision_states_and_under_autocast():
    head, hidden = filled(), torch.randn(7, 16).bfloat16()
    wanted = hidden.float() @ head.weight + 0.25
    assert torch.equal(head(hidden), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden), wanted)


def test_a_head_comes_back_from_its_file_bit_for_bit(tmp_path):
    file = save_value_head(filled(), tmp_path)
    head = ValueHead(16)
    load_value_head(head, file)
    assert file.name == "value_head.safetensors"
    assert torch.equal(head.weight, filled().weight) and torch.equal(head.bias, filled().bias)


def test_heads_of_other_tools_load(tmp_path):
    weight, bias = torch.randn(1, 16), torch.randn(1)
    cases = [{"v_head.summary.weight": weight, "v_head.summary.bias": bias}, {"score.weight": weight}]
    for number, tensors in enumerate(cases):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        head = ValueHead(16)
        load_value_head(head, tmp_path / f"{number}.safetensors")
        assert torch.equal(head.weight, weight[0]) and head.bias.item() == (bias.item() if number == 0 else 0)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (None, "there is no value head"),
        ({"other": torch.zeros(3)}, "no value head"),
        ({"weight": torch.zeros(8), "bias": torch.zeros(())}, "another model"),
        ({"weight": torch.zeros(2, 8)}, "another model"),
    ],
    ids=["fault[T10]-missing", "fault[T10]-other-names", "fault[T10]-other-size", "fault[T10]-two-outputs"],
)
def test_a_head_that_does_not_fit_is_refused(tensors, told, tmp_path):
    if tensors is not None:
        save_file(tensors, tmp_path / "value_head.safetensors")
    with pytest.raises(ConfigError, match=told) as caught:
        load_value_head(ValueHead(16), tmp_path / "value_head.safetensors")
    assert caught.value.exit_code == 2 and "value_head.safetensors" in caught.value.where


@pytest.mark.parametrize("_", [pytest.param(0, id="fault[T10]-num_labels")])
def test_a_classifier_with_several_outputs_is_no_value_model(_, tmp_path):
    with pytest.raises(ConfigError, match="3 outputs") as caught:
        ValueModel.load(Source(str(reward_model(tmp_path / "rm", labels=3))), dtype=torch.float32)
    assert caught.value.exit_code == 2


def test_a_value_model_from_a_reward_model_values_what_the_reward_model_scores(tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder, report = reward_model(tmp_path / "rm"), []
    model = ValueModel.load(Source(str(folder)), dtype=torch.float32, report=report)
    # A token scored after the prompt [3, 4, 5] has the state after 5, which is where the reward model reads.
    whole = AutoModelForSequenceClassification.from_pretrained(folder)
    wanted = whole(torch.tensor([[3, 4, 5]])).logits[0]
    with torch.no_grad():
        got = model.values(Sequences.from_lists([[3, 4, 5]], [[6]]))
    assert torch.allclose(got, wanted, atol=1e-6) and "score" in report[0]


@pytest.mark.parametrize("budget", [1, 8, 4096])
def test_values_equal_one_sequence_at_a_time_for_every_budget(budget, make_folder):
    model = ValueModel.load(Source(str(make_folder())), dtype=torch.float32)
    model.head = filled()
    wanted = naive_values(model, SEQUENCES)
    with torch.no_grad():
        assert torch.allclose(model.values(SEQUENCES, budget), wanted, atol=1e-5)
    assert torch.allclose(model.values(SEQUENCES), wanted, atol=1e-5)
    none = SEQUENCES.take(torch.tensor([2]))
    assert model.values(none).shape == (0,)


def test_gradients_of_values_do_not_depend_on_the_cut(make_folder):
    model = ValueModel.load(Source(str(make_folder())), dtype=torch.float32)
    model.head = filled()
    model.values(SEQUENCES).sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in range(4):
        part = model.values(SEQUENCES.take(torch.tensor([row]))).sum()
        if part.requires_grad:
            part.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, whole[name], rtol=1e-4, atol=1e-5), name


def test_a_shared_head_reads_the_states_that_a_separate_model_of_equal_weights_reads(make_folder):
    folder = make_folder()
    policy = load_policy(Settings(model=str(folder)), values=True)
    separate = ValueModel.load(Source(str(folder)), dtype=torch.float32)
    policy.value_head = separate.head = filled()
    with torch.no_grad():
        shared = score(policy.model, SEQUENCES, value_head=policy.value_head).values
        assert torch.allclose(shared, separate.values(SEQUENCES), atol=1e-5)


@pytest.mark.parametrize("kind", ["beside", "among"])
def test_a_head_in_the_folder_of_a_model_is_taken_over(kind, make_folder):
    from safetensors.torch import load_file

    folder = make_folder()
    if kind == "beside":
        save_value_head(filled(), folder)
    else:
        tensors = load_file(folder / "model.safetensors")
        head = {
            "v_head.summary.weight": filled().weight[None].detach(),
            "v_head.summary.bias": torch.tensor([0.25]),
        }
        save_file(
            {**{k: v.clone() for k, v in tensors.items()}, **head},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    policy = load_policy(Settings(model=str(folder)), values=True)
    assert torch.equal(policy.value_head.weight, filled().weight) and policy.value_head.bias.item() == 0.25
    separate = load_policy(Settings(model=str(make_folder("other")), value_model=str(folder)), values=True)
    assert separate.value_head is None and torch.equal(separate.value_model.head.weight, filled().weight)


def test_a_separate_value_model_is_trained_saved_and_restored_under_its_own_names(make_folder, tmp_path):
    chosen = Settings(model=str(make_folder()), value_model=str(reward_model(tmp_path / "rm")))
    policy = load_policy(chosen, values=True)
    names = [name for name in policy.trainable() if name.startswith("value.")]
    assert "value.backbone.layers.1.mlp.up_proj.weight" in names and names[-2:] == [
        "value.head.weight",
        "value.head.bias",
    ]
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.save_pretrained(tmp_path / "saved")
    again = load_policy(chosen, values=True)
    again.load_trainable(tmp_path / "saved")
    assert all(torch.equal(p, policy.trainable()[name]) for name, p in again.trainable().items())
    # What was saved is itself a value model.
    with torch.no_grad():
        third = ValueModel.load(Source(str(tmp_path / "saved" / "value_model")), dtype=torch.float32)
        assert share(third.backbone) is None  # as load_policy does: then the sums are those of the policy's
        assert torch.equal(third.values(SEQUENCES), policy.value_model.values(SEQUENCES))


def test_a_value_model_object_is_used_as_it_is(make_folder, tiny_model):
    given = tiny_model(seed=3)
    policy = load_policy(Settings(model=str(make_folder())), values=True, value_model=given)
    assert policy.value_model.backbone is given.model
    assert ValueModel.around(policy.value_model) is policy.value_model
