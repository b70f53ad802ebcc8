"""Drawing one token: transformers' processors, the inverse distribution, log-probs, stop strings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlx.core.errors import ConfigError
from rlx.core.generation import generate
from rlx.core.sampling import Sampler, inverse_cdf, processors, uniforms
from rlx.plugins.contract import Sampling

OPTIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_processed_scores_equal_those_of_generate(options):
    torch.manual_seed(0)
    history, logits = torch.randint(0, 40, (6, 9)), torch.randn(6, 40) * 3
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )
    config = GenerationConfig(do_sample=True, top_k=0)
    for name, value in options.items():
        setattr(config, name, value)
    theirs = model._get_logits_processor(config, input_ids_seq_length=9)
    ours = processors(Sampling(5, **options))
    assert [type(p) for p in ours] == [type(p) for p in theirs]
    assert torch.equal(ours(history, logits.clone()), theirs(history, logits.clone()))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies_follow_the_processed_distribution(options):
    torch.manual_seed(1)
    logits, history = torch.randn(1, 12) * 2, torch.tensor([[3, 4]])
    expected = processors(Sampling(1, **options))(history, logits.clone()).softmax(-1)[0].double()
    draws = 20_000
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(3))
    tokens, _ = Sampler(Sampling(1, **options))(logits.expand(draws, -1), history.expand(draws, -1), uniform)
    counts = torch.bincount(tokens, minlength=12).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum()
    assert chi2 < 33  # 11 degrees of freedom or fewer: exceeded once in 2000 seeds


def test_logprobs_are_taken_before_truncation_at_the_temperature():
    torch.manual_seed(2)
    logits, history = torch.randn(500, 30) * 3, torch.randint(0, 30, (500, 4))
    sampling = Sampling(1, temperature=0.5, top_k=3, top_p=0.7, min_p=0.1, repetition_penalty=2.0)
    tokens, logps = Sampler(sampling)(logits, history, torch.rand(500))
    naive = (logits / 0.5).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps, naive, atol=2e-6, rtol=1e-6)


@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-6, 0.3, 1.0, 7.0]), min_size=1, max_size=12).filter(any),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_a_token_of_weight_zero_is_never_drawn(weights, uniform):
    cdf = torch.tensor([weights]).cumsum(-1)
    token = int(inverse_cdf(cdf, torch.tensor([uniform])))
    assert weights[token] > 0
    below, above = sum(weights[:token]), sum(weights[: token + 1])
    assert below - 1e-5 <= uniform * sum(weights) <= above + 1e-5


def test_the_largest_uniform_number_draws_the_last_possible_token():
    largest = torch.tensor([1 - 2**-24])
    assert int(inverse_cdf(torch.tensor([[0.5, 1.0, 1.0, 1.0]]), largest)) == 1
    assert int(inverse_cdf(torch.tensor([[0.1, 0.3, 0.30000001, 0.30000001]]).cumsum(-1), largest)) == 3


def test_uniform_numbers_belong_to_the_prompts_seed():
    table = uniforms([5, 6, 5], 2, 4)
    assert table.shape == (6, 4) and table.dtype == torch.float32
    assert torch.equal(table[:2], table[4:]) and not torch.equal(table[:2], table[2:4])
    assert torch.equal(uniforms([6], 2, 4), table[2:4])


# Stop strings


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens, one a byte, and a few that join two letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("E", "N"), ("N", "D"), ("a", "b")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Script(torch.nn.Module):
    """A head that makes a model say given texts: row r of the batch says tokens[r][step]."""

    def __init__(self, model, says: list[list[int]]) -> None:
        super().__init__()
        self.inner, self.says, self.step = model.lm_head, says, 0

    def forward(self, hidden):
        logits = torch.full((*hidden.shape[:-1], self.inner.weight.shape[0]), -5.0)
        for row, ids in enumerate(self.says[: len(logits)]):  # only the last rows may leave the batch
            logits[row, -1, ids[min(self.step, len(ids) - 1)]] = 5.0
        self.step += 1
        return logits


def say(tokenizer, texts: list[list[int]], prompts: list[list[int]], stops: tuple[str, ...], **more):
    config = GPT2Config(
        vocab_size=260, n_embd=8, n_layer=1, n_head=1, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    model.lm_head = Script(model, texts)
    sampling = Sampling(12, greedy=True, stop_strings=stops)
    return generate(model, prompts, 1, sampling, [0] * len(prompts), tokenizer=tokenizer, **more)


CASES = {
    "in one token": ("xx", ["ab"], "ab"),
    "across tokens": ("x ", ["E", "ND"], "END"),
    "across tokens, overlapping": ("x", ["EN", "D"], "END"),
    "inside a longer token": ("x", ["b", "ab"], "ba"),
    "unicode": ("x", list("é"), "é"),
    "at once": ("", ["E", "N", "D"], "END"),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("case", [pytest.param(c, id=f"fault[G9]-{name}") for name, c in CASES.items()])
def test_a_stop_string_ends_the_completion_and_is_kept(case, plain):
    before, pieces, stop = case
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(before) + [i for piece in pieces for i in tokenizer.encode(piece)]
    done = say(tokenizer, [ids + tokenizer.encode("zzzz")], [[1, 2, 3]], (stop, "never"), plain=plain)
    assert done.ids == [ids] and done.finished == [True]
    assert stop in tokenizer.decode(done.ids[0])


@pytest.mark.parametrize(
    "plain", [pytest.param(False, id="fault[G9]"), pytest.param(True, id="fault[G9]-plain")]
)
def test_bytes_that_are_no_text_stay_as_they_are(plain):
    tokenizer = byte_tokenizer()
    first_byte = tokenizer.encode("é")[0]  # half a character
    ids = [first_byte, first_byte, *tokenizer.encode("x"), *tokenizer.encode("END")]
    done = say(tokenizer, [ids + tokenizer.encode("zzz")], [[1]], ("END",), plain=plain)
    assert done.ids == [ids]
    assert "\ufffd" in tokenizer.decode(done.ids[0])


def test_a_stop_string_does_not_begin_in_the_prompt():
    tokenizer = byte_tokenizer()
    done = say(
        tokenizer, [tokenizer.encode("Dxyz")], [tokenizer.encode("E") + tokenizer.encode("N")], ("END",)
    )
    assert len(done.ids[0]) == 12 and done.finished == [False]


def test_rows_stop_each_at_their_own_string():
    tokenizer = byte_tokenizer()
    texts = ["aEND", "bbbb", "cc#dd"]
    ids = [tokenizer.encode(text) for text in texts]
    done = say(tokenizer, ids, [[1], [2], [3]], ("#",))
    assert done.finished == [False, False, True]
    assert done.ids[2] == tokenizer.encode("cc#")


def test_stop_strings_need_a_tokenizer_that_can_spell_them():
    with pytest.raises(ConfigError, match="tokenizer"):
        say(None, [[1]], [[1]], ("END",))
