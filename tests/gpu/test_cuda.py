"""The way of a batch on a GPU, against plain computations: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import rlx
from rlx.core import varlen
from rlx.core.batch import Sequences
from rlx.core.cuda_graphs import GraphGenerator
from rlx.core.generation import generate
from rlx.core.logprobs import score
from rlx.core.paged_generation import generate_paged, why_not
from rlx.core.probe import trunk_of
from rlx.core.sharing import share
from rlx.plugins.contract import Sampling

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SIZES = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
CONFIGS = {"llama": LlamaConfig(**SIZES), "qwen2": Qwen2Config(**SIZES)}
PROMPTS = [[5, 9, 17, 3, 88, 41, 23, 7, 64, 12, 30], [71, 2, 8], [33], [44] * 9]
SEEDS = [1, 2, 3, 4]
NEW = 14
LIMITS = {"max_memory_percent": 0.2, "page_size": 256}
EXACT, HALF = 1e-4, 0.15  # nats; a float32 sum in another order, a bfloat16 pass of three layers


def build(name: str, dtype: torch.dtype):
    """A random model whose weights are scaled up so that attention matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(2)
    return model.to(DEVICE, dtype).eval()


def batch() -> Sequences:
    """Two groups of completions of unlike lengths, an empty one among them."""
    draw = torch.Generator().manual_seed(0)
    lengths, groups = [9, 4, 0, 12, 1], [0, 0, 0, 1, 1]
    completions = [torch.randint(512, (length,), generator=draw).tolist() for length in lengths]
    return Sequences.from_lists([PROMPTS[3 * group] for group in groups], completions, groups)


def plain_logps(model, sequences: Sequences) -> torch.Tensor:
    """Each sequence alone through the model, all positions, in float32 afterwards."""
    found, first = [], 0
    for length, count in zip(sequences.lengths.tolist(), sequences.counts.tolist(), strict=True):
        ids = sequences.ids[first : first + length]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        logps = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        found.append(logps[length - 1 - count :])
        first += length
    return torch.cat(found)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("heads", "pairs", "width"), [(4, 4, 64), (14, 2, 64), (12, 2, 128)])
def test_varlen_attention_is_attention_with_a_mask(heads, pairs, width, window):
    arguments = (torch.device(DEVICE, 0), torch.bfloat16, heads, pairs, width, width)
    assert varlen.deviation(*arguments, window) <= varlen.TOLERANCE


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, EXACT), (torch.bfloat16, HALF)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_are_those_of_plain_forwards(name, dtype, tolerance, shared):
    model, sequences = build(name, dtype), batch().to(torch.device(DEVICE))
    with torch.no_grad():
        wanted = plain_logps(model, sequences)
    if shared:
        assert share(trunk_of(model)) is None
    found = score(model, sequences).logps
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=tolerance)
    found.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_completions_are_those_of_model_generate(name):
    model = build(name, torch.float32)
    done = generate(model, PROMPTS, 2, Sampling(NEW, greedy=True), SEEDS)
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt], device=DEVICE)
        plain = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        assert done.ids[2 * number] == done.ids[2 * number + 1] == plain[0, len(prompt) :].tolist()


def test_continuous_batching_draws_what_the_native_loop_draws():
    model, sampling = build("llama", torch.float32), Sampling(NEW, top_k=50, stop_token_ids=(7,))
    found = generate_paged(model, PROMPTS, 4, sampling, SEEDS, LIMITS)
    wanted = generate(model, PROMPTS, 4, sampling, SEEDS)
    assert found.ids == wanted.ids and found.finished == wanted.finished
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=10 * EXACT)


@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_steps_draw_what_the_native_loop_draws(name, caplog):
    """In rounds of other sizes, with weights that were moved in place."""
    model, generator = build(name, torch.float32), GraphGenerator()
    sampling = Sampling(NEW, top_k=50, stop_token_ids=tuple(range(0, 512, 20)))
    for n in (4, 3, 4, 6):
        found = generator.generate(model, PROMPTS, n, sampling, SEEDS)
        wanted = generate(model, PROMPTS, n, sampling, SEEDS)
        assert found.ids == wanted.ids and found.finished == wanted.finished
        for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=10 * EXACT)
        assert generator.graphs is not None and len(generator.graphs.captured) > 1
        with torch.no_grad():
            model.lm_head.weight.mul_(1.1)
    assert caplog.messages == []


@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_replayed_steps_in_half_precision(precision, caplog):
    """Log-probs are those of a plain forward, and nothing was refused."""
    model = build("qwen2", torch.bfloat16 if precision == "weights" else torch.float32)
    generator = GraphGenerator()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
        for _ in range(2):
            done = generator.generate(model, PROMPTS, 2, Sampling(NEW), SEEDS)
            for number, (ids, logps) in enumerate(zip(done.ids, done.logprobs, strict=True)):
                sequence = Sequences.from_lists([PROMPTS[number // 2]], [ids]).to(torch.device(DEVICE))
                with torch.no_grad():
                    wanted = plain_logps(model, sequence)
                torch.testing.assert_close(torch.tensor(logps), wanted.cpu(), rtol=0, atol=HALF)
    assert generator.graphs is not None and caplog.messages == []


@pytest.mark.parametrize("name", CONFIGS)
def test_continuous_batching_in_half_precision_passes_its_trial(name):
    """With a flash kernel where there is one, CUDA graphs included."""
    assert why_not(build(name, torch.bfloat16), LIMITS) is None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("generator", ["native", {"name": "native", "cuda_graphs": True}, "paged"], ids=str)
def test_ppo_learns_in_bfloat16(generator, tmp_path):
    result = rlx.run(
        algo="ppo", reward="exact_match", generator=generator, mixed_precision="bf16", max_steps=20,
        plots=False, progress="none", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    rewards = [line["eval/reward"] for line in result.metrics if "eval/reward" in line]
    assert next(result.policy.model.parameters()).device.type == DEVICE
    assert rewards[-1] > rewards[0] + 0.2
