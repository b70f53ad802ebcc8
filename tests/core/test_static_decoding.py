"""The static decode step against the ordinary loop: the same tokens and log-probs, in fixed buffers."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlx.core import cuda_graphs, static_decoding
from rlx.core.cuda_graphs import CannotCaptureError, GraphGenerator
from rlx.core.decode_loop import prefill
from rlx.core.decoding import Door, Run
from rlx.core.errors import ConfigError, DivergedError
from rlx.core.generation import generate
from rlx.core.precision import generation_precision
from rlx.core.static_decoding import Stage, bucket, difference, length_of, why_not
from rlx.plugins.contract import Sampling
from rlx.plugins.generators.native import Native
from rlx.plugins.generators.plain import Plain

BASE = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
GQA = dict(BASE, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
GPT2 = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=26, bos_token_id=0, eos_token_id=0)
CONFIGS = {
    "llama": LlamaConfig(**GQA),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=8),
    "gpt2": GPT2Config(**GPT2),
    "gpt_neox": GPTNeoXConfig(**BASE),
}
REFUSED = {
    "mistral": (MistralConfig(**GQA, sliding_window=6), "not all of its layers are full attention"),
    "bloom": (BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), "its attention is eager"),
    "mamba": (
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4),
        "not all of its layers are full attention",
    ),
    "eager": (LlamaConfig(**GQA, attn_implementation="eager"), "its attention is eager, and sdpa is needed"),
    "dynamic": (
        LlamaConfig(**GQA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "its rotary frequencies change with the positions",
    ),
}  # fmt: skip
PROMPTS = [[5, 9, 17, 3, 88, 41, 23, 7, 64, 12, 30], [71, 2, 8], [33], [44] * 9]
SEEDS = [1, 2, 3, 4]
NEW = 14
STOPS = tuple(range(0, 96, 9))  # rows end all the time


def build(config):
    """A random model, its weights scaled up so that greedy output does not repeat one token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def llama():
    return build(CONFIGS["llama"])


def draw(model, sampling: Sampling, n: int = 3, generator: GraphGenerator | None = None, **options):
    """What the ordinary loop draws, and what the static one does."""
    generator = generator or GraphGenerator(captured=False)
    wanted = generate(model, PROMPTS, n, sampling, SEEDS, **options)
    return wanted, generator.generate(model, PROMPTS, n, sampling, SEEDS, **options)


def assert_same(wanted, got) -> None:
    assert got.ids == wanted.ids and got.finished == wanted.finished
    for mine, theirs in zip(got.logprobs, wanted.logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and address of the first layer's keys at each step from now on."""
    seen: list[tuple[int, int]] = []
    step = Stage.step

    def watched(stage):
        seen.append((stage.rows, stage.cache.layers[0].keys.data_ptr()))
        return step(stage)

    monkeypatch.setattr(Stage, "step", watched)
    return seen


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_and_log_probs_are_those_of_the_ordinary_loop(name, greedy):
    model = build(CONFIGS[name])
    assert why_not(Door(model, model)) is None
    free = generate(model, PROMPTS, 1, Sampling(NEW, greedy=True), SEEDS)
    stops = {*STOPS, *(ids[3 * place] for place, ids in enumerate(free.ids))}  # one of each greedy row
    sampling = Sampling(NEW, temperature=1.3, greedy=greedy, stop_token_ids=tuple(stops))
    wanted, got = draw(model, sampling)
    assert_same(wanted, got)
    lengths = {len(ids) for ids in wanted.ids}
    assert any(got.finished) and len(lengths) > (1 if greedy else 3)  # rows ended, one after the other


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_so_are_those_of_batches(batch_size, llama):
    sampling = Sampling(NEW, top_k=20, repetition_penalty=1.2, stop_token_ids=STOPS)
    assert_same(*draw(llama, sampling, n=2, batch_size=batch_size))


def test_rows_move_to_smaller_buckets_of_the_same_storage(llama, monkeypatch):
    seen = stages(monkeypatch)
    generator = GraphGenerator(captured=False)
    assert_same(*draw(llama, Sampling(NEW, stop_token_ids=STOPS), 7, generator))
    steps = [rows for rows, _ in seen[2:]]  # the first two are of the trial
    assert steps == sorted(steps, reverse=True) and steps[0] == 32  # 28 rows
    assert len(set(steps)) > 2 and all(rows & (rows - 1) == 0 for rows in steps)
    assert len({address for _, address in seen[2:]}) == 1


@pytest.mark.parametrize(("rows", "found"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_buckets_are_powers_of_two(rows, found):
    assert bucket(rows) == found


def test_lengths_are_rounded_up():
    assert [length_of(tokens) for tokens in (1, 64, 65)] == [64, 64, 128]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_asks_the_device_for_no_number(name):
    """On a device without numbers whatever would wait for one, and could not be captured, fails."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
        door = Door(model, model)
        with torch.no_grad():
            ids, cache = torch.zeros(2, 5, dtype=torch.long), door.new_cache()
            door(ids, torch.arange(5).expand(2, 5), None, cache)
            stage = Stage(door, cache, 4, 64)
            assert stage.step().shape == (4, 96)


def load(stage: Stage | None, model=None) -> Stage:
    """Put four unlike prompts into a stage, or into a new one for a model."""
    door = stage.door if stage is not None else Door(model, model)
    run = Run(door, PROMPTS, 1, Sampling(4, greedy=True), SEEDS, None, None)
    samples = [2, 1, 3, 0]  # the shortest prompts first
    rows, index = run.rows(samples)
    with torch.no_grad():
        cache, _ = prefill(door, rows)
    stage = stage or Stage(door, cache, 4, 64)
    stage.load(cache, index, run.expand(rows, index, samples))
    return stage


def ready(model) -> Stage:
    """A stage that four unlike prompts went into."""
    return load(None, model)


@torch.no_grad()
def test_steps_are_taken_back(llama):
    stage, tokens = ready(llama), torch.tensor([5, 6, 7, 8])
    back = stage.remember()
    first = stage(tokens)
    second = stage(tokens)
    assert not torch.equal(first, second)
    for _ in range(2):
        back()
        assert torch.equal(stage(tokens), first)


@torch.no_grad()
def test_nothing_of_an_earlier_batch_is_met_again(llama):
    """An ended row decodes on unseen; what it leaves may be infinite in half precision."""
    fresh, stage, tokens = ready(llama), ready(llama), torch.tensor([5, 6, 7, 8])
    for layer in stage.cache.layers:
        for buffer in layer.buffers:
            buffer.fill_(float("nan"))
    load(stage)
    assert torch.equal(stage(tokens), fresh(tokens))


@torch.no_grad()
def test_rows_that_moved_are_decoded_on(llama):
    stage, tokens = ready(llama), torch.tensor([5, 6, 7, 8])
    back = stage.remember()
    stage(tokens)
    wanted = stage(tokens)[[1, 3]]
    back()
    stage(tokens)
    stage.keep(torch.tensor([1, 3]))
    torch.testing.assert_close(stage(tokens[[1, 3]]), wanted, rtol=1e-5, atol=1e-5)
    assert stage.rows == 2


# Kept between rounds


def test_a_model_is_tried_once(llama, monkeypatch):
    tried: list[Door] = []
    monkeypatch.setattr(cuda_graphs, "why_not", lambda door: tried.append(door))
    generator = GraphGenerator(captured=False)
    for _ in range(2):
        generator.generate(llama, PROMPTS, 1, Sampling(NEW), SEEDS)
    assert len(tried) == 1


def test_a_stage_is_kept_as_long_as_nothing_moves(llama):
    generator, sampling = GraphGenerator(captured=False), Sampling(NEW, stop_token_ids=STOPS)
    assert_same(*draw(llama, sampling, 3, generator))
    first = generator.stage
    assert_same(*draw(llama, sampling, 2, generator))  # fewer rows
    with torch.no_grad():  # as an optimizer does
        llama.lm_head.weight.mul_(1.1)
    assert_same(*draw(llama, sampling, 3, generator))
    assert generator.stage is first
    assert_same(*draw(llama, sampling, 5, generator))  # more rows than it has
    assert generator.stage is not first and generator.stage.most == 32
    second = generator.stage
    with generation_precision(llama, "bfloat16"):
        generator.generate(llama, PROMPTS, 2, sampling, SEEDS)
    assert generator.stage is not second and generator.stage.cache.layers[0].keys.dtype == torch.bfloat16
    assert_same(*draw(llama, sampling, 2, generator))


def test_an_adapter_that_is_switched_makes_a_new_stage():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build(CONFIGS["qwen2"]), config).eval()
    generator, sampling = GraphGenerator(captured=False), Sampling(NEW, stop_token_ids=STOPS)
    wanted, got = draw(model, sampling, 2, generator)
    assert_same(wanted, got)
    first = generator.stage
    with model.disable_adapter():
        bare, got = draw(model, sampling, 2, generator)
        assert_same(bare, got)
        assert bare.ids != wanted.ids and generator.stage is not first


@pytest.mark.parametrize(("free", "kept"), [(0, False), (1 << 50, True)])
def test_it_is_given_back_before_the_update_where_memory_is_short(free, kept, llama, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "free_bytes", lambda device: free)
    generator = GraphGenerator(captured=False)
    assert_same(*draw(llama, Sampling(NEW), 2, generator))
    assert (generator.stage is not None) == kept


def test_rows_that_nobody_has_stay_within_the_positions():
    """GPT-2 knows 26 positions; the fourth row of three moves on with the others in every round."""
    generator, model = GraphGenerator(captured=False), build(CONFIGS["gpt2"])
    for _ in range(4):
        wanted = generate(model, PROMPTS[:3], 1, Sampling(NEW), SEEDS[:3])
        assert_same(wanted, generator.generate(model, PROMPTS[:3], 1, Sampling(NEW), SEEDS[:3]))
    assert generator.stage is not None and generator.stage.most == 4


def test_what_a_failed_round_has_left_is_not_met_again(llama):
    generator = GraphGenerator(captured=False)
    assert_same(*draw(llama, Sampling(NEW), 1, generator))
    handle = llama.lm_head.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(DivergedError):
        generator.generate(llama, PROMPTS, 1, Sampling(NEW), SEEDS)
    handle.remove()
    assert generator.stage is None
    assert_same(*draw(llama, Sampling(NEW), 1, generator))


def test_memory_that_runs_out_is_raised_with_everything_given_back(llama, monkeypatch):
    generator = GraphGenerator(captured=False)
    assert_same(*draw(llama, Sampling(NEW), 1, generator))

    def short(stage, tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "__call__", short)
        with pytest.raises(torch.OutOfMemoryError):
            generator.generate(llama, PROMPTS, 1, Sampling(NEW), SEEDS)
    assert generator.stage is None
    assert_same(*draw(llama, Sampling(NEW), 1, generator))


# Falling back


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_decoded_as_ever_and_that_is_said_once(name, caplog):
    config, reason = REFUSED[name]
    model, generator = build(config), GraphGenerator(captured=False)
    with caplog.at_level(logging.WARNING, logger=cuda_graphs.__name__):
        for _ in range(2):
            assert_same(*draw(model, Sampling(NEW, stop_token_ids=STOPS), 2, generator))
    lines = [message for message in caplog.messages if message.startswith("cuda_graphs: ")]
    assert len(lines) == 1 and reason in lines[0] and type(model).__name__ in lines[0]
    assert generator.stage is None


def test_virtual_tokens_of_an_adapter_are_told():
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(build(CONFIGS["llama"]), config).eval()
    assert (
        why_not(Door(model, model.get_base_model())) == "its adapter puts virtual tokens before the first one"
    )


def test_a_model_that_does_something_else_with_the_mask_is_found_out(llama, monkeypatch):
    step = Stage.step

    def blind(stage):
        stage.mask.fill_(True)
        return step(stage)

    monkeypatch.setattr(Stage, "step", blind)
    assert "its logits would be off by" in why_not(Door(llama, llama))

    def broken(stage):
        raise IndexError("a mask of four dimensions")

    monkeypatch.setattr(Stage, "step", broken)
    assert why_not(Door(llama, llama)) == "IndexError: a mask of four dimensions"


def test_a_step_that_cannot_be_captured_is_made_as_ever(llama, caplog, monkeypatch):
    def refused(graphs, stage):
        raise CannotCaptureError("its step cannot be captured: operation not permitted")

    monkeypatch.setattr(cuda_graphs.Graphs, "__call__", refused)
    generator = GraphGenerator()
    with caplog.at_level(logging.WARNING, logger=cuda_graphs.__name__):
        for _ in range(2):
            assert_same(*draw(llama, Sampling(NEW), 2, generator))
    [line] = caplog.messages
    assert line == (
        "cuda_graphs: LlamaForCausalLM is decoded without: "
        "its step cannot be captured: operation not permitted"
    )


def test_rounding_is_no_difference():
    logits = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    assert difference(logits + 1e-4, logits) is None
    assert difference(logits + 0.4, logits) == pytest.approx(0.1)
    assert difference((logits + 0.1).bfloat16(), logits.bfloat16()) is None


# The option


def test_native_has_them_on_cuda_only(llama):
    class Policy:
        base, model, tokenizer = llama, llama, None

    with pytest.raises(ConfigError, match="no CUDA graphs here") as caught:
        Native(Native.Config(cuda_graphs=True)).sync(Policy())
    assert caught.value.exit_code == 2 and "device cpu" in caught.value.got
    for plain in (Native(Native.Config()), Plain(Plain.Config())):
        plain.sync(Policy())
        assert (
            plain.generate(PROMPTS, 1, Sampling(NEW), SEEDS).ids
            == generate(llama, PROMPTS, 1, Sampling(NEW), SEEDS).ids
        )
        plain.close()


def test_under_autocast_weights_are_cast_anew_in_each_step(llama):
    assert isinstance(static_decoding.uncached(torch.device("cpu")), type(static_decoding.nullcontext()))
    with torch.autocast("cpu", torch.bfloat16):
        with static_decoding.uncached(torch.device("cpu")):
            assert not torch.is_autocast_cache_enabled()
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        wanted, got = draw(llama, Sampling(NEW, greedy=True), 1)
    assert [row[0] for row in got.ids] == [row[0] for row in wanted.ids]
