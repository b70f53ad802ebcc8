"""The last layer computed where it is read: the same numbers and gradients, from fewer rows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from rlx.core import sharing
from rlx.core.batch import Sequences
from rlx.core.classify import classify
from rlx.core.last_layer import MARK, read_at, token_wise
from rlx.core.logprobs import score
from rlx.core.probe import plan_for, trunk_of
from rlx.core.recompute import switch

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROJECTED = ("self_attn.q_proj", "self_attn.o_proj")
ALL = (*PROJECTED, "mlp")
MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llama": (lambda: tf.LlamaConfig(**SIZES), ALL),
    "qwen3": (lambda: tf.Qwen3Config(**SIZES), ALL),
    "mistral window": (lambda: tf.MistralConfig(**SIZES, sliding_window=8), ALL),
    "gemma3": (lambda: tf.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8), ALL),
    "gpt2": (
        lambda: tf.GPT2Config(
            vocab_size=61,
            n_embd=24,
            n_layer=3,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        ("mlp",),
    ),
    "neox": (lambda: tf.GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None}), ("mlp",)),
    "llama4": (
        lambda: tf.Llama4TextConfig(
            **SIZES,
            intermediate_size_mlp=32,
            num_local_experts=2,
            attention_chunk_size=8,
            no_rope_layers=[1] * 3,
        ),
        PROJECTED,
    ),
    "experts": (lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), ALL),
}


def build(name: str) -> Any:
    """A random model that shares, marked."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name][0]()).eval()
    with torch.no_grad():  # large enough weights that each part matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    plan_for(model, batch())  # finding out how to score costs a few passes once
    assert sharing.share(trunk_of(model)) is None
    return model


def batch() -> Sequences:
    """Two prompts of 9 and 5 tokens with two completions each, and one alone."""
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 61, (k,), generator=random).tolist() for k in (9, 5, 16)]
    completions = [torch.randint(3, 61, (k,), generator=random).tolist() for k in (4, 3, 2, 6, 2)]
    groups = [0, 0, 1, 1, 2]
    return Sequences.from_lists([prompts[group] for group in groups], completions, groups)


# Fed: 9 + 5 + 16 tokens of prompts, and of each completion all but its last: 3 + 2 + 1 + 5 + 1.
# Read: the same tokens of completions and the last one of each prompt.
FED, READ = 9 + 5 + 16 + 12, 3 + 12


@contextmanager
def rows_of(module: nn.Module) -> Iterator[list[int]]:
    """Tokens that reach the inside of a module, call after call; not by a hook, which would change them."""
    inside = next(child for child in module.modules() if hasattr(child, "weight"))
    seen, inner = list[int](), inside.forward

    def counting(x: Tensor) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return inner(x)

    inside.forward = counting
    try:
        yield seen
    finally:
        del inside.forward


def gradients(model: Any, sequences: Sequences) -> dict[str, Tensor]:
    """Of a weighted sum of log-probs and entropies, as ``backward`` leaves them."""
    model.zero_grad()
    found = score(model, sequences, entropy=True)
    assert found.entropy is not None
    weights = torch.linspace(-1, 2, len(found.logps))
    (found.logps * weights + found.entropy).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert float((got[name] - want[name]).norm()) <= 1e-5 * float(want[name].norm()) + 1e-6, name


def unmarked(model: Any) -> Any:
    """A copy that computes every row of its last layer."""
    other = copy.deepcopy(model)
    vars(trunk_of(other)).pop(MARK)
    return other


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_whole_layer(name: str) -> None:
    model, sequences = build(name), batch()
    assert vars(trunk_of(model))[MARK] == MODELS[name][1]
    whole = unmarked(model)
    with torch.no_grad():
        got, want = (score(one, sequences, entropy=True) for one in (model, whole))
    torch.testing.assert_close(got.logps, want.logps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=2e-5)
    assert_same(gradients(model, sequences), gradients(whole, sequences))


def test_only_the_last_layer_gets_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences, rows = build("llama"), batch(), dict[str, int]()
    names, plain = {module: name for name, module in model.named_modules()}, nn.Linear.forward

    def counting(self: nn.Linear, x: Tensor) -> Tensor:
        rows[names[self]] = x.numel() // x.shape[-1]
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    score(model, sequences)
    last = "model.layers.2."
    whole = {last + "self_attn.k_proj", last + "self_attn.v_proj"}
    assert len(rows) == 3 * 7  # the head is not called
    assert {name: READ if name.startswith(last) and name not in whole else FED for name in rows} == rows


def test_a_classifier_reads_one_row_of_each_sequence() -> None:
    torch.manual_seed(0)
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES, num_labels=1)).eval()
    sequences = batch()
    want = classify(model, sequences)
    assert sharing.share(model.model) is None
    with rows_of(model.model.layers[-1].mlp) as seen:
        got = classify(model, sequences)
    assert seen == [5]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "experts"])
def test_no_row_is_read(name: str) -> None:
    """Nothing is scored: one token goes through the whole layer, for gradients of zeros."""
    model, sequences = build(name), Sequences.from_lists([[3, 4, 5]], [[]])
    with rows_of(trunk_of(model).layers[-1].mlp) as seen:
        found = score(model, sequences).logps
    assert seen == [1] and found.shape == (0,)


@pytest.mark.parametrize("checkpointing", [False, True])
# Not ours: transformers has renamed what switches it on.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_nothing_is_left_behind_even_by_an_error(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences = build("llama"), batch()
    layer = trunk_of(model).layers[-1]
    if checkpointing:
        switch([model], on=True)
        model.train()
    before = {module: dict(vars(module)) for module in model.modules()}
    score(model, sequences).logps.sum().backward()

    def fail(self: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        patch.setattr(type(layer.mlp), "forward", fail)
        score(model, sequences)
    assert {module: dict(vars(module)) for module in model.modules()} == before
    with rows_of(layer.mlp) as seen:
        model(input_ids=sequences.ids[None])
    assert seen == [len(sequences.ids)]


def test_who_has_put_a_hook_into_the_layer_sees_all_tokens() -> None:
    model, sequences = build("llama"), batch()
    want, shapes = score(model, sequences).logps, []
    mlp = trunk_of(model).layers[-1].mlp
    for put in (
        lambda: mlp.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1])),
        lambda: mlp.down_proj.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[1])),
    ):
        hook = put()
        got = score(model, sequences).logps
        hook.remove()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert shapes == [FED, FED]


def test_two_threads_in_one_trunk() -> None:
    """Rows that one thread reads are not those of the other, whose row is as long."""
    model = build("llama")
    ones = Sequences.from_lists([[3] * 8], [[4] * 8])
    others = Sequences.from_lists([[5] * 12], [[6] * 4])
    assert len(ones.ids) == len(others.ids)
    want = {id(one): score(model, one).logps.detach() for one in (ones, others)}
    wrong = []

    def work(one: Sequences) -> None:
        with torch.no_grad():
            for _ in range(60):
                got = score(model, one).logps
                if not torch.allclose(got, want[id(one)], rtol=1e-5, atol=2e-5):
                    wrong.append(got)

    threads = [threading.Thread(target=work, args=(one,)) for one in (ones, others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_copy_computes_with_its_own_weights() -> None:
    """The mark is a name, so that a reference that is copied from the policy finds modules of its own."""
    model, sequences = build("llama"), batch()
    other = copy.deepcopy(model)
    assert vars(trunk_of(other))[MARK] == ALL
    with torch.no_grad():
        trunk_of(model).layers[-1].mlp.down_proj.weight.zero_()
        changed, kept = score(model, sequences).logps, score(other, sequences).logps
    assert float((changed - kept).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "experts"])
# Not ours: transformers has renamed what switches it on.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_recomputed_activations_give_the_same_bits(name: str) -> None:
    model, sequences = build(name), batch()
    want = gradients(model, sequences)
    want = {key: value.clone() for key, value in want.items()}
    switch([model], on=True)
    model.train()
    layers = next(c for c in trunk_of(model).children() if isinstance(c, nn.ModuleList))
    with rows_of(layers[-1].mlp) as seen:
        got = gradients(model, sequences)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert seen == [READ, READ]  # once forward, once again for the backward pass


def test_adapters_on_the_modules() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj", "v_proj"])
    model = peft.get_peft_model(build("llama"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    sequences = batch()
    assert vars(trunk_of(model))[MARK] == ALL
    got, want = gradients(model, sequences), gradients(unmarked(model), sequences)
    assert len(got) == 3 * 4 * 2
    assert_same(got, want)


class Counting(nn.Module):
    """An MLP whose output depends on the number of rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + 1e-3 * x.shape[1])


class Strict(Counting):
    """An MLP that does not take fewer rows than the trial's."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 16:
            raise ValueError("too few rows")
        return self.inner(x)


@pytest.mark.parametrize("kind", [Counting, Strict])
def test_an_mlp_that_does_not_bear_it_gets_all_rows(kind: type[nn.Module]) -> None:
    """Found out on the trial."""
    model, sequences = build("llama"), batch()
    trunk = trunk_of(model)
    layer = trunk.layers[-1]
    layer.mlp = kind(layer.mlp)
    sharing._mark(trunk)
    assert vars(trunk)[MARK] == PROJECTED
    assert not any("forward" in vars(module) for module in model.modules())
    with rows_of(layer.mlp.inner) as seen:
        score(model, sequences)
    assert seen == [FED]


def test_a_layer_that_is_used_at_two_depths_gets_all_rows() -> None:
    trunk = trunk_of(build("llama"))
    trunk.layers[1] = trunk.layers[2]
    sharing._mark(trunk)
    assert MARK not in vars(trunk)


def test_a_module_that_somebody_has_wrapped_is_left_alone() -> None:
    model, sequences = build("llama"), batch()
    trunk = trunk_of(model)
    sharing.share(trunk)
    want, mlp, seen = score(model, sequences).logps, trunk.layers[-1].mlp, []
    inner = mlp.forward

    def theirs(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return inner(x)

    mlp.forward = theirs
    got = score(model, sequences).logps
    assert vars(mlp)["forward"] is theirs and seen == [FED]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(7, 24), (1, 6, 24), (2, 7, 24), (1, 1, 7, 24)])
def test_other_shapes_than_the_row_go_through_whole(shape: tuple[int, ...]) -> None:
    """Of a module that is given more than the row, or something else, each number counts."""
    trunk = trunk_of(build("llama"))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mlp, row = trunk.layers[-1].mlp, torch.randn(1, 7, 24)
    want = mlp(x)
    with read_at(trunk, torch.tensor([1, 4]), 7):
        assert torch.equal(mlp(x), want)
        assert mlp(row).any(-1).tolist() == [[False, True, False, False, True, False, False]]


def test_the_mark_goes_with_sharing() -> None:
    trunk = trunk_of(build("llama"))
    sharing.stop_sharing(trunk)
    assert MARK not in vars(trunk)


def test_a_model_that_is_used_again_is_tried_again() -> None:
    trunk = trunk_of(build("llama"))
    trunk.layers[-1].mlp = Counting(trunk.layers[-1].mlp)
    assert sharing.share(trunk) is None
    assert vars(trunk)[MARK] == PROJECTED


def test_memory_that_runs_out_meanwhile_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = trunk_of(build("llama"))
    sharing.stop_sharing(trunk)
    inner, calls = sharing.read_at, []

    def full(*args: Any) -> Any:
        calls.append(vars(args[0]).get(MARK))
        if calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return inner(*args)

    monkeypatch.setattr(sharing, "read_at", full)
    with pytest.raises(torch.OutOfMemoryError):
        sharing.share(trunk)
    assert calls[-1] == ALL
    assert MARK not in vars(trunk) and trunk.config._attn_implementation == "sdpa"


def test_a_trunk_of_another_build_has_no_names() -> None:
    model = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=61, hidden_size=24, n_layer=2, n_head=4))
    assert token_wise(model.transformer) != ()  # the name of a part is not the proof, the trial is
    trunk = nn.Sequential(nn.Linear(2, 2))
    trunk.config = tf.LlamaConfig(**SIZES)  # type: ignore[assignment]
    assert token_wise(trunk) == ()
    with read_at(trunk, torch.tensor([0]), 2):
        assert trunk(torch.ones(1, 2, 2)).shape == (1, 2, 2)
