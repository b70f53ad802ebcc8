"""SFT's numbers against cross-entropy over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from rlx.algorithms.sft import SFT, SFTConfig
from rlx.core.batch import Demonstrations, Scores, Sequences
from rlx.core.logprobs import score
from rlx.core.options import options


def demonstrations(counts):
    prompts = [[3, 4]] * len(counts)
    return Demonstrations(Sequences.from_lists(prompts, [[5 + i % 7 for i in range(c)] for c in counts]))


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_value_and_gradient_equal_a_plain_loop_however_it_is_cut(value_and_gradient, kind):
    algorithm, batch = SFT(SFTConfig(loss_type=kind)), demonstrations([3, 0, 1, 4])
    logps = -torch.rand(8, generator=torch.Generator().manual_seed(0)) * 3
    leaf = logps.clone().requires_grad_()
    want = sum(-lp * (float(lp.exp()) if kind == "dft" else 1) for lp in leaf) / 8
    want.backward()
    more = {"entropy": torch.ones(8), "correct": torch.ones(8, dtype=torch.bool)}
    for parts in (None, [[0], [1, 3], [2]]):
        value, gradient = value_and_gradient(algorithm, batch, logps, parts, **more)
        torch.testing.assert_close(value, want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)


def test_the_loss_and_its_metrics_are_those_of_the_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, initializer_range=0.5, **sizes)).eval()
    batch = demonstrations([3, 1, 4])
    algorithm = SFT(SFTConfig())
    now = score(model, batch.sequences, entropy=True, extras=algorithm.needs)
    loss = algorithm.loss(batch, now)
    terms, hits, entropies = [], [], []
    for ids, scored in zip(*(x.split(batch.sequences.lengths.tolist()) for x in
                             (batch.sequences.ids, batch.sequences.scored)), strict=True):  # fmt: skip
        logits = model(input_ids=ids[None]).logits[0, :-1][scored[1:]]
        terms.append(cross_entropy(logits, ids[scored], reduction="none"))
        hits.append(logits.argmax(-1) == ids[scored])
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(loss.terms["tokens"], torch.cat(terms), rtol=1e-5, atol=1e-5)
    assert loss.metrics["mean_token_accuracy"].tolist() == torch.cat(hits).float().tolist()
    torch.testing.assert_close(loss.metrics["entropy"], torch.cat(entropies).detach(), rtol=1e-5, atol=1e-5)


def test_dft_by_hand():
    # p = ½: −½ log ½; the weight has no gradient, so ∂/∂logp = −½
    logps = torch.tensor([0.5]).log().requires_grad_()
    now = Scores(logps, entropy=torch.zeros(1), correct=torch.ones(1, dtype=torch.bool))
    (term,) = SFT(SFTConfig(loss_type="dft")).loss(demonstrations([1]), now).terms["tokens"]
    term.backward()
    assert float(term.detach()) == pytest.approx(0.34657359)
    assert float(logps.grad) == pytest.approx(-0.5)


def test_defaults():
    assert {name: option.default for name, option in options(SFTConfig).items()} == {"loss_type": "nll"}
    assert SFT.defaults["learning_rate"] == 2e-5
    assert SFT.needs == {"entropy", "correct"} and SFT.eats == "demonstrations"
