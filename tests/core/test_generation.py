"""Sampling against model.generate and naive recomputation, on tiny random models of many architectures."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlx.core import decode_loop, decoding, generation, kv_cache
from rlx.core.errors import ConfigError, DataError, DivergedError
from rlx.core.generation import generate
from rlx.plugins.contract import Generator, Sampling
from rlx.plugins.generators.native import Native
from rlx.plugins.generators.plain import Plain
from rlx.plugins.telling import Complete

BASE = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
GQA = dict(BASE, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
SLIDING = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": LlamaConfig(**GQA),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "gpt_neox": GPTNeoXConfig(**BASE),
    "bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),  # no position ids
    "mistral": MistralConfig(**GQA, sliding_window=6),  # shorter than most prompts
    "gemma3": Gemma3TextConfig(**GQA, head_dim=8, sliding_window=6, layer_types=SLIDING),
    "lfm2": Lfm2Config(**GQA, layer_types=["conv", "full_attention"]),
    "mamba": MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
}
PROMPTS = [
    [5, 9, 17, 3, 88, 41, 23, 7, 64, 12, 30],
    [71, 2, 8],
    [5, 9, 17, 3, 88, 41, 23, 7, 64, 12, 30],
    [44] * 9,
]
NEW = 14


def build(name: str):
    """A random model, its weights scaled up so that greedy output does not repeat one token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def by_generate(model, prompt: list[int], **options) -> list[int]:
    """One prompt alone through transformers, every sampling option explicit."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, top_k=0, **options)
    return out[0, len(prompt) :].tolist()


def until(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """ids up to and with the first stop."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in stops), ids)


def naive_logprobs(model, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """One full forward without cache, batch or padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
    logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logps.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_generate_token_for_token(name):
    model = build(name)
    alone = [by_generate(model, prompt) for prompt in PROMPTS]
    stops = (alone[0][5], alone[1][2], alone[3][8])  # rows end at different times, so that rows are dropped
    done = generate(model, PROMPTS, 2, Sampling(NEW, greedy=True, stop_token_ids=stops), [0] * 4)
    expected = [until(ids, stops) for ids in alone for _ in range(2)]
    assert done.ids == expected
    assert done.finished == [ids[-1] in stops for ids in expected]


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_logprobs_equal_a_naive_forward(name):
    model, sampling = build(name), Sampling(NEW, temperature=0.7, top_k=20, stop_token_ids=(3, 4, 5, 6))
    done = generate(model, PROMPTS, 2, sampling, [1, 2, 3, 4])
    for index, (ids, logps) in enumerate(zip(done.ids, done.logprobs, strict=True)):
        naive = naive_logprobs(model, PROMPTS[index // 2], ids, 0.7)
        torch.testing.assert_close(torch.tensor(logps), naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "mamba"])
def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(name, monkeypatch):
    model = build(name)
    sampling = Sampling(NEW, top_p=0.95, repetition_penalty=1.2, stop_token_ids=tuple(range(8)))
    seeds = [11, 12, 13, 14]
    together = generate(model, PROMPTS, 3, sampling, seeds)
    alone = [generate(model, [p], 3, sampling, [s]) for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together.ids == [ids for done in alone for ids in done.ids]
    assert together.ids[:3] != together.ids[6:9]  # same prompt, another seed
    for size in (1, 2, 5):
        assert generate(model, PROMPTS, 3, sampling, seeds, batch_size=size).ids == together.ids
    for threshold in (0.0, 1.0):
        monkeypatch.setattr(decode_loop, "COMPACT_AT", threshold)
        assert generate(model, PROMPTS, 3, sampling, seeds).ids == together.ids
    plain = generate(model, PROMPTS, 3, sampling, seeds, plain=True)
    assert (plain.ids, plain.finished) == (together.ids, together.finished)


def test_each_distinct_prompt_is_run_once(llama, monkeypatch):
    shapes = []
    forward = decoding.Door.__call__

    def spy(door, ids, *rest, **more):
        shapes.append(tuple(ids.shape))
        return forward(door, ids, *rest, **more)

    monkeypatch.setattr(decoding.Door, "__call__", spy)
    generate(llama, PROMPTS, 4, Sampling(3), [0] * 4)
    assert shapes == [(3, 11), (16, 1), (16, 1)]


def test_finished_rows_leave_the_batch(llama, monkeypatch):
    rows = []
    draw = decoding.Run.draw
    monkeypatch.setattr(decoding.Run, "draw", lambda *args: (rows.append(len(args[1].live)), draw(*args))[1])
    done = generate(llama, PROMPTS, 8, Sampling(NEW, stop_token_ids=tuple(range(20))), [0, 1, 2, 3])
    live = [sum(len(ids) > step for ids in done.ids) for step in range(len(rows))]
    assert rows[0] == 32 and rows[-1] < 16
    assert all(
        alive <= row <= alive / (1 - decode_loop.COMPACT_AT) for row, alive in zip(rows, live, strict=True)
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "bloom", "mistral", "gemma3"])
def test_samples_that_wait_take_the_places_of_those_that_ended(name, monkeypatch):
    model, joined = build(name), []
    join = decode_loop.join
    monkeypatch.setattr(decode_loop, "join", lambda *given: (joined.append(given[2][1]), join(*given))[1])
    sampling, seeds = Sampling(NEW, stop_token_ids=tuple(range(12))), [11, 12, 13, 14]
    whole = generate(model, PROMPTS, 5, sampling, seeds)
    assert not joined
    lengths = {len(ids) for ids in whole.ids}
    assert NEW in lengths and len(lengths) > 4  # some are cut, the others end at different times
    for size in (1, 2, 3, 7):
        joined.clear()
        done = generate(model, PROMPTS, 5, sampling, seeds, batch_size=size)
        assert (done.ids, done.finished) == (whole.ids, whole.finished)
        for mine, theirs in zip(done.logprobs, whole.logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-5, rtol=1e-5)
        places = [int(sample) for rows in joined for sample in rows.samples]
        if name in ("mistral", "gemma3"):  # their windows cannot be put together
            assert not places
        else:
            assert len(set(places)) == len(places) == 20 - size


@pytest.mark.parametrize("name", ["gpt2", "gptj", "mpt"])
def test_rows_that_joined_stay_within_the_positions_of_the_model(name):
    """An ended row, or padding, must not go on to positions, or columns, that the model does not have."""
    longest = len(PROMPTS[0]) + NEW
    small = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=longest)
    mpt = MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=longest)
    configs = {"gpt2": GPT2Config(**small), "gptj": GPTJConfig(**small, rotary_dim=4), "mpt": mpt}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[name]).eval()
    sampling = Sampling(NEW, stop_token_ids=tuple(range(8)))
    whole = generate(model, PROMPTS[:1], 60, sampling, [1])
    for size in (7, 8, 16):
        done = generate(model, PROMPTS[:1], 60, sampling, [1], batch_size=size)
        assert (done.ids, done.finished) == (whole.ids, whole.finished)


def test_a_full_batch_stays_full_while_samples_wait(llama, monkeypatch):
    sampling, seeds = Sampling(NEW, stop_token_ids=tuple(range(12))), [11, 12, 13, 14]
    rows, draw = [], decoding.Run.draw
    monkeypatch.setattr(decoding.Run, "draw", lambda *args: (rows.append(len(args[1].live)), draw(*args))[1])
    done = generate(llama, PROMPTS, 16, sampling, seeds, batch_size=16)
    steps, work = len(rows), sum(rows)
    rows.clear()
    monkeypatch.setattr(decode_loop, "REFILL_AT", 1.0)  # only an empty batch is filled
    assert generate(llama, PROMPTS, 16, sampling, seeds, batch_size=16).ids == done.ids
    assert steps < 0.75 * len(rows)
    assert work < 1.2 * sum(map(len, done.ids))


@pytest.mark.parametrize("stop", [{"stop_strings": ("zz",)}, {"repetition_penalty": 1.3}])
def test_nobody_joins_where_the_past_is_looked_at(stop, llama, monkeypatch):
    monkeypatch.setattr(decode_loop, "join", lambda *given: pytest.fail("joined"))
    monkeypatch.setattr("rlx.core.sampling._stop_strings", lambda *given: lambda ids, scores: ids[:, -1] == 3)
    sampling = Sampling(NEW, stop_token_ids=(5, 6), **stop)
    whole = generate(llama, PROMPTS, 3, sampling, [1, 2, 3, 4])
    done = generate(llama, PROMPTS, 3, sampling, [1, 2, 3, 4], batch_size=4)
    assert (done.ids, done.finished) == (whole.ids, whole.finished)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bloom", "qwen3"])
def test_prompts_of_like_length_are_computed_together(name, monkeypatch):
    model, shapes = build(name), []
    sampling, seeds = Sampling(NEW, stop_token_ids=tuple(range(8))), [11, 12, 13, 14]
    prompts = [PROMPTS[0], [7] * 10, PROMPTS[1], PROMPTS[3]]
    together = generate(model, prompts, 2, sampling, seeds)
    forward = decoding.Door.__call__

    def spy(door, ids, positions, mask, *rest, **more):
        shapes.append((*ids.shape, mask is not None))
        return forward(door, ids, positions, mask, *rest, **more)

    monkeypatch.setattr(decoding.Door, "__call__", spy)
    monkeypatch.setattr(decode_loop, "LEAST_PADDING", 1)
    monkeypatch.setattr(decode_loop, "PADDING", 0.06)
    done = generate(model, prompts, 2, sampling, seeds)
    assert shapes[:3] == [(1, 3, False), (2, 10, True), (1, 11, False)]
    assert (done.ids, done.finished) == (together.ids, together.finished)
    for mine, theirs in zip(done.logprobs, together.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.sampled_from([100, 512, 2048]))
def test_buckets_hold_every_prompt_once_with_little_padding(lengths, most):
    lengths.sort()
    found = decode_loop.buckets(lengths, most)
    assert [length for bucket in found for length in lengths[bucket]] == lengths
    for bucket in found:
        size, real = len(lengths[bucket]) * lengths[bucket][-1], sum(lengths[bucket])
        assert size <= most or len(lengths[bucket]) == 1
        assert size - real <= max(decode_loop.LEAST_PADDING, decode_loop.PADDING * real)


def test_repetition_penalty_equals_generate_and_ignores_padding(llama):
    done = generate(llama, PROMPTS, 1, Sampling(NEW, repetition_penalty=1.7, greedy=True), [0] * 4)
    assert done.ids == [by_generate(llama, prompt, repetition_penalty=1.7) for prompt in PROMPTS]
    assert done.ids[1] != by_generate(llama, PROMPTS[1])


def test_the_models_own_generation_config_has_no_say(llama):
    before = generate(llama, PROMPTS, 1, Sampling(NEW), [1, 2, 3, 4])
    kept = llama.generation_config
    try:
        llama.generation_config = type(kept)(
            do_sample=True,
            top_k=1,
            temperature=0.1,
            eos_token_id=list(range(90)),
            suppress_tokens=[1],
            pad_token_id=0,
        )
        assert generate(llama, PROMPTS, 1, Sampling(NEW), [1, 2, 3, 4]).ids == before.ids
        assert generate(llama, PROMPTS, 1, Sampling(NEW), [1, 2, 3, 4], plain=True).ids == before.ids
    finally:
        llama.generation_config = kept


def test_bfloat16_weights_give_float32_logprobs():
    model = build("llama").to(torch.bfloat16)
    done = generate(model, PROMPTS, 2, Sampling(NEW), [1, 2, 3, 4])
    assert [len(ids) for ids in done.ids] == [NEW] * 8
    for ids, logps in zip(done.ids[:2], done.logprobs[:2], strict=True):
        naive = naive_logprobs(model, PROMPTS[0], ids, 1.0)
        torch.testing.assert_close(torch.tensor(logps), naive, atol=0.3, rtol=0.05)


def test_a_peft_model_samples_with_its_adapter(llama):
    from peft import LoraConfig, get_peft_model

    plain = generate(llama, PROMPTS, 1, Sampling(NEW, greedy=True), [0] * 4)
    torch.manual_seed(0)
    model = get_peft_model(
        build("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    done = generate(model, PROMPTS, 1, Sampling(NEW, greedy=True), [0] * 4)
    assert done.ids != plain.ids
    torch.testing.assert_close(
        torch.tensor(done.logprobs[1]), naive_logprobs(model, PROMPTS[1], done.ids[1], 1.0)
    )
    assert generate(model, PROMPTS, 1, Sampling(NEW, greedy=True), [0] * 4, plain=True).ids == done.ids


def test_an_unknown_cache_falls_back_to_generate_and_says_so_once(llama, monkeypatch, caplog):
    known = generate(llama, PROMPTS, 2, Sampling(NEW), [1, 2, 3, 4])
    monkeypatch.setattr(kv_cache, "PADDABLE", frozenset())
    generation.say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        first = generate(llama, PROMPTS, 2, Sampling(NEW), [1, 2, 3, 4])
        second = generate(llama, PROMPTS, 2, Sampling(NEW), [1, 2, 3, 4])
    assert first.ids == second.ids == known.ids
    said = [record.getMessage() for record in caplog.records if "LlamaForCausalLM" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("plain", [False, True])
def test_virtual_tokens_stand_before_the_prompt_once(kind, plain, caplog):
    import peft

    adapter = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llama"), adapter).eval()
    generation.say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger=generation.__name__):
        done = generate(model, PROMPTS, 2, Sampling(NEW), [1, 2, 3, 4], plain=plain)
    assert [line.split(" has ")[0] for line in caplog.messages if " has " in line] == (
        [] if plain else ["LlamaForCausalLM with virtual tokens"]
    )
    for sample, (ids, logps) in enumerate(zip(done.ids, done.logprobs, strict=True)):
        sequence = torch.tensor([PROMPTS[sample // 2] + ids])
        with torch.no_grad():
            wanted = model(input_ids=sequence).logits[0, -NEW - 1 : -1].log_softmax(-1)
        wanted = wanted.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("plain", [False, True])
def test_each_completion_is_told_once_as_it_is_returned(llama, plain, batch_size):
    calls: list[list[Complete]] = []
    options = {"plain": plain, "batch_size": batch_size, "on_complete": calls.append}
    done = generate(llama, PROMPTS, 4, Sampling(NEW, stop_token_ids=(1, 2)), [5, 6, 7, 8], **options)
    told = {one.prompt * 4 + one.completion: one for call in calls for one in call}
    assert len(calls) > 2 and sum(map(len, calls)) == len(told) == 16
    assert [told[place].ids for place in range(16)] == done.ids
    assert [told[place].finished for place in range(16)] == done.finished
    assert True in done.finished and False in done.finished


@pytest.mark.parametrize("kind", [Native, Plain])
def test_generators_keep_the_protocol(kind, llama):
    from types import SimpleNamespace

    generator = kind(kind.Config())
    assert isinstance(generator, Generator)
    with pytest.raises(RuntimeError, match="sync"):
        generator.generate(PROMPTS, 1, Sampling(2), [0] * 4)
    generator.sync(SimpleNamespace(model=llama, tokenizer=None))
    assert (
        generator.generate(PROMPTS, 2, Sampling(5, batch_size=3), [1, 2, 3, 4]).ids
        == generate(llama, PROMPTS, 2, Sampling(5), [1, 2, 3, 4]).ids
    )
    generator.close()
    assert generator.policy is None


# Faults: ids as in the fault table.


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("rows", [pytest.param(1, id="fault[G1]"), pytest.param(4, id="fault[G2]")])
def test_a_completion_of_only_the_stop_token(llama, rows, plain):
    every = tuple(range(96))
    done = generate(llama, PROMPTS[:rows], 2, Sampling(NEW, stop_token_ids=every), [0] * rows, plain=plain)
    assert [len(ids) for ids in done.ids] == [1] * rows * 2 == [len(logps) for logps in done.logprobs]
    assert all(done.finished)


@pytest.mark.parametrize(
    "plain", [pytest.param(False, id="fault[G3]"), pytest.param(True, id="fault[G3]-plain")]
)
def test_never_stopping_is_cut_and_not_finished(llama, plain):
    done = generate(llama, PROMPTS, 1, Sampling(NEW), [0] * 4, plain=plain)
    assert [len(ids) for ids in done.ids] == [NEW] * 4
    assert not any(done.finished)


@pytest.mark.parametrize("new", [pytest.param(54, id="fault[G4]-fits"), pytest.param(55, id="fault[G4]")])
def test_a_prompt_without_room_is_named(llama, new):
    prompts = [[1, 2], [3] * 10]  # the model knows 64 positions
    if new == 54:
        assert len(generate(llama, prompts, 1, Sampling(new, greedy=True), [0, 0]).ids[1]) == 54
        return
    with pytest.raises(DataError, match="no room") as caught:
        generate(llama, prompts, 1, Sampling(new, greedy=True), [0, 0])
    assert caught.value.where == "prompt 1" and "64" in caught.value.expected


@pytest.mark.parametrize("prompt", [pytest.param([], id="empty"), pytest.param([4, 96], id="unknown token")])
def test_an_unusable_prompt_is_named(llama, prompt):
    with pytest.raises(DataError) as caught:
        generate(llama, [[1], prompt], 1, Sampling(3), [0, 0])
    assert caught.value.where == "prompt 1"


@pytest.mark.parametrize("stop", [pytest.param(0, id="fault[G5]")])
def test_a_pad_token_that_is_the_stop_token_is_kept(llama, stop):
    done = generate(llama, [[0, 0, 5, 9], [0]], 8, Sampling(NEW, stop_token_ids=(stop,)), [3, 4])
    for index, (ids, logps) in enumerate(zip(done.ids, done.logprobs, strict=True)):
        assert done.finished[index] == (ids[-1] == stop)
        assert stop not in ids[:-1]
        naive = naive_logprobs(llama, [[0, 0, 5, 9], [0]][index // 8], ids, 1.0)
        torch.testing.assert_close(torch.tensor(logps), naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, id=f"fault[G6]-{n}") for n in ("llama", "gpt2", "gemma3")])
def test_left_padding_leaves_logprobs_as_they_are(name):
    model = build(name)
    padded = generate(model, PROMPTS, 1, Sampling(NEW, greedy=True), [0] * 4)
    for index, prompt in enumerate(PROMPTS):
        single = generate(model, [prompt], 1, Sampling(NEW, greedy=True), [0])
        assert single.ids[0] == padded.ids[index]
        difference = torch.tensor(single.logprobs[0]) - torch.tensor(padded.logprobs[index])
        assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "poison", [pytest.param(float(v), id=f"fault[G7]-{v}") for v in ("nan", "inf", "-inf")]
)
def test_logits_that_are_not_finite_stop_the_run(poison, plain):
    model = build("llama")
    calls = 0

    def poke(module, inputs, output):
        nonlocal calls
        if calls == 5:
            output[2:, :, :] = poison
        calls += 1

    hook = model.lm_head.register_forward_hook(poke)
    message = r"non-finite logits at token 5 \(sample 2\)"
    with pytest.raises(DivergedError, match=message) as caught:
        generate(model, [[5, 9]], 3, Sampling(NEW), [7], plain=plain)
    hook.remove()
    assert caught.value.exit_code == 7 and caught.value.where == "prompt 0, completion 2 of 3"
    assert generate(model, [[5, 9]], 3, Sampling(NEW), [7], plain=plain).ids  # without the poison it passes


def test_the_first_sample_is_told_with_its_own_token(llama):
    """Rows that joined others are at other tokens than they."""
    run = decoding.Run(decoding.Door(llama, llama), [[5, 9], [7, 8]], 1, Sampling(NEW), [1, 2], None, None)
    rows, index = run.rows([0, 1])
    rows = run.expand(rows, index, [1, 0])
    rows.steps = torch.tensor([2, 6])
    with pytest.raises(DivergedError, match=r"at token 6 \(sample 0\)"):
        run.draw(rows, torch.full((2, 96), torch.nan))


BAD = [("temperature", 0.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("top_k", 97),
       ("top_k", -1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("stop_strings", ("",))]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"),
    [pytest.param(*bad, id=f"fault[G8]-{bad[0]}-{bad[1]}") for bad in [*BAD, ("max_new_tokens", 0)]],
)
def test_sampling_options_out_of_bounds_are_refused(llama, option, value):
    with pytest.raises(ConfigError, match=option) as caught:
        generate(llama, [[1]], 1, Sampling(**{"max_new_tokens": 4, option: value}), [0])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "plain", [pytest.param(False, id="fault[G12]"), pytest.param(True, id="fault[G12]-plain")]
)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, plain):
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    own = model.generation_config
    modes = [module.training for module in model.modules()]
    inside: list[tuple[bool, bool]] = []

    def look(module, inputs, output):
        inside.append((module.training, torch.is_grad_enabled()))
        if fails and len(inside) == 3:
            raise RuntimeError("poked")

    hook = model.lm_head.register_forward_hook(look)
    if fails:
        with pytest.raises(RuntimeError, match="poked"):
            generate(model, PROMPTS, 2, Sampling(NEW), [0] * 4, plain=plain)
    else:
        generate(model, PROMPTS, 2, Sampling(NEW), [0] * 4, plain=plain)
    hook.remove()
    assert set(inside) == {(False, False)}
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing and model.config.use_cache is False
    assert model.generation_config is own and torch.is_grad_enabled()
    assert all(weight.grad is None and not weight.is_inference() for weight in model.parameters())
