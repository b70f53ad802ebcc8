"""Log-probs, values and scores from one row in which a prompt stands once: those of the sequences alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlx.core import sharing, tree_attention
from rlx.core.batch import Sequences
from rlx.core.classify import classify, parts_of
from rlx.core.logprobs import full_kl, score
from rlx.core.probe import trunk_of
from rlx.core.values import ValueModel

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NARROW: dict[str, Any] = {**SIZES, "sliding_window": 8}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}

CAN: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),
    "qwen3": lambda: tf.Qwen3Config(**SIZES),
    "mistral window": lambda: tf.MistralConfig(**NARROW),
    "gemma3 hybrid": lambda: tf.Gemma3TextConfig(
        **{**NARROW, "num_hidden_layers": 4}, query_pre_attn_scalar=8, sliding_window_pattern=2
    ),
    "llama4 blocks": lambda: tf.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=8, no_rope_layers=[1, 0]
    ),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "neox": lambda: tf.GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None}),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, **EXPERTS),
    "qwen3 experts": lambda: tf.Qwen3MoeConfig(
        **SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}
CANNOT: dict[str, tuple[Callable[[], Any], str]] = {
    # Older versions of transformers run it with sdpa, and then it is the attention itself that says so.
    "soft cap": (lambda: tf.Gemma2Config(**NARROW, query_pre_attn_scalar=8), "is eager|softcap"),
    "sinks": (lambda: tf.GptOssConfig(**SIZES, num_local_experts=4), "implementation is eager"),
    "state space": (
        lambda: tf.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, state_size=4),
        "implementation is eager",
    ),
    "convolution": (
        lambda: tf.Lfm2Config(
            **{k: v for k, v in SIZES.items() if k != "head_dim"},
            layer_types=["conv", "full_attention"],
            block_multiple_of=8,
        ),
        "convolution",
    ),
    "both in a layer": (lambda: tf.FalconH1Config(**SIZES, **MAMBA, mamba_chunk_size=8), "convolution"),
}


def made(config: Any, kind: Any = tf.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    model = kind.from_config(config)
    with torch.no_grad():  # large enough weights that positions and masks matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.eval()


def build(name: str, **changes: Any) -> Any:
    config = CAN[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return made(config)


def shared(model: Any) -> Any:
    assert sharing.share(trunk_of(model)) is None
    return model


Shape = tuple[tuple[int, tuple[int, ...]], ...]
TREES: Shape = ((11, (9, 4, 1, 0)), (1, (12,)), (5, ()), (20, (30, 2)), (3, (0, 0)), (6, (0,)))
"""(tokens of a prompt, tokens of each of its completions)."""
SCATTERED = [5, 0, 8, 2, 4, 9, 1, 7, 3, 6]  # no two of a group adjacent


def batch(shape: Shape = TREES, order: list[int] | None = None, seed: int = 0) -> Sequences:
    random = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=random).tolist()

    rows = []
    for group, (prompt, completions) in enumerate(shape):
        begin = draw(prompt)
        rows += [(begin, draw(completion), group) for completion in completions]
    prompts, ends, groups = zip(*[rows[i] for i in order or range(len(rows))], strict=True)
    return Sequences.from_lists(prompts, ends, groups)


def naive(model: nn.Module, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of each sequence alone, through the whole model."""
    logps, entropies = [], []
    sizes = sequences.lengths.tolist()
    for ids, scored in zip(sequences.ids.split(sizes), sequences.scored.split(sizes), strict=True):
        whole = (model(input_ids=ids[None], use_cache=False).logits[0].float() / 0.7).log_softmax(-1)
        logps.append(whole[:-1].gather(1, ids[1:, None]).squeeze(1)[scored[1:]])
        entropies.append(-(whole.exp() * whole).sum(-1)[:-1][scored[1:]])
    return torch.cat(logps), torch.cat(entropies)


def gradients(model: nn.Module, *outputs: Tensor) -> dict[str, Tensor]:
    total = sum((x * torch.linspace(-1, 2, len(x))).sum() for x in outputs)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """As vectors: single entries are sums that cancel."""
    distance = torch.stack([(got[name] - want[name]).norm() for name in want]).norm()
    size = torch.stack([want[name].norm() for name in want]).norm()
    assert float(distance) <= 1e-5 * float(size)
    for name in want:
        assert float((got[name] - want[name]).norm()) <= 2e-4 * float(want[name].norm()) + 1e-6, name


def fed(trunk: nn.Module, then: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of the ids that a trunk was fed."""
    shapes: list[tuple[int, ...]] = []
    hook = trunk.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    then()
    hook.remove()
    return shapes


@pytest.fixture(params=[True, False], ids=["merged", "apart"])
def merged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small trees in one call of attention, or each segment in its own."""
    if not request.param:
        monkeypatch.setattr("rlx.core.tree.SPARE", 0)


# Exactness


@pytest.mark.usefixtures("merged")
@pytest.mark.parametrize("order", [None, SCATTERED], ids=["adjacent", "scattered"])
@pytest.mark.parametrize("name", CAN)
def test_equals_the_sequences_alone(name: str, order: list[int] | None) -> None:
    model, sequences = build(name), batch(order=order)
    want = naive(model, sequences)
    expected = gradients(model, *want)
    shared(model)
    got = score(model, sequences, temperature=0.7, entropy=True)
    torch.testing.assert_close((got.logps, got.entropy), want, rtol=1e-5, atol=2e-5)
    assert_same_gradients(gradients(model, got.logps, got.entropy), expected)
    with torch.no_grad():
        for budget in (1, 40, 4096):
            again = score(model, sequences, temperature=0.7, entropy=True, token_budget=budget)
            torch.testing.assert_close((again.logps, again.entropy), want, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(naive(model, sequences), want, rtol=1e-5, atol=1e-5)  # alone as before


@pytest.mark.parametrize("name", CANNOT)
def test_a_model_that_cannot_stays_as_it_was(name: str) -> None:
    config, why = CANNOT[name]
    model, sequences = made(config()), batch()
    own, trunk = model.config._attn_implementation, trunk_of(model)
    reason = sharing.share(trunk)
    assert reason is not None and re.search(why, reason)
    assert not sharing.shares(trunk) and model.config._attn_implementation == own
    got = score(model, sequences, temperature=0.7)
    torch.testing.assert_close(got.logps, naive(model, sequences)[0], rtol=1e-5, atol=2e-5)


def test_a_mixture_of_attention_and_recurrence_is_seen_in_its_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before training, with the smallest weights, and even if nobody looked for convolutions."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CANNOT["both in a layer"][0]()).eval()
    monkeypatch.setattr("rlx.core.sharing._mixes_tokens", lambda trunk: False)
    reason = sharing.share(trunk_of(model))
    assert reason is not None and "would differ by" in reason


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "unheard_of"])
def test_a_layer_that_asks_for_more_than_attention_is_refused(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inner = build("llama"), tree_attention.attention
    table = tf.AttentionInterface._global_mapping
    monkeypatch.setitem(table, tree_attention.NAME, lambda *a, **k: inner(*a, **{**k, option: 1.0}))
    reason = sharing.share(trunk_of(model))
    assert reason is not None and option in reason and model.config._attn_implementation == "sdpa"


def test_packing_under_another_mask_is_caught() -> None:
    """The trap: the right positions in one row under the model's own causal mask give other numbers."""
    model, sequences = build("llama"), batch(((4, (5,)), (3, (6,))))
    want = torch.cat([model.model(input_ids=ids[None])[0][0] for ids in sequences.ids.split([9, 9])])
    positions = torch.cat([torch.arange(9), torch.arange(9)])[None]
    naked = model.model(
        input_ids=sequences.ids[None], position_ids=positions, use_cache=False,
        attention_mask=torch.ones(1, 18, dtype=torch.long),
    )[0][0]  # fmt: skip
    assert float((naked - want).norm() / want.norm()) > 0.05
    shared(model)
    got = sharing.row_states(model.model, sequences, torch.arange(18))
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_attention_registered_without_its_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other trap: transformers then drops every mask, that of padding too, without a word."""
    monkeypatch.delitem(tf.AttentionMaskInterface._global_mapping, tree_attention.NAME)
    reason = sharing.share(trunk_of(build("llama")))
    assert reason is not None and "makes its own mask" in reason


@pytest.mark.parametrize("wrong", ["window", "prefix", "position"])
def test_the_check_sees_a_wrong_tree(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mistral window")
    if wrong == "window":
        init, causal = tree_attention.TreeMask.__init__, lambda batch, head, query, key: key <= query
        monkeypatch.setattr(
            tree_attention.TreeMask,
            "__init__",
            lambda self, tree, rule, local: init(self, tree, causal, local),
        )
    elif wrong == "prefix":
        own = tree_attention._places
        monkeypatch.setattr(tree_attention, "_places", lambda *a: (own(*a)[0], own(*a)[1] * 0))
    else:
        inputs = sharing._inputs
        monkeypatch.setattr(
            sharing, "_inputs", lambda s, t: inputs(s, t) | {"position_ids": torch.arange(len(t))[None]}
        )
    reason = sharing.share(trunk_of(model))
    assert reason is not None and "would differ by" in reason


def test_every_layer_must_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.config.num_hidden_layers = 3  # one more than attend
    reason = sharing.share(trunk_of(model))
    assert reason is not None and "only 2 of its 3 layers" in reason


def test_looking_draws_nothing_and_leaves_modes_and_windows_alone() -> None:
    model = build("mistral window", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes, before = [m.training for m in model.modules()], torch.get_rng_state()
    shared(model)
    assert modes == [m.training for m in model.modules()] and torch.equal(before, torch.get_rng_state())
    assert model.config.sliding_window == 8


def test_it_is_said_and_switched_off_again() -> None:
    model, soft = build("llama"), made(CANNOT["soft cap"][0]())
    trunks, own = [trunk_of(model), trunk_of(soft)], soft.config._attn_implementation
    assert "computed once" in sharing.share_or_not(trunks[:1], True) and sharing.shares(trunks[0])
    assert re.search("Gemma2Model: .*(is eager|softcap)", sharing.share_or_not(trunks, True))
    assert "share_prefix is off" in sharing.share_or_not(trunks, False)
    assert not sharing.shares(trunks[0]) and model.config._attn_implementation == "sdpa"
    assert soft.config._attn_implementation == own


def test_nothing_of_it_is_saved(tmp_path: Any) -> None:
    shared(build("llama")).save_pretrained(tmp_path)
    assert tree_attention.NAME not in (tmp_path / "config.json").read_text()
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_sampling_is_as_before() -> None:
    model, ids = build("mistral window"), torch.randint(3, VOCABULARY, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # left padding
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    want, logits = model.generate(ids, **options), model(ids, attention_mask=mask).logits
    assert torch.equal(shared(model).generate(ids, **options), want)
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)


# What the sequences go through


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters(checkpointing: bool) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model, sequences = peft.get_peft_model(build("llama"), config).eval(), batch()
    want = naive(model, sequences)[0]
    expected = gradients(model, want)
    with torch.no_grad(), model.disable_adapter():
        off = naive(model, sequences)[0]
    shared(model)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
        model.train()
    got = score(model, sequences, temperature=0.7).logps
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert_same_gradients(gradients(model, got), expected)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(score(model, sequences, temperature=0.7).logps, off, rtol=1e-5, atol=2e-5)
    assert float((off - want).abs().max()) > 0.1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral window"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if name == "gpt2" else {}
    model, sequences = build(name, **off), batch()
    expected = gradients(model, naive(model, sequences)[0])
    shared(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    logps = score(model.train(), sequences, temperature=0.7).logps
    if reentrant:  # torch.autograd.grad does not go with it
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
    else:
        found = gradients(model, logps)
    assert_same_gradients(found, expected)


def test_dropout_of_attention_is_drawn() -> None:
    model, sequences = shared(build("llama", attention_dropout=0.3)), batch()
    with torch.no_grad():
        exact = score(model, sequences).logps
        model.train()
        draws = torch.stack([score(model, sequences).logps for _ in range(2)])
    assert float((draws[0] - draws[1]).abs().max()) > 0.01 and float((draws[0] - exact).abs().max()) > 0.01


@pytest.mark.usefixtures("fresh_accelerate")
def test_half_precision() -> None:
    sequences, accelerator = batch(), Accelerator(mixed_precision="bf16", cpu=True)
    half = build("llama").to(torch.bfloat16)
    want = naive(half, sequences)[0]
    got = score(shared(half), sequences, temperature=0.7).logps
    assert float((got - want).abs().mean()) < 0.03
    assert {g.dtype for g in gradients(half, got).values()} == {torch.bfloat16}
    exact = naive(build("llama"), sequences)[0]
    cast = score(shared(build("llama")), sequences, temperature=0.7, accelerator=accelerator).logps
    assert 1e-4 < float((cast - exact).abs().max()) and float((cast - exact).abs().mean()) < 0.03


def test_values_and_extras_and_values_of_a_model_of_their_own() -> None:
    model, sequences = build("qwen2"), batch()
    head = nn.Sequential(nn.Linear(24, 1), nn.Flatten(0))
    extras = ("correct", "square")
    plain = score(model, sequences, value_head=head, extras=extras)
    apart = ValueModel.around(build("qwen2").model)
    with torch.no_grad():
        apart.head.weight.normal_()
    values = apart.values(sequences)
    found = gradients(apart, values)
    shared(model)
    assert sharing.share(apart.backbone) is None
    tree = score(model, sequences, value_head=head, extras=extras)
    torch.testing.assert_close(tree.values, plain.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tree.square, plain.square, rtol=1e-5, atol=1e-5)
    assert torch.equal(tree.correct, plain.correct)
    assert_same_gradients(gradients(model, tree.values), gradients(model, plain.values))
    torch.testing.assert_close(apart.values(sequences), values, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(apart, apart.values(sequences)), found)
    with torch.no_grad():
        torch.testing.assert_close(apart.values(sequences, 30), values, rtol=1e-5, atol=1e-5)


def test_exact_kl() -> None:
    policy, other, sequences = build("llama"), build("qwen3"), batch()
    other_only = [full_kl(policy, lambda: _yielding(other), sequences, token_budget=60)]
    shared(policy)
    other_only.append(full_kl(policy, lambda: _yielding(other), sequences, token_budget=60))
    shared(other)
    both = full_kl(policy, lambda: _yielding(other), sequences, token_budget=60)
    torch.testing.assert_close(other_only, [both, both], rtol=1e-4, atol=2e-5)


def _yielding(model: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext(model)


@pytest.mark.parametrize("name", ["llama", "mistral window", "gpt2"])
def test_scores_of_a_classifier(name: str) -> None:
    config = CAN[name]()
    config.num_labels = 1
    model = made(config, tf.AutoModelForSequenceClassification)
    sequences = batch()
    want = torch.stack(
        [model(input_ids=ids[None]).logits[0, 0] for ids in sequences.ids.split(sequences.lengths.tolist())]
    )
    expected = gradients(model, want)
    assert sharing.share(parts_of(model)[0]) is None
    got = classify(model, sequences)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, got), expected)
    with torch.no_grad():
        torch.testing.assert_close(classify(model, sequences, token_budget=40), want, rtol=1e-5, atol=1e-5)


def test_scored_tokens_anywhere_even_in_what_is_shared() -> None:
    """Per-token masks: the prompt is scored too, and some tokens of completions are not."""
    model, whole = build("llama"), batch()
    scored = torch.arange(len(whole.ids)) % 3 > 0
    scored[whole.starts] = False
    some = Sequences(whole.ids, whole.lengths, whole.prompt_lengths, whole.groups, scored)
    want = naive(model, some)[0]
    expected = gradients(model, want)
    got = score(shared(model), some, temperature=0.7).logps
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    assert_same_gradients(gradients(model, got), expected)


def test_a_group_whose_prompts_differ_shares_what_is_the_same() -> None:
    model = build("llama")
    sequences = Sequences.from_lists(
        [[5, 6, 7], [5, 6, 8, 9], [9, 9], [9, 9]], [[4, 4], [3], [7], [7, 7, 7]], groups=[1, 1, 2, 2]
    )
    want = naive(model, sequences)[0]
    shared(model)
    shapes = fed(model.model, lambda: score(model, sequences))
    # 5 6 | 7 4 | 8 9; of the second group all three tokens of the shorter, 9 9 7, begin the longer one,
    # the last token of which predicts nothing: 9 9 7 | 7. The first group's rows end so as well: 4 and 3.
    assert shapes[-1] == (1, 2 + 2 + 2 + 3 + 1)
    torch.testing.assert_close(score(model, sequences, temperature=0.7).logps, want, rtol=1e-5, atol=2e-5)


def test_no_sequence_and_no_scored_token() -> None:
    model = shared(build("llama"))
    assert score(model, Sequences.from_lists([], [])).logps.shape == (0,)
    nothing = score(model, batch(((3, (0, 0)), (1, (0,)))))
    assert nothing.logps.shape == (0,)
    assert all(float(g.abs().sum()) == 0 for g in gradients(model, nothing.logps).values())


MODELS = {name: shared(build(name)) for name in ("mistral window", "gpt2")}
PLAIN = {name: build(name) for name in MODELS}
SHAPES = st.lists(
    st.tuples(st.integers(1, 14), st.lists(st.integers(0, 14), min_size=1, max_size=5).map(tuple)),
    min_size=1, max_size=4,
).map(tuple)  # fmt: skip


@given(SHAPES, st.randoms(use_true_random=False), st.integers(1, 90), st.sampled_from(sorted(MODELS)))
@settings(max_examples=25)
def test_any_trees_in_any_order_and_any_budget(shape: Shape, random: Any, budget: int, name: str) -> None:
    order = list(range(sum(len(completions) for _, completions in shape)))
    random.shuffle(order)
    sequences = batch(shape, order)
    want = score(PLAIN[name], sequences, entropy=True)
    got = score(MODELS[name], sequences, entropy=True)
    torch.testing.assert_close((got.logps, got.entropy), (want.logps, want.entropy), rtol=1e-5, atol=2e-5)
    if len(got.logps):
        expected = gradients(PLAIN[name], want.logps)
        found = gradients(MODELS[name], got.logps)
        size = torch.stack([g.norm() for g in expected.values()]).norm()
        apart = torch.stack([(found[n] - expected[n]).norm() for n in expected]).norm()
        assert float(apart) <= 2e-5 * float(size) + 1e-7
    with torch.no_grad():
        cut = score(MODELS[name], sequences, token_budget=budget).logps
    torch.testing.assert_close(cut, want.logps, rtol=1e-5, atol=2e-5)
