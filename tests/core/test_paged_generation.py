"""Sampling by continuous batching against the loop of rlx and model.generate, on tiny random models."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from rlx.core import paged_generation
from rlx.core.errors import ConfigError, DataError, DivergedError
from rlx.core.generation import generate
from rlx.core.paged_generation import generate_paged, why_not
from rlx.core.pretrained import quiet
from rlx.core.probe import trunk_of
from rlx.core.sharing import share, shares
from rlx.plugins.contract import Generator, Sampling
from rlx.plugins.generators.paged import Paged

if "page_size" not in ContinuousBatchingConfig.__dataclass_fields__:
    pytest.skip("the generator paged needs transformers 5.23", allow_module_level=True)

GQA = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": LlamaConfig(**GQA),
    "qwen2": Qwen2Config(**GQA),
    "mistral": MistralConfig(**GQA, sliding_window=6),  # shorter than most prompts
    "gemma3": Gemma3TextConfig(**GQA, head_dim=8, sliding_window=6, layer_types=SLIDING),
    "gemma2": Gemma2Config(**GQA, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),  # eager attention
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),  # makes its own attention
    "lfm2": Lfm2Config(**GQA, layer_types=["conv", "full_attention"]),
    "mamba": MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
}
PROMPTS = [
    [5, 9, 17, 3, 88, 41, 23, 7, 64, 12, 30],
    [71, 2, 8],
    [33],
    [5, 9, 17, 3, 88, 41, 23, 7, 64, 12, 30],
]
SEEDS = [1, 2, 3, 4]
NEW = 14
LIMITS = {"max_memory_percent": 0.2, "page_size": 8}
GREEDY = Sampling(NEW, greedy=True)
DRAWN = Sampling(NEW, temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, stop_token_ids=(7, 50))


def build(name: str, **changes):
    """A random model, its weights scaled up so that attention matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], **changes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def same(found, wanted) -> None:
    """Tokens and flags are equal, log-probs to rounding."""
    assert found.ids == wanted.ids and found.finished == wanted.finished
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        assert len(one) == len(other)
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma3", "gemma2", "gpt2"])
def test_draws_log_probs_and_stops_are_those_of_the_native_loop(name):
    model = build(name)
    found = generate_paged(model, PROMPTS, 3, DRAWN, SEEDS, LIMITS)
    same(found, generate(model, PROMPTS, 3, DRAWN, SEEDS))
    assert True in found.finished and False in found.finished
    assert len({tuple(ids) for ids in found.ids[:3]}) > 1  # forks draw for themselves
    assert why_not(model, LIMITS) is None


def test_greedy_is_model_generate_with_nothing_of_its_generation_config(llama):
    config = llama.generation_config
    kept = config.to_dict()
    config.update(suppress_tokens=list(range(48)), temperature=3.0, eos_token_id=40, max_new_tokens=3)
    try:
        found = generate_paged(llama, PROMPTS, 2, GREEDY, SEEDS, LIMITS)
    finally:
        config.update(**kept)
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        plain = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        assert found.ids[2 * number] == found.ids[2 * number + 1] == plain[0, len(prompt) :].tolist()
    assert not any(found.finished)


@pytest.mark.parametrize(
    ("limits", "batch_size"),
    [
        ({"max_batch_tokens": 5}, None),  # prompts are prefilled in pieces
        ({"num_blocks": 10}, None),  # too few for all: rows wait, or start again with what they have
        ({}, 3),
    ],
)
def test_neither_the_cache_nor_the_batch_changes_a_sample(llama, limits, batch_size):
    sampling = replace(DRAWN, batch_size=batch_size)
    found = generate_paged(llama, PROMPTS, 4, sampling, SEEDS, {**LIMITS, **limits})
    same(found, generate(llama, PROMPTS, 4, DRAWN, SEEDS))


def test_a_row_that_lost_its_pages_goes_on_where_it_was(llama, monkeypatch):
    from transformers.generation.continuous_batching.requests import RequestState

    again, kept = [], RequestState.create_equivalent_initial_request

    def counted(state):
        again.append(len(state.generated_tokens))
        return kept(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counted)
    found = generate_paged(llama, PROMPTS[:1], 8, DRAWN, SEEDS[:1], {**LIMITS, "num_blocks": 8})
    assert max(again) > 0  # begun, put out, and begun anew
    same(found, generate(llama, PROMPTS[:1], 8, DRAWN, SEEDS[:1]))


def test_padded_steps_and_a_warm_up_change_nothing(llama, monkeypatch):
    """What CUDA graphs bring with them, without a GPU."""
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    made, warmed, plain, first = [], [], ModelRunner.__init__, ModelRunner.run_one_warmup

    def padding(self, *args, **options):
        plain(self, *args, **options)
        self.pad_inputs = True
        made.append(self)

    monkeypatch.setattr(ModelRunner, "__init__", padding)
    monkeypatch.setattr(
        ModelRunner, "run_one_warmup", lambda *args, **options: warmed.append(1) or first(*args, **options)
    )
    found = generate_paged(llama, PROMPTS, 3, DRAWN, SEEDS, LIMITS)
    assert made and warmed
    same(found, generate(llama, PROMPTS, 3, DRAWN, SEEDS))


def test_the_clock_does_not_decide_which_prompts_share_a_step(llama, monkeypatch):
    from transformers.generation.continuous_batching import continuous_api

    manager, waiting = continuous_api.ContinuousBatchingManager, []
    start = manager.start

    def noting(self):
        waiting.append(self.input_queue.qsize())
        start(self)

    monkeypatch.setattr(manager, "start", noting)
    generate_paged(llama, PROMPTS, 3, DRAWN, SEEDS, LIMITS)
    assert waiting == [3 + 3]  # three that the library forks, and the one that it cannot three times


def test_a_prompt_draws_the_same_alone(llama):
    together = generate_paged(llama, PROMPTS, 2, DRAWN, SEEDS, LIMITS)
    alone = generate_paged(llama, PROMPTS[1:2], 2, DRAWN, SEEDS[1:2], LIMITS)
    assert alone.ids == together.ids[2:4]


def test_prompts_of_one_token_have_nothing_to_fork(llama):
    found = generate_paged(llama, [[33], [60]], 3, DRAWN, [5, 6], LIMITS)
    same(found, generate(llama, [[33], [60]], 3, DRAWN, [5, 6]))


def test_a_model_that_shares_prompts_still_does_afterwards():
    model = build("llama")
    assert share(trunk_of(model)) is None
    model.train()
    random = torch.get_rng_state()
    found = generate_paged(model, PROMPTS, 2, DRAWN, SEEDS, LIMITS)
    assert shares(trunk_of(model)) and model.config._attn_implementation == "rlx_tree"
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    same(found, generate(model, PROMPTS, 2, DRAWN, SEEDS))


def test_eager_attention_is_put_back():
    model = build("llama", attn_implementation="eager")
    found = generate_paged(model, PROMPTS, 1, GREEDY, SEEDS, LIMITS)
    assert model.config._attn_implementation == model.model.config._attn_implementation == "eager"
    assert found.ids == generate(model, PROMPTS, 1, GREEDY, SEEDS).ids


def test_it_samples_from_the_weights_as_they_are(llama):
    """Keys of older weights would be met again where a prompt's page is still known."""
    model, prompts = build("llama"), [list(range(20, 44))]  # three pages
    before = generate_paged(model, prompts, 1, GREEDY, [0], LIMITS)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.neg_()
    after = generate_paged(model, prompts, 1, GREEDY, [0], LIMITS)
    assert after.ids != before.ids
    assert after.ids == generate(model, prompts, 1, GREEDY, [0]).ids


def test_the_cache_is_gone_when_it_returns(llama):
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    gc.collect()
    frozen = gc.get_freeze_count()
    gc.disable()  # nobody else's collection may help
    try:
        generate_paged(llama, PROMPTS, 2, DRAWN, SEEDS, LIMITS)
        assert not any(type(one) is PagedAttentionCache for one in gc.get_objects())
    finally:
        gc.enable()
    assert gc.get_freeze_count() <= frozen


def test_under_autocast_log_probs_are_left_to_be_recomputed(llama):
    with torch.autocast("cpu", torch.bfloat16):
        found = generate_paged(llama, PROMPTS, 1, DRAWN, SEEDS, LIMITS)
    assert found.logprobs is None
    assert found.ids == generate(llama, PROMPTS, 1, DRAWN, SEEDS).ids  # in the type of the weights


def test_logits_that_are_not_finite_are_refused():
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[88] = float("nan")  # in the first prompt and its twin
    with pytest.raises(DivergedError, match=r"at token 0 \(sample 0\)"):
        generate_paged(model, PROMPTS, 2, DRAWN, SEEDS, LIMITS)


def test_prompts_are_checked_as_everywhere(llama):
    with pytest.raises(DataError, match="a prompt is empty"):
        generate_paged(llama, [[]], 1, DRAWN, [0], LIMITS)
    assert generate_paged(llama, [], 2, DRAWN, [], LIMITS).ids == []


@pytest.mark.parametrize("name", ["bloom", "lfm2", "mamba"])
def test_models_that_it_cannot_serve_are_refused_before_the_first_sample(name):
    from contextlib import nullcontext
    from types import SimpleNamespace

    model = build(name)
    policy = SimpleNamespace(base=model, model=model, active=lambda: nullcontext(model))
    with pytest.raises(ConfigError, match="cannot sample from") as caught:
        Paged(Paged.Config(**LIMITS)).sync(policy)
    assert "--generator native" in caught.value.hint


# Not ours: peft asks for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_virtual_tokens_of_an_adapter_are_refused():
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "virtual tokens" in (why_not(peft.get_peft_model(build("llama"), config), LIMITS) or "")


def test_attention_that_it_gets_wrong_is_noticed(llama, monkeypatch):
    """Negative control of the trial: positions of the requests are mixed up."""
    monkeypatch.setattr(llama.model.rotary_emb, "attention_scaling", 1.5)
    kept = llama.forward
    monkeypatch.setattr(
        llama,
        "forward",
        lambda *args, **options: kept(*args, **{**options, "position_ids": 0 * options["position_ids"]}
                                      if "cache" in options else options),
    )  # fmt: skip
    assert "off by" in (why_not(llama, LIMITS) or "")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ZeroDivisionError("no")])
def test_what_stops_the_thread_is_raised_here_and_all_is_put_back(error, monkeypatch):
    """The caller of a generator halves its batch where memory ran out."""
    model = build("llama", attn_implementation="eager").train()

    def failing(*args, **options):
        raise error

    monkeypatch.setattr(model.model, "forward", failing)
    threads = set(threading.enumerate())
    with quiet(), pytest.raises(type(error), match=str(error)):
        generate_paged(model, PROMPTS, 2, DRAWN, SEEDS, LIMITS)
    assert model.training and model.config._attn_implementation == "eager"
    assert set(threading.enumerate()) <= threads


def test_too_little_memory_says_so(llama):
    with pytest.raises(torch.OutOfMemoryError, match="no room for the paged cache"):
        generate_paged(llama, PROMPTS, 1, DRAWN, SEEDS, {**LIMITS, "max_memory_percent": 1e-9})


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"repetition_penalty": 1.2}, "repetition_penalty"), ({"stop_strings": ("a",)}, "stop_strings")],
)
def test_options_that_need_a_history_are_refused(changes, name):
    generator = Paged(Paged.Config())
    assert isinstance(generator, Generator)
    generator.policy = object()
    with pytest.raises(ConfigError, match=name) as caught:
        generator.generate([[1]], 1, replace(DRAWN, **changes), [0])
    assert "--generator native" in caught.value.hint


def test_the_spare_cell_takes_what_counts_for_nothing(llama):
    """A warm-up, a step past the last, and rows that an earlier, wider step was told about."""
    from types import SimpleNamespace

    from rlx.core.decoding import Door, Run

    run = Run(Door(llama, llama), [[1, 2]], 2, Sampling(3), [0], None, None)
    draw = paged_generation._Draw(run)
    draw.samples = {"0": 0, "0__child#0": 1}

    def request(name, position):
        return SimpleNamespace(state=SimpleNamespace(request_id=name, position_offset=position))

    first = draw.prepare_tensor_args([request("0", 2), request("0__child#0", 4)])
    assert first.tolist() == [0, 5]  # sample 0 at step 0; sample 1, of three steps a sample, at step 2
    later = draw.prepare_tensor_args([request("0", 5)])
    assert later.tolist() == [6, 6]  # past the last step, and nobody
    assert draw.prepare_tensor_args([request("__warmup_DECODING_0__", 9)]).tolist() == [6, 6]
