"""DPO's losses against their formulas, written here pair by pair in float64, and against numbers by hand."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from rlx.algorithms.dpo import DPO, KINDS, OF_DIFFERENCES, SMOOTHED, SORTED, DPOConfig
from rlx.core.batch import Pairs, Scores, Sequences
from rlx.core.errors import ConfigError
from rlx.core.options import build, options

COUNTS = [3, 2, 1, 4, 2, 2, 5, 1]  # tokens: chosen, rejected, chosen, …
PLAIN = [kind for kind in KINDS if kind not in (*SORTED, "sft")]


class Given:
    """A scorer that knows the log-probs already."""

    def __init__(self, logps, total=lambda values: values):
        self.logps, self.total = logps, total

    def __call__(self, sequences, model="policy", needs=()):
        assert model == "policy"
        return Scores(self.logps.detach())


def case(counts=COUNTS, seed=0, scale=2.0):
    """A batch, its policy log-probs and square, drawn at random."""
    g = torch.Generator().manual_seed(seed)
    policy, reference, square = (-scale * torch.rand(sum(counts), generator=g) for _ in range(3))
    sequences = Sequences.from_lists([[1, 1]] * len(counts), [[2] * n for n in counts])
    return Pairs(sequences, reference=reference), policy, square


def dpo(**values):
    if set(values.get("loss_type", ("sigmoid",))) == {"exo_pair"}:
        values = {"label_smoothing": 0.1} | values
    return DPO(DPOConfig(**values))


def loss_of(algorithm, batch, now, whole=None):
    """The loss as the loop takes it: terms of each kind, summed, divided by the count of the whole batch."""
    terms = algorithm.loss(batch, now).terms
    assert set(terms) == set(algorithm.loss_per)
    return sum(t.sum() / algorithm.size(whole or batch, by).clamp(min=1) for by, t in terms.items())


def trained(algorithm, batch, policy, square=None):
    """Loss and gradient of one batch as a whole."""
    logps = policy.clone().requires_grad_()
    loss = loss_of(algorithm, algorithm.prepare(batch, Given(policy)), Scores(logps, square=square))
    loss.backward()
    return float(loss.detach()), logps.grad


def by_hand(formula, batch, policy):
    """Mean over pairs of formula(chosen lp, chosen ref, rejected lp, rejected ref), tokens in float64."""
    counts = batch.sequences.counts.tolist()
    logps = policy.double().requires_grad_()
    sides = list(zip(logps.split(counts), batch.reference.double().split(counts), strict=True))
    terms = [formula(*sides[i], *sides[i + 1]) for i in range(0, len(sides), 2)]
    loss = torch.stack(terms).mean()
    loss.backward()
    return float(loss.detach()), logps.grad.float()


def close(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


def sigma(x):
    return 1 / (1 + (-x).exp())


def formulas(b, e, tau=0.05):
    """The table of losses: (s_c, s_r, r_c, r_r, tokens of chosen, tokens of rejected) → loss of the pair."""

    def discopop(sc, sr, rc, rr, nc, nr):
        x = b * (sc - sr)
        return -sigma(x).log() * (1 - sigma(x / tau)) + (-x).exp() * sigma(x / tau)

    def exo(sc, sr, rc, rr, nc, nr):
        w, n = sigma(b * (sc - sr)), sigma(b * (sr - sc))
        return w * (w.log() - math.log(1 - e)) + n * (n.log() - math.log(e))

    return {
        "sigmoid": lambda sc, sr, rc, rr, nc, nr: -sigma(b * (sc - sr)).log(),
        "hinge": lambda sc, sr, rc, rr, nc, nr: torch.relu(1 - b * (sc - sr)),
        "ipo": lambda sc, sr, rc, rr, nc, nr: (sc / nc - sr / nr - 1 / (2 * b)) ** 2,
        "exo_pair": exo,
        "nca_pair": lambda sc, sr, rc, rr, nc, nr: (
            -sigma(b * rc).log() - 0.5 * sigma(-b * rc).log() - 0.5 * sigma(-b * rr).log()
        ),
        "robust": lambda sc, sr, rc, rr, nc, nr: (
            (-(1 - e) * sigma(b * (sc - sr)).log() + e * sigma(b * (sr - sc)).log()) / (1 - 2 * e)
        ),
        "bco_pair": lambda sc, sr, rc, rr, nc, nr: -sigma(b * rc).log() - sigma(-b * rr).log(),
        "sppo_hard": lambda sc, sr, rc, rr, nc, nr: (rc - 1 / (2 * b)) ** 2 + (rr + 1 / (2 * b)) ** 2,
        "apo_zero": lambda sc, sr, rc, rr, nc, nr: (1 - sigma(b * rc)) + sigma(b * rr),
        "apo_down": lambda sc, sr, rc, rr, nc, nr: sigma(b * rc) + (1 - sigma(b * (rc - rr))),
        "discopop": discopop,
        "sigmoid_norm": lambda sc, sr, rc, rr, nc, nr: -sigma(b * (sc / nc - sr / nr)).log(),
    }


DIVERGENCES = {
    "reverse_kl": lambda r: r,
    "forward_kl": lambda r: 1 - (-r).exp(),
    "js_divergence": lambda r: math.log(2) + sigma(r).log(),
    "alpha_divergence": lambda r: ((0.3 - 1) * r).exp().sub(1) / (0.3 - 1),
}


def expected(kind, batch, policy, *, beta, smoothing, divergence="reverse_kl"):
    formula, f = formulas(beta, smoothing)[kind], DIVERGENCES[divergence]

    def pair(chosen, chosen_reference, rejected, rejected_reference):
        rc, rr = (chosen - chosen_reference).sum(), (rejected - rejected_reference).sum()
        return formula(f(rc), f(rr), rc, rr, len(chosen), len(rejected))

    return by_hand(pair, batch, policy)


@pytest.mark.parametrize("beta", [0.1, 0.9])
@pytest.mark.parametrize("kind", PLAIN)
def test_each_loss_equals_its_formula(kind, beta):
    batch, policy, _ = case()
    smoothing = 0.2 if kind in SMOOTHED else 0.0
    algorithm = dpo(loss_type=(kind,), beta=beta, label_smoothing=smoothing)
    want = expected(kind, batch, policy, beta=beta, smoothing=smoothing)
    close(trained(algorithm, batch, policy), want)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "reverse_kl"])
@pytest.mark.parametrize("kind", sorted(OF_DIFFERENCES - {"sft"}))
def test_each_divergence_equals_its_formula(kind, divergence):
    batch, policy, _ = case(scale=0.5)
    smoothing = 0.2 if kind in SMOOTHED else 0.0
    algorithm = dpo(
        loss_type=(kind,),
        label_smoothing=smoothing,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.3,
    )
    close(
        trained(algorithm, batch, policy),
        expected(kind, batch, policy, beta=0.1, smoothing=smoothing, divergence=divergence),
    )


def test_alpha_1_is_reverse_kl_and_alpha_0_is_forward_kl():
    batch, policy, _ = case()
    for alpha, same in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        got = dpo(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
        close(trained(got, batch, policy), trained(dpo(f_divergence_type=same), batch, policy))


@pytest.mark.parametrize(
    ("kind", "options_", "value"),
    [
        # one pair, two tokens a side; r_c = 2 · 0.5 = 1, r_r = 2 · (−0.5) = −1, Δ = 2; β = 0.5: βΔ = 1
        ("sigmoid", {}, math.log(1 + math.exp(-1))),
        ("hinge", {}, 0.0),
        ("ipo", {}, (0.5 + 0.5 - 1.0) ** 2),  # 1/(2β) = 1
        ("sppo_hard", {}, (1 - 1) ** 2 + (-1 + 1) ** 2),
        ("robust", {"label_smoothing": 0.25}, (0.75 * 0.31326169 - 0.25 * 1.31326169) / 0.5),
        ("apo_zero", {}, (1 - 0.62245933) + 0.37754067),
        ("apo_down", {}, 0.62245933 + 1 - 0.73105858),
        ("bco_pair", {}, 2 * 0.47407698),  # −log σ(0.5), twice
        ("nca_pair", {}, 0.47407698 + 0.5 * 0.97407698 + 0.5 * 0.47407698),
        (
            "exo_pair",
            {"label_smoothing": 0.5},
            0.73105858 * -0.31326169 + 0.26894142 * -1.31326169 + math.log(2),
        ),
        ("sigmoid_norm", {}, 0.47407698),  # β(0.5 + 0.5) = 0.5
        # l = 1, m = σ(20) = 1: e⁻¹
        ("discopop", {}, math.exp(-1)),
        ("aot", {}, 0.31326169),
        ("aot_unpaired", {}, 0.31326169),
        ("aot", {"label_smoothing": 0.25}, 0.75 * 0.31326169 + 0.25 * 1.31326169),
        ("sft", {}, 0.5),  # policy −0.5 a chosen token
    ],
)
def test_numbers_by_hand(kind, options_, value):
    batch, _, _ = case([2, 2])
    batch = replace(batch, reference=torch.tensor([-1.0, -1.0, -1.0, -1.0]))
    policy = torch.tensor([-0.5, -0.5, -1.5, -1.5])
    assert trained(dpo(loss_type=(kind,), beta=0.5, **options_), batch, policy)[0] == pytest.approx(
        value, abs=1e-6
    )


def test_the_gradient_at_the_reference_by_hand():
    # policy = reference: d/dlp of −log σ(βΔ) is −β/2 on each chosen token, +β/2 on each rejected one; 2 pairs
    batch, _, _ = case([2, 1, 1, 3])
    loss, gradient = trained(dpo(beta=0.4), batch, batch.reference)
    assert loss == pytest.approx(math.log(2))
    torch.testing.assert_close(gradient, torch.tensor([-0.1, -0.1, 0.1, -0.1, 0.1, 0.1, 0.1]))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_completions_are_finite_and_pull_to_neither_side(kind):
    batch, policy, _ = case([3, 3])
    policy, batch = policy[:3].repeat(2), replace(batch, reference=batch.reference[:3].repeat(2))
    loss, gradient = trained(dpo(loss_type=(kind,)), batch, policy)
    assert math.isfinite(loss) and bool(gradient.isfinite().all())
    if kind in OF_DIFFERENCES - {"sft"}:
        torch.testing.assert_close(gradient[:3], -gradient[3:])


@pytest.mark.parametrize("far", [-400.0, 400.0])
@pytest.mark.parametrize("kind", KINDS)
def test_far_from_the_reference_nothing_becomes_nan(kind, far):
    batch, _, _ = case([1, 1, 1, 1])
    batch = replace(batch, reference=torch.tensor([-500.0, -500.0, -500.0, -900.0]))
    policy = torch.tensor([-500 + far, -500 - far, -500.0, -900 + far])
    for divergence in DIVERGENCES if kind in OF_DIFFERENCES else ("reverse_kl",):
        loss, gradient = trained(dpo(loss_type=(kind,), f_divergence_type=divergence), batch, policy)
        assert not math.isnan(loss) and not bool(gradient.isnan().any())


def ld_dpo(alpha, beta=0.1):
    """LD-DPO's rule written as a loop over tokens."""

    def pair(chosen, chosen_reference, rejected, rejected_reference):
        shared = min(len(chosen), len(rejected))
        total = 0.0
        for sign, policy, base in ((1, chosen, chosen_reference), (-1, rejected, rejected_reference)):
            for t, gap in enumerate(policy - base):
                total = total + sign * gap * (1.0 if t < shared else alpha)
        return -sigma(beta * total).log()

    return pair


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_alpha_weighs_what_the_longer_side_has_more(alpha):
    batch, policy, _ = case()
    got = trained(dpo(ld_alpha=alpha), batch, policy)
    close(got, by_hand(ld_dpo(alpha), batch, policy))
    if alpha == 1:
        close(got, trained(dpo(), batch, policy))


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "bco_pair"])
def test_use_weighting_multiplies_by_how_likely_the_policy_is_to_write_the_pair(kind):
    batch, policy, square = case()
    aligned = (policy - square).double().split(COUNTS)
    weights = [
        math.exp(aligned[i].mean()) * math.exp(aligned[i + 1].mean()) for i in range(0, len(COUNTS), 2)
    ]
    formula, left = formulas(0.1, 0.0)[kind], iter(weights)

    def pair(chosen, chosen_reference, rejected, rejected_reference):
        rc, rr = (chosen - chosen_reference).sum(), (rejected - rejected_reference).sum()
        return next(left) * formula(rc, rr, rc, rr, len(chosen), len(rejected))

    algorithm = dpo(loss_type=(kind,), use_weighting=True)
    assert algorithm.needs == {"reference", "square"}
    close(trained(algorithm, batch, policy, square), by_hand(pair, batch, policy))
    got = algorithm.loss(batch, Scores(policy, square=square)).metrics["policy/weight"]
    torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float32))


def test_sft_is_the_mean_over_the_chosen_tokens_of_the_batch():
    batch, policy, _ = case([3, 2, 1, 4])
    loss, gradient = trained(dpo(loss_type=("sft",)), batch, policy)
    assert loss == pytest.approx(-float(policy[[0, 1, 2, 5]].mean()))
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -1, -1, 0, 0, -1, 0, 0, 0, 0]) / 4)


def test_several_losses_are_added_by_weight():
    batch, policy, _ = case()
    kinds, weights = ("sigmoid", "bco_pair", "sft", "aot"), (0.8, 0.2, 1.5, -0.5)
    parts = [trained(dpo(loss_type=(kind,)), batch, policy) for kind in kinds]
    want = [sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in (0, 1)]
    got = dpo(loss_type=kinds, loss_weights=weights)
    close(trained(got, batch, policy), want)
    metrics = got.loss(got.prepare(batch, Given(policy)), Scores(policy)).metrics
    assert {"loss/sigmoid", "loss/bco_pair", "loss/aot", "loss/nll"} <= set(metrics)
    plain = dpo(loss_type=("sigmoid", "sigmoid"))
    close(trained(plain, batch, policy), [2 * x for x in parts[0]])


def aot(kind, batch, policy, beta, smoothing):
    """The definition: sort over the whole batch, autograd through the sort."""
    logps, counts = policy.double().requires_grad_(), batch.sequences.counts.tolist()
    lp, ref = (
        torch.stack([part.sum() for part in x.split(counts)]) for x in (logps, batch.reference.double())
    )
    if kind == "aot":
        delta = (lp[0::2] - lp[1::2]).sort().values - (ref[0::2] - ref[1::2]).sort().values
    else:
        delta = (lp - ref)[0::2].sort().values - (lp - ref)[1::2].sort().values
    terms = -(1 - smoothing) * sigma(beta * delta).log() - smoothing * sigma(-beta * delta).log()
    terms.mean().backward()
    return float(terms.mean().detach()), logps.grad.float()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 99), st.sampled_from(SORTED))
@settings(max_examples=25)
def test_sorted_losses_sort_the_whole_batch_whatever_the_micro_batches(lengths, seed, kind):
    batch, policy, _ = case([*lengths, *reversed(lengths)], seed)
    want = aot(kind, batch, policy, beta=0.3, smoothing=0.1)
    algorithm = dpo(loss_type=(kind,), beta=0.3, label_smoothing=0.1)
    close(trained(algorithm, batch, policy), want)
    close(in_micro_batches(algorithm, batch, policy, [1] * len(batch)), want)


def in_micro_batches(algorithm, batch, policy, sizes, square=None, total=lambda values: values, whole=None):
    """Loss and gradient, rows taken in reverse order in micro-batches of these sizes."""
    logps = policy.clone().requires_grad_()
    batch = algorithm.prepare(batch, Given(policy, total))
    whole, owners, loss = (
        whole or batch,
        torch.repeat_interleave(batch.sequences.counts) // 2,
        torch.zeros(()),
    )
    for rows in torch.arange(len(batch)).flip(0).split(sizes):
        tokens = torch.cat([(owners == row).nonzero()[:, 0] for row in rows])
        now = Scores(logps[tokens], square=None if square is None else square[tokens])
        part = loss_of(algorithm, batch.take(rows), now, whole)
        part.backward()
        loss = loss + part.detach()
    return float(loss), logps.grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_does_not_depend_on_micro_batches(kind, weighted):
    if weighted and kind in SORTED:
        return
    batch, policy, square = case()
    smoothing = 0.01 if kind in SMOOTHED else 0.0
    algorithm = dpo(loss_type=(kind, "sft"), ld_alpha=0.5, use_weighting=weighted, label_smoothing=smoothing)
    want = trained(algorithm, batch, policy, square)
    close(in_micro_batches(algorithm, batch, policy, [1, 3], square), want)
    close(in_micro_batches(algorithm, batch, policy, [2, 2], square), want)


class Together:
    """Two processes as two threads: sums over both, and a rank each."""

    def __init__(self):
        self.barrier, self.rank, self.shared = (
            threading.Barrier(2, timeout=20),
            threading.local(),
            [None, None],
        )

    def total(self, values):
        self.shared[self.rank.value] = values
        self.barrier.wait()
        result = self.shared[0] + self.shared[1]
        self.barrier.wait()
        return result

    def run(self, work):
        results = [None, None]

        def one(rank):
            self.rank.value = rank
            results[rank] = work(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("kind", SORTED)
def test_sorted_losses_sort_over_all_processes(kind, monkeypatch):
    together = Together()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: together.rank.value)
    batch, policy, _ = case()
    want = aot(kind, batch, policy, beta=0.1, smoothing=0.0)
    owners = torch.repeat_interleave(batch.sequences.counts) // 2
    shares = [torch.tensor([0]), torch.tensor([1, 2, 3])]

    def work(rank):
        algorithm, rows = dpo(loss_type=(kind,)), shares[rank]
        mine = policy[torch.isin(owners, rows)]
        return in_micro_batches(algorithm, batch.take(rows), mine, 1, total=together.total, whole=batch)

    (first, gradient), (second, more) = together.run(work)
    close((first + second, torch.cat([gradient, more])), want)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_completions_stay_finite(kind):
    batch, policy, square = case([0, 2, 1, 0, 0, 0])
    for weighted in (False, kind not in SORTED):
        algorithm = dpo(loss_type=(kind,), use_weighting=weighted, ld_alpha=0.5)
        loss, gradient = trained(algorithm, batch, policy, square)
        assert math.isfinite(loss) and bool(gradient.isfinite().all())


def test_an_empty_pair_has_the_loss_of_no_preference():
    batch, policy, _ = case([0, 0])
    assert trained(dpo(), batch, policy)[0] == pytest.approx(math.log(2))


def test_reference_free_is_a_reference_of_zeros():
    batch, policy, _ = case()
    algorithm = dpo(reference_free=True)
    assert algorithm.needs == frozenset() and dpo().needs == {"reference"}
    zeros = replace(batch, reference=torch.zeros_like(policy))
    close(
        trained(algorithm, replace(batch, reference=None), policy),
        trained(dpo(), zeros, policy),
    )
    sorts = {"loss_type": ("aot",)}
    close(
        trained(dpo(reference_free=True, **sorts), replace(batch, reference=None), policy),
        trained(dpo(**sorts), zeros, policy),
    )


def test_metrics_by_hand():
    # r: chosen 1, −1; rejected −1, 1; β 0.5
    batch, _, _ = case([2, 1, 1, 1])
    batch = replace(batch, reference=torch.tensor([-1.0, -1, -1, -1, -2]))
    logps = torch.tensor([-0.5, -0.5, -2, -2, -1], requires_grad=True)
    metrics = dpo(beta=0.5).loss(batch, Scores(logps)).metrics
    assert {name: values.tolist() for name, values in metrics.items()} == {
        "rewards/chosen": [0.5, -0.5],
        "rewards/rejected": [-0.5, 0.5],
        "rewards/margins": [1.0, -1.0],
        "rewards/accuracies": [1.0, 0.0],
        "logps/chosen": [-1.0, -2.0],
        "logps/rejected": [-2.0, -1.0],
    }
    assert not any(values.requires_grad for values in metrics.values())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"loss_type": ("exo_pair",)}, ("exo_pair", "label_smoothing")),
        ({"loss_type": ("robust",), "label_smoothing": 0.5}, ("robust", "label_smoothing")),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, ("loss_weights", "loss_type")),
        ({"loss_type": ("aot",), "use_weighting": True}, ("use_weighting", "aot")),
        (
            {"loss_type": ("sigmoid", "bco_pair"), "f_divergence_type": "forward_kl"},
            ("bco_pair", "f_divergence_type"),
        ),
        ({"loss_type": ()}, ("loss_type",)),
    ],
)
def test_conflicting_options_are_refused_by_name(wrong, named):
    with pytest.raises(ConfigError) as caught:
        DPOConfig(**wrong)
    assert caught.value.exit_code == 2 and all(name in str(caught.value) for name in named)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - OF_DIFFERENCES))
def test_losses_of_one_side_refuse_other_divergences(kind):
    with pytest.raises(ConfigError, match=kind):
        DPOConfig(loss_type=(kind,), f_divergence_type="js_divergence")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0),
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.0),
        ("ld_alpha", 1.5),
        ("discopop_tau", 0),
        ("f_divergence_type", "js"),
        ("loss_type", "sigmod"),
    ],
)
def test_values_out_of_bounds_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        build(DPOConfig, {name: value}, owner="algorithm dpo")


def test_smoothing_without_effect_is_told():
    with pytest.warns(UserWarning, match="label_smoothing has no effect on loss_type sigmoid"):
        DPOConfig(label_smoothing=0.1)
    assert DPOConfig(loss_type=("robust",), label_smoothing=0.49).label_smoothing == 0.49


@pytest.mark.parametrize("given_", ["sigmoid,sft", ["sigmoid", "sft"]])
def test_one_loss_or_a_list_of_losses(given_):
    config = build(DPOConfig, {"loss_type": given_, "loss_weights": "1,0.5"}, owner="algorithm dpo")
    assert (config.loss_type, config.loss_weights) == (("sigmoid", "sft"), (1.0, 0.5))
    assert build(DPOConfig, {"loss_type": "ipo"}, owner="algorithm dpo").loss_type == ("ipo",)
    assert DPOConfig(loss_type="ipo").loss_type == ("ipo",)
    assert DPO(config).loss_per == ("rows", "chosen_tokens") and dpo(loss_type=("sft",)).loss_per == (
        "chosen_tokens",
    )


def test_defaults_are_those_of_the_field():
    assert {name: option.default for name, option in options(DPOConfig).items()} == {
        "beta": 0.1, "loss_type": ("sigmoid",), "loss_weights": None, "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "ld_alpha": None,
        "use_weighting": False, "discopop_tau": 0.05, "reference_free": False,
    }  # fmt: skip
    assert DPO.defaults["learning_rate"] == 1e-6
