"""A reference that moves after the policy: every kind, by hand; what cannot be moved is refused in time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rlx
from rlx.core.batch import Sequences
from rlx.core.errors import ConfigError
from rlx.core.logprobs import score
from rlx.core.models import Policy, load_policy
from rlx.core.reference import Reference, build_reference
from rlx.core.settings import Settings

SEQUENCES = Sequences.from_lists([[3, 4], [5]], [[10, 11, 1], [12, 13, 14, 1]])
KINDS = {
    "copy": "copy",
    "new adapter": "adapter",
    "adapter": "adapter",
    "named adapter": "adapter",
    "model": "model",
}


def stir(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def logps(policy: Policy, reference: Reference | None = None) -> torch.Tensor:
    with torch.no_grad(), (policy if reference is None else reference).active() as model:
        return score(model, SEQUENCES).logps


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


@pytest.fixture
def build(make_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Policy, Reference]]:
    """A policy and a reference that starts where it starts and can be moved after it."""

    def make(kind: str, **more: Any) -> tuple[Policy, Reference]:
        base, chosen = str(make_folder()), {}
        torch.manual_seed(0)
        if kind in ("adapter", "named adapter"):
            first = load_policy(Settings(model=base, lora_r=4))
            stir(first)
            first.save_pretrained(tmp_path / "adapter")
            chosen = {"adapter": str(tmp_path / "adapter")}
        if kind == "named adapter":
            chosen["reference_adapter"] = str(tmp_path / "adapter")
        if kind == "new adapter":
            chosen = {"lora_r": 4}
        if kind == "model":
            chosen = {"reference_model": base}
        settings = Settings(model=base, sync_ref_model=True, **{**chosen, **more})
        policy = load_policy(settings, values=True)
        return policy, build_reference(settings, policy)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_is_mixed_and_alpha_of_one_copies(kind, build):
    policy, reference = build(kind)
    assert reference.kind == KINDS[kind]
    assert torch.equal(logps(policy, reference), logps(policy))
    start = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    trained = {name for name in policy.trainable() if not name.startswith("value.")}
    assert set(start) == trained  # all of it, and no value function
    rest = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    stir(policy)
    moved = weights(policy)
    reference.follow(0.25)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(tensor, 0.25 * moved[name] + 0.75 * start[name], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logps(policy, reference), logps(policy), atol=1e-3)
    reference.follow(1.0)
    assert torch.equal(logps(policy, reference), logps(policy))
    now = weights(policy)
    assert all(torch.equal(now[name], moved[name]) for name in now)  # the policy stays
    if policy.adapter:  # and so does its base
        base = {name: p for name, p in policy.model.named_parameters() if ".lora_" not in name}
        assert all(torch.equal(p, rest[name]) for name, p in base.items())
    assert not any(own.requires_grad for own, _ in reference.moving.values())


def test_a_reference_that_is_not_to_move_stays_and_is_not_kept(make_folder):
    settings = Settings(model=str(make_folder()))
    policy = load_policy(settings)
    reference = build_reference(settings, policy)
    start = logps(policy)
    stir(policy)
    reference.follow(1.0)
    assert torch.equal(logps(policy, reference), start) and reference.state_dict() == {}


@pytest.mark.parametrize("kind", ["copy", "new adapter"])
def test_a_checkpoint_keeps_all_of_it(kind, build):
    policy, reference = build(kind)
    stir(policy)
    reference.follow(0.6)
    wanted = logps(policy, reference)
    _, again = build(kind)
    assert not torch.equal(logps(policy, again), wanted)
    again.load_state_dict(reference.state_dict())
    assert torch.equal(logps(policy, again), wanted)
    state = reference.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(ConfigError, match="does not fit"):
        again.load_state_dict(state)


def test_part_of_the_base_that_is_trained_along_moves_too(make_folder, tiny_tokenizer, tiny_model):
    from rlx.core import adapters

    model = adapters.add_lora(tiny_model(), rank=2, alpha=2)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    settings = Settings(sync_ref_model=True)
    policy = load_policy(settings, tokenizer=tiny_tokenizer(), model=model)
    reference = build_reference(settings, policy)
    assert reference.kind == "copy" and len(reference.moving) == len(policy.trainable()) == 29
    stir(policy)
    reference.follow(1.0)
    assert torch.equal(logps(policy, reference), logps(policy))


# What cannot be moved


def test_a_reference_of_other_shapes_cannot_follow(build, make_folder, tmp_path):
    first = load_policy(Settings(model=str(make_folder()), lora_r=2))
    first.save_pretrained(tmp_path / "rank 2")
    with pytest.raises(ConfigError, match="they have other weights") as caught:
        build("new adapter", reference_adapter=str(tmp_path / "rank 2"))
    assert caught.value.got == "shape (2, 16)" and caught.value.expected == "shape (4, 16)"
    assert "reference_adapter out" in caught.value.hint
    with pytest.raises(ConfigError, match="they have other weights") as caught:
        build("copy", reference_model=str(make_folder("thin", intermediate_size=24)))
    assert caught.value.got == "shape (24, 16)" and caught.value.exit_code == 2


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="a reference that stays"):
        Settings(sync_ref_model=True, precompute_ref_log_probs=True)
    for way in ({"lora_r": 4}, {"adapter": "some/dir"}):
        with pytest.raises(ConfigError, match="cannot mix an adapter into a reference_model") as caught:
            Settings(sync_ref_model=True, reference_model="other", **way)
        assert "leave reference_model out" in caught.value.hint


WITHOUT = [
    ({"algo": "ppo", "kl_coef": 0}, "set kl_coef above 0"),
    ({"algo": "grpo", "beta": 0}, "set beta above 0"),
    ({"algo": "dpo", "reference_free": True}, "set reference_free to false"),
    ({"algo": "orpo"}, "leave"),
    ({"algo": "cpo"}, "leave"),
    ({"algo": "reward"}, "leave"),
]


@pytest.mark.parametrize(
    ("option", "given", "fix"),
    [
        pytest.param(option, given, fix, id=f"fault[C4] {option} {given['algo']}")
        for option in ("sync_ref_model", "precompute_ref_log_probs")
        for given, fix in WITHOUT
        # Those that sample do not know precomputing at all.
        if option == "sync_ref_model" or given["algo"] not in ("ppo", "grpo")
    ],
)
def test_where_there_is_no_reference_its_options_are_refused_before_weights_load(
    option, given, fix, tmp_path, monkeypatch
):
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("rlx.core.models.load_policy", loaded)
    reward = {"reward": "exact_match"} if given["algo"] in ("ppo", "grpo") else {}
    options = {**given, **reward, option: True, "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=f"{option} is for a reference, and {given['algo']}") as caught:
        rlx.run(**options)
    assert fix in caught.value.hint and caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()
