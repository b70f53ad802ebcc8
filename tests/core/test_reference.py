"""The reference: equal numbers among its kinds, frozen, and without a trace on the policy."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from rlx.core import adapters
from rlx.core.batch import Sequences
from rlx.core.errors import ConfigError
from rlx.core.logprobs import score
from rlx.core.models import Policy, load_policy
from rlx.core.reference import Reference, build_reference
from rlx.core.settings import Settings

SEQUENCES = Sequences.from_lists([[3, 4], [5]], [[10, 11, 1], [12, 13, 14, 1]])
KINDS = ["copy", "adapter off", "adapter", "model", "named adapter"]


def stir(policy: Policy, scale: float = 0.2) -> None:
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * scale)


def logps(reference: Reference) -> torch.Tensor:
    with reference.active() as model:
        return score(model, SEQUENCES).logps


def policy_logps(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return score(policy.model, SEQUENCES).logps


@pytest.fixture
def build(make_folder, tmp_path: Path):
    """A policy and its reference of each kind, both at the same point."""

    def make(kind: str, seed: int = 0) -> tuple[Policy, Reference]:
        base = str(make_folder())
        torch.manual_seed(seed)
        chosen = Settings(model=base, lora_r=0 if kind in ("copy", "model") else 4)
        if kind in ("adapter", "named adapter"):
            first = load_policy(chosen)
            stir(first)
            first.save_pretrained(tmp_path / "adapter")
            chosen = Settings(
                model=base,
                adapter=str(tmp_path / "adapter"),
                reference_adapter=str(tmp_path / "adapter") if kind == "named adapter" else None,
            )
        if kind == "model":
            chosen = Settings(model=base, reference_model=base)
        policy = load_policy(chosen)
        return policy, build_reference(chosen, policy)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_the_reference_is_the_policy_and_stays_so_while_the_policy_learns(kind, build):
    policy, reference = build(kind)
    assert reference.kind == kind.removeprefix("named ")
    start = policy_logps(policy)
    assert torch.equal(logps(reference), start)
    fingerprint = reference.fingerprint()
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.1)
    for _ in range(2):
        policy.model.train()
        score(policy.model, SEQUENCES).logps.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(logps(reference), start)
    assert not torch.allclose(policy_logps(policy), start, atol=1e-3)
    assert reference.fingerprint() == fingerprint


def test_all_kinds_give_equal_numbers_on_one_base(build, make_folder):
    found = {}
    for kind in ("copy", "adapter off", "model"):
        policy, reference = build(kind)
        stir(policy)
        found[kind] = logps(reference)
    assert torch.equal(found["copy"], found["adapter off"]) and torch.equal(found["copy"], found["model"])
    for kind in ("adapter", "named adapter"):
        policy, reference = build(kind)
        oracle = copy.deepcopy(policy.model)  # another adapter than the kinds above, so it needs its own copy
        stir(policy)
        with torch.no_grad():
            assert torch.equal(logps(reference), score(oracle, SEQUENCES).logps)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_using_the_reference_leaves_the_policy_as_it_was(kind, fails, build):
    policy, reference = build(kind)
    stir(policy)
    policy.model.train()
    policy.base.model.layers[0].eval()  # a mixture of modes comes back as such
    modes = {name: module.training for name, module in policy.model.named_modules()}
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in policy.model.named_parameters()}
    names, numbers = list(policy.trainable()), policy_logps(policy)
    try:
        with reference.active() as model:
            score(model, SEQUENCES)
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert {name: module.training for name, module in policy.model.named_modules()} == modes
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1]), name
    assert list(policy.trainable()) == names and torch.equal(policy_logps(policy), numbers)
    if adapters.is_adapted(policy.model):
        assert policy.model.active_adapter == "default"


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_reference(kind, build):
    policy, reference = build(kind)
    trained = set(policy.trainable())
    assert not any("reference" in name for name in trained)
    with reference.active() as model:
        taken = score(model, SEQUENCES).logps
    assert not taken.requires_grad
    (score(policy.model, SEQUENCES).logps - taken).sum().backward()
    for name, parameter in reference.model.named_parameters():
        if reference.model is not policy.model or name not in trained:
            assert parameter.grad is None, name


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_shares_no_storage_with_the_policy(tied, make_folder):
    chosen = Settings(model=str(make_folder(tie_word_embeddings=tied)))
    policy = load_policy(chosen)
    reference = build_reference(chosen, policy)
    ours = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    assert ours.isdisjoint(p.untyped_storage().data_ptr() for p in reference.model.parameters())
    assert not any(p.requires_grad for p in reference.model.parameters())


@pytest.mark.parametrize("way", ["itself", "shared"], ids=lambda w: f"fault[T15]-{w}")
def test_the_policy_cannot_be_its_own_reference(way, tiny_model, tiny_tokenizer):
    policy = load_policy(Settings(), tokenizer=tiny_tokenizer(), model=tiny_model())
    other = policy.model
    if way == "shared":
        other = tiny_model(seed=1)
        other.model.norm.weight = policy.model.model.norm.weight
    with pytest.raises(ConfigError, match="shares weights") as caught:
        build_reference(Settings(), policy, model=other)
    assert "deepcopy" in caught.value.hint and caught.value.exit_code == 2
    assert len(policy.trainable()) == 21  # nothing was frozen on the way


def test_a_model_object_is_frozen_and_used(tiny_model, tiny_tokenizer):
    policy = load_policy(Settings(), tokenizer=tiny_tokenizer(), model=tiny_model())
    other = tiny_model(seed=1)
    reference = build_reference(Settings(), policy, model=other)
    with torch.no_grad():
        wanted = score(tiny_model(seed=1), SEQUENCES).logps
    assert reference.model is other and torch.equal(logps(reference), wanted)
    assert not any(p.requires_grad for p in other.parameters())


def test_a_reference_must_know_the_policys_tokens(make_folder):
    chosen = Settings(model=str(make_folder()), reference_model=str(make_folder("small", vocab_size=18)))
    with pytest.raises(ConfigError, match="tokens that the model does not"):
        build_reference(chosen, load_policy(chosen))


def test_a_reference_adapter_needs_an_adapted_policy(make_folder, tmp_path):
    chosen = Settings(model=str(make_folder()), reference_adapter=str(tmp_path))
    with pytest.raises(ConfigError, match="LoRA"):
        build_reference(chosen, load_policy(chosen))


def test_a_policy_whose_base_is_trained_along_gets_a_copy(tiny_model, tiny_tokenizer):
    adapted = adapters.add_lora(tiny_model(), rank=2, alpha=2)
    adapted.get_base_model().model.norm.weight.requires_grad_(True)
    policy = load_policy(Settings(), tokenizer=tiny_tokenizer(), model=adapted)
    assert build_reference(Settings(), policy).kind == "copy"


def test_only_a_frozen_adapter_is_kept_in_checkpoints_and_it_comes_back(build):
    for kind in ("copy", "adapter off", "model"):
        assert build(kind)[1].state_dict() == {}
    _, reference = build("adapter")
    state, wanted = reference.state_dict(), logps(reference)
    assert len(state) == 28
    again_policy, again = build("adapter", seed=1)
    assert not torch.allclose(logps(again), wanted)
    trained = {name: p.detach().clone() for name, p in again_policy.trainable().items()}
    again.load_state_dict(state)
    assert torch.equal(logps(again), wanted) and again.fingerprint() == reference.fingerprint()
    assert all(torch.equal(p, trained[name]) for name, p in again_policy.trainable().items())
    with pytest.raises(ConfigError, match="does not fit"):
        build("copy")[1].load_state_dict(state)


def test_the_fingerprint_is_that_of_what_is_computed(build, make_folder, tmp_path):
    """Equal weights under another configuration are another reference; elsewhere they are the same one."""
    _, reference = build("model")
    first = reference.fingerprint()
    moved = tmp_path / "elsewhere"
    reference.model.save_pretrained(moved)
    shutil.copy(make_folder() / "tokenizer.json", moved)
    shutil.copy(make_folder() / "tokenizer_config.json", moved)

    def of(**options):
        chosen = Settings(**{"model": str(make_folder()), "reference_model": str(moved), **options})
        found = build_reference(chosen, load_policy(chosen))
        return found.fingerprint(), logps(found)

    same, known = of()
    assert same == first
    change(moved / "config.json", rms_norm_eps=0.1)
    other, changed = of()
    assert other != first and not torch.allclose(changed, known)
    build("named adapter")
    named = {"adapter": str(tmp_path / "adapter"), "reference_adapter": str(tmp_path / "adapter")}
    before, known = of(reference_model=None, **named)
    change(tmp_path / "adapter/adapter_config.json", lora_alpha=64)
    after, changed = of(reference_model=None, **named)
    assert before != after and not torch.allclose(changed, known)


def change(file: Path, **values: float) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_saved_policy_does_not_hold_the_reference(build, tmp_path):
    policy, _ = build("adapter")
    policy.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "reference").exists()
    from safetensors.torch import load_file

    assert len(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == 28
