"""Log-probs of scored tokens against whole unpadded forward passes, for many kinds of model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlx.core import lm_head, probe
from rlx.core.batch import Sequences
from rlx.core.errors import ConfigError
from rlx.core.logprobs import full_kl, score

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 8}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "llama tied": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),
    "qwen3": lambda: tf.Qwen3Config(**SIZES),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "neox": lambda: tf.GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None}),
    "mistral window": lambda: tf.MistralConfig(**{**SIZES, **WINDOW}),
    "gemma2": lambda: tf.Gemma2Config(
        **{**SIZES, **WINDOW}, final_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "gemma3 hybrid": lambda: tf.Gemma3TextConfig(
        **{**SIZES, **WINDOW}, final_logit_softcapping=3.0, query_pre_attn_scalar=8, sliding_window_pattern=2
    ),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "mamba": lambda: tf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, state_size=4, pad_token_id=0
    ),
    "lfm2 hybrid": lambda: tf.Lfm2Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"},
        layer_types=["conv", "full_attention"],
        block_multiple_of=8,
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=8, no_rope_layers=[1, 0]
    ),
    "cohere": lambda: tf.CohereConfig(**SIZES, logit_scale=4.0),
    "granite": lambda: tf.GraniteConfig(**SIZES, logits_scaling=0.125),
}


def build(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # large enough weights that logits, caps and positions matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.eval()


def batch(
    seed: int = 0, lengths: tuple[tuple[int, int], ...] = ((3, 4), (1, 7), (12, 15), (5, 0), (2, 1))
) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return Sequences.from_lists([draw(p) for p, _ in lengths], [draw(c) for _, c in lengths])


def naive(model: nn.Module, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Each sequence alone, unpadded, through the whole model."""
    logps, entropies = [], []
    sizes = sequences.lengths.tolist()
    for ids, scored in zip(sequences.ids.split(sizes), sequences.scored.split(sizes), strict=True):
        whole = (
            model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :].float() / temperature
        ).log_softmax(-1)
        logps.append(whole[:-1].gather(1, ids[1:, None]).squeeze(1)[scored[1:]])
        entropies.append(-(whole.exp() * whole).sum(-1)[:-1][scored[1:]])
    return torch.cat(logps), torch.cat(entropies)


def gradients(model: nn.Module, *outputs: Tensor) -> dict[str, Tensor]:
    total = sum((x * torch.linspace(-1, 2, len(x))).sum() for x in outputs)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Relative to the largest entry of each tensor: entries are sums that cancel."""
    for name in want:
        scale = float(want[name].abs().max())
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=rtol * scale + 1e-7, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_whole_unpadded_passes(name: str) -> None:
    model, sequences = build(name), batch()
    got = score(model, sequences, temperature=0.7, entropy=True)
    plan = probe.plan_for(model, sequences)
    assert plan.direct  # trunk and head apart, not the whole model
    assert not plan.masked
    want = naive(model, sequences, 0.7)
    assert got.logps.dtype == torch.float32
    torch.testing.assert_close((got.logps, got.entropy), want, rtol=1e-5, atol=2e-5)
    assert float(want[1].detach().std()) > 0.01  # the test would see a wrong scale
    assert_same_gradients(gradients(model, got.logps, got.entropy), gradients(model, *want))
    with torch.no_grad():
        again = score(model, sequences, temperature=0.7, entropy=True, token_budget=30)
    torch.testing.assert_close((again.logps, again.entropy), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_transforms_of_an_untrained_head_are_found(name: str) -> None:
    """On the zero logits of a head of zeros no soft cap or factor shows: they are found all the same."""
    model = build(name, tie_word_embeddings=False)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.zeros_like(head.weight))
    plan = probe.plan_for(model, batch())
    assert plan.direct
    expected = {"gemma2": (1.0, 2.0), "cohere": (4.0, None), "granite": (8.0, None)}
    assert (plan.scale, plan.softcap) == expected[name]


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "lm_head"]], ids=["all-linear", "lm_head"])
@pytest.mark.parametrize("gap", [False, True], ids=["plain", "saved-modules"])
def test_adapters(modules: Any, gap: bool) -> None:
    saved = ["lm_head"] if gap and "lm_head" not in modules else None
    config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False, modules_to_save=saved)
    model = peft.get_peft_model(build("llama"), config).eval()
    sequences = batch()
    want, got = naive(model, sequences), score(model, sequences, entropy=True)
    torch.testing.assert_close((got.logps, got.entropy), want, rtol=1e-5, atol=2e-5)
    assert_same_gradients(gradients(model, got.logps, got.entropy), gradients(model, *want))
    with torch.no_grad(), model.disable_adapter():
        off = score(model, sequences).logps
        torch.testing.assert_close(off, naive(model, sequences)[0], rtol=1e-5, atol=2e-5)
    assert float((off - want[0]).abs().max()) > 0.1  # the adapter does something
    torch.testing.assert_close(score(model, sequences).logps, want[0], rtol=1e-5, atol=2e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(score(merged, sequences).logps, want[0], rtol=1e-5, atol=1e-4)


def test_prompt_tuning_takes_the_whole_model(caplog: pytest.LogCaptureFixture) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, sequences = peft.get_peft_model(build("llama"), config).eval(), batch()
    with caplog.at_level(logging.WARNING, logger="rlx"):
        got = score(model, sequences, value_head=nn.Sequential(nn.Linear(24, 1), nn.Flatten(0)))
        score(model, sequences)
    assert len(caplog.records) == 1
    torch.testing.assert_close(got.logps, naive(model, sequences)[0], rtol=1e-5, atol=2e-5)
    assert got.values.shape == got.logps.shape
    gradient = gradients(model, got.logps)["prompt_encoder.default.embedding.weight"]
    assert float(gradient.abs().max()) > 0


class Biased(tf.LlamaForCausalLM):
    """Adds to its logits what no config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 3, VOCABULARY)
        return out


def test_an_unknown_end_of_the_model_takes_the_whole_model(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, sequences = Biased(CONFIGS["llama"]()).eval(), batch()
    with caplog.at_level(logging.WARNING, logger="rlx"), torch.no_grad():
        got = score(model, sequences, temperature=0.7, entropy=True, token_budget=30)
    assert ["Biased" in record.getMessage() for record in caplog.records] == [True]
    torch.testing.assert_close((got.logps, got.entropy), naive(model, sequences, 0.7), rtol=1e-5, atol=2e-5)


def test_a_model_that_looks_ahead_is_refused() -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2
    )  # fmt: skip
    model = tf.BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    with pytest.raises(ConfigError, match="E-MODEL-NOT-CAUSAL"):
        score(model, batch())


def test_an_encoder_decoder_is_refused() -> None:
    config = tf.T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        score(tf.T5ForConditionalGeneration(config), batch())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_half_precision(name: str) -> None:
    """Bf16 has 8 bits and padding changes the order of sums: an error of 2⁻⁸ in logits near 10 is 0.04."""
    model, sequences = build(name).to(torch.bfloat16), batch()
    got, want = score(model, sequences, entropy=True), naive(model, sequences)
    assert probe.plan_for(model, sequences).direct
    assert got.logps.dtype == got.entropy.dtype == torch.float32
    assert float((got.logps - want[0]).abs().mean()) < 0.03
    ours, theirs = gradients(model, got.logps), gradients(model, want[0])
    for parameter in ours:
        assert ours[parameter].dtype == torch.bfloat16
        distance = float((ours[parameter] - theirs[parameter]).float().norm())
        assert distance <= 0.05 * float(theirs[parameter].float().norm()) + 1e-6, parameter


@pytest.mark.usefixtures("fresh_accelerate")
def test_autocast_of_an_accelerator() -> None:
    model, sequences = build("llama"), batch()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    exact = score(model, sequences).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = naive(model, sequences)[0]
    prepared = accelerator.prepare_model(build("llama"))
    got = score(prepared, sequences, accelerator=accelerator).logps
    assert got.dtype == torch.float32
    assert float((got - want).abs().mean()) < 0.03
    assert float((got - exact).abs().max()) > 1e-4  # it did run in bf16
    gradients(prepared, got)


def test_empty_batches_and_sequences() -> None:
    model, none = build("llama"), batch(lengths=())
    for sequences in (none, batch(lengths=((3, 0), (1, 0))), batch(lengths=((1, 0),))):
        got = score(model, sequences, entropy=True, value_head=nn.Sequential(nn.Linear(24, 1), nn.Flatten(0)))
        assert got.logps.shape == got.entropy.shape == got.values.shape == (0,)
        with torch.no_grad():
            assert score(model, sequences).logps.shape == (0,)
        assert full_kl(model, lambda: nullcontext(model), sequences).shape == (0,)
    # fault[N9]: a micro-batch without a scored token still goes backward, and gives zeros.
    nothing = score(model, batch(lengths=((3, 0), (1, 0)))).logps
    assert all(float(g.abs().sum()) == 0 for g in gradients(model, nothing).values())


def test_scored_tokens_anywhere() -> None:
    """Assistant turns of a conversation: scored tokens in pieces, the last token not scored."""
    model, whole = build("llama"), batch(lengths=((2, 9), (1, 6)))
    scored = whole.scored & (torch.arange(len(whole.ids)) % 3 > 0)
    scored[-1] = False
    some = Sequences(whole.ids, whole.lengths, whole.prompt_lengths, whole.groups, scored)
    torch.testing.assert_close(score(model, some).logps, naive(model, some)[0], rtol=1e-5, atol=2e-5)


def test_values_come_from_the_state_before_the_token() -> None:
    model, sequences = build("llama"), batch()
    head = nn.Sequential(nn.Linear(24, 1), nn.Flatten(0))
    want = []
    for ids, prompt in zip(
        sequences.ids.split(sequences.lengths.tolist()), sequences.prompt_lengths.tolist(), strict=True
    ):
        hidden = model.model(input_ids=ids[None], use_cache=False)[0][0]
        want.append(head(hidden[prompt - 1 : -1]))
    got = score(model, sequences, value_head=head).values
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert head[0].weight.grad is not None
    assert float(model.model.embed_tokens.weight.grad.abs().max()) > 0
    with torch.no_grad():
        cut = score(model, sequences, value_head=head, token_budget=8).values
    torch.testing.assert_close(cut, got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_in_train_mode(name: str) -> None:
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if name == "gpt2" else {}
    model, sequences = build(name, **off), batch()
    want = gradients(model, score(model, sequences).logps)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_gradients(gradients(model, score(model, sequences).logps), want, rtol=1e-5)
    assert model.training


def test_finding_out_draws_nothing_and_leaves_modes_alone() -> None:
    model, sequences = build("gpt2"), batch()
    model.train()
    model.transformer.h[0].eval()  # a frozen part, say
    modes = {name: module.training for name, module in model.named_modules()}
    before = torch.get_rng_state()
    probe.plan_for(model, sequences)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not model.get_output_embeddings()._forward_hooks


MODEL = build("mistral window")


@given(st.permutations(range(5)), st.integers(1, 120), st.integers(0, 20))
@settings(max_examples=15)
def test_neither_row_order_nor_token_budget_shows(order: list[int], budget: int, seed: int) -> None:
    sequences, index = batch(seed), torch.tensor(order)
    with torch.no_grad():
        want = score(MODEL, sequences, token_budget=10_000).logps
        got = score(MODEL, sequences.take(index), token_budget=budget).logps
    pieces = want.split(sequences.counts.tolist())
    torch.testing.assert_close(got, torch.cat([pieces[i] for i in order]), rtol=1e-5, atol=2e-5)


@given(st.sets(st.integers(1, 4)), st.integers(0, 20))
@settings(max_examples=8)
def test_gradients_of_parts_add_up(cuts: set[int], seed: int) -> None:
    sequences = batch(seed)
    loss = lambda part: gradients(MODEL, score(MODEL, part).logps.sum()[None])  # noqa: E731
    whole, edges = loss(sequences), [0, *sorted(cuts), 5]
    parts = [loss(sequences.take(torch.arange(a, b))) for a, b in pairwise(edges)]
    assert_same_gradients({name: sum(p[name] for p in parts) for name in whole}, whole)


def test_one_head_row_a_scored_token(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    inner = lm_head._logits

    def counting(hidden: Tensor, *args: Any) -> Tensor:
        rows.append(len(hidden))
        return inner(hidden, *args)

    monkeypatch.setattr(lm_head, "_logits", counting)
    model, sequences = build("llama"), batch()
    score(model, sequences)
    assert sum(rows) == int(sequences.scored.sum())


@pytest.mark.parametrize("where", ["trunk", "head", "separate", "whole"])
def test_full_kl(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = batch()
    if where in ("trunk", "head"):
        modules = ["q_proj", "v_proj"] if where == "trunk" else ["lm_head"]
        config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
        policy = peft.get_peft_model(build("gemma2", tie_word_embeddings=False), config).eval()

        @contextmanager
        def reference() -> Any:
            with policy.disable_adapter():
                yield policy
    else:
        torch.manual_seed(1)
        policy = build("llama") if where == "separate" else Biased(CONFIGS["llama"]()).eval()
        other = build("qwen3")

        def reference() -> Any:
            return nullcontext(other)

    def whole(model: nn.Module) -> Tensor:
        rows = []
        sizes = sequences.lengths.tolist()
        for ids, scored in zip(sequences.ids.split(sizes), sequences.scored.split(sizes), strict=True):
            rows.append((model(input_ids=ids[None]).logits[0].float() / 0.7).log_softmax(-1)[:-1][scored[1:]])
        return torch.cat(rows)

    with torch.no_grad():
        p = whole(policy)
        with reference() as model:
            q = whole(model)
    want = (p.exp() * (p - q)).sum(-1)
    monkeypatch.setattr("rlx.core.logprobs.chunk_rows", lambda vocabulary: 4)
    got = full_kl(policy, reference, sequences, temperature=0.7, token_budget=20)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert float(want.max()) > 0.01
    assert not got.requires_grad


def test_values_alone_leave_the_output_head_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences, head = build("llama"), batch(), nn.Linear(24, 1)
    squeeze = nn.Sequential(head, nn.Flatten(0))
    with torch.no_grad():
        both = score(model, sequences, value_head=squeeze, token_budget=30)
        monkeypatch.setattr("rlx.core.logprobs.head_logps", None)
        alone = score(model, sequences, value_head=squeeze, token_budget=30, logps=False)
    assert torch.equal(alone.values, both.values) and len(alone.logps) == 0


def test_extras_come_in_the_order_of_the_tokens_whatever_the_budget() -> None:
    model, sequences = build("llama"), batch()
    once = score(model, sequences, extras=("correct", "square"))
    with torch.no_grad():
        parts = score(model, sequences, extras=("square", "correct"), token_budget=30)
        nothing = score(model, sequences.take(torch.zeros(0, dtype=torch.long)), extras=("correct", "square"))
    assert parts.correct.dtype == torch.bool and torch.equal(parts.correct, once.correct)
    torch.testing.assert_close(parts.square, once.square, rtol=1e-5, atol=1e-5)
    assert bool((once.square <= 0).all()) and not once.square.requires_grad
    assert nothing.correct.shape == nothing.square.shape == (0,)
    assert score(model, sequences).correct is None
