"""Learning from given data: the same tokens, losses and final weights as TRL."""

from __future__ import annotations

import pytest

LONGEST = 30  # tokens, for the variants that cut

DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
    "sigmoid, forward_kl": {"f_divergence_type": "forward_kl"},
    "sigmoid, js_divergence": {"f_divergence_type": "js_divergence"},
    "sigmoid, alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "sigmoid, ld_alpha": {"ld_alpha": 0.5},
    "sigmoid, use_weighting": {"use_weighting": True},
    "sigmoid, precompute_ref_log_probs": {"precompute_ref_log_probs": True},
    "sigmoid, max_length": {"max_length": LONGEST},
    "sigmoid, keep_end": {"max_length": LONGEST, "truncation_mode": "keep_end"},
    "sigmoid + bco_pair + sft": {"loss_weights": [0.8, 0.2, 1.0]},
}


def spoken(row):
    """A row of texts as one of messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
    return {
        name: [{"role": roles[name], "content": value}] if name in roles else value
        for name, value in row.items()
    }


def assert_same_pairs(data, found):
    assert data.prompts == found["prompt_ids"][:]
    assert data.chosen == found["chosen_ids"][:]
    assert data.rejected == found["rejected_ids"][:]


@pytest.mark.parametrize("variant", DPO)
def test_dpo(variant, ours, theirs, same, pairs):
    from trl import DPOConfig, DPOTrainer

    kinds, options = variant.split(",")[0].split(" + "), DPO[variant]
    if (
        "keep_end" in variant
    ):  # TRL cuts the prompt of each side by itself; with equal lengths it is cut alike
        pairs = [row | {"rejected": " " + row["chosen"][:0:-1]} for row in pairs]
    trainer = theirs(DPOTrainer, DPOConfig, pairs, loss_type=kinds, **options)
    run = ours("dpo", pairs, loss_type=kinds, **options)
    if "max_length" not in options and "precompute" not in variant:  # TRL cuts when it collates
        assert_same_pairs(run[2].data, trainer.train_dataset)
    same(variant, run, trainer)


def test_dpo_on_messages(ours, theirs, same, pairs):
    from trl import DPOConfig, DPOTrainer

    rows = [spoken(row) for row in pairs]
    trainer = theirs(DPOTrainer, DPOConfig, rows)
    run = ours("dpo", rows, chat_template=...)
    assert_same_pairs(run[2].data, trainer.train_dataset)
    same("sigmoid, messages", run, trainer)


@pytest.mark.parametrize(
    "variant, options",
    [
        ("kto", {}),
        ("kto, weights", {"desirable_weight": 1.2, "undesirable_weight": 0.7}),
        ("apo_zero_unpaired", {}),
    ],
)
def test_kto(variant, options, ours, theirs, same, pairs):
    """TRL gives a prompt the completion of the row before it, ours of the next: batches are turned round."""
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 3 else "chosen"], "label": i % 3 == 0}
        for i, row in enumerate(pairs)
    ]
    turned = [row for start in range(0, len(rows), 4) for row in reversed(rows[start : start + 4])]
    kind = variant.split(",")[0]
    trainer = theirs(KTOTrainer, KTOConfig, rows, loss_type=kind, **options)
    run = ours("kto", turned, loss_type=kind, **options)
    data, found = run[2].data, trainer.train_dataset
    places = [place for start in range(0, len(rows), 4) for place in reversed(range(start, start + 4))]
    assert data.prompts == [found["prompt_ids"][place] for place in places]
    assert data.completions == [found["completion_ids"][place] for place in places]
    same(variant, run, trainer)


def assert_same_joined(data, found):
    for side, answers in (("chosen", data.chosen), ("rejected", data.rejected)):
        assert [p + a for p, a in zip(data.prompts, answers, strict=True)] == found[f"{side}_input_ids"][:]
        labels = [[-100] * len(p) + a for p, a in zip(data.prompts, answers, strict=True)]
        assert labels == found[f"{side}_labels"][:]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta, ours, theirs, same, pairs):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = theirs(ORPOTrainer, ORPOConfig, pairs, beta=beta)
    run = ours("orpo", pairs, beta=beta)
    assert_same_joined(run[2].data, trainer.train_dataset)
    same(f"beta {beta:g}", run, trainer)


@pytest.mark.parametrize(
    "variant, options",
    [
        ("sigmoid", {}),
        ("sigmoid, label_smoothing", {"label_smoothing": 0.1}),
        ("hinge", {}),
        ("ipo", {}),
        ("simpo", {"cpo_alpha": 0.0, "beta": 2.0}),
        ("simpo, cpo_alpha", {"cpo_alpha": 0.5, "beta": 2.0}),
        ("simpo, alpha", {"cpo_alpha": 0.0, "alpha": 0.1}),
    ],
)
def test_cpo(variant, options, ours, theirs, same, pairs):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    kind = variant.split(",")[0]
    trainer = theirs(CPOTrainer, CPOConfig, pairs, loss_type=kind, **options)
    run = ours("cpo", pairs, loss_type=kind, **options)
    assert_same_joined(run[2].data, trainer.train_dataset)
    same(variant, run, trainer)


@pytest.mark.parametrize(
    "variant, options",
    [
        ("prompt and completion", {}),
        ("prompt and completion, dft", {"loss_type": "dft"}),
        ("prompt and completion, completion_only_loss false", {"completion_only_loss": False}),
        ("prompt and completion, max_length", {"max_length": LONGEST}),
        ("text", {}),
        ("text, dft", {"loss_type": "dft"}),
        ("messages", {}),
        ("messages, assistant_only_loss", {"assistant_only_loss": True}),
    ],
)
def test_sft(variant, options, ours, theirs, same, pairs):
    from trl import SFTConfig, SFTTrainer

    kind = variant.split(",")[0]
    rows = {
        "text": [{"text": row["prompt"] + row["chosen"]} for row in pairs],
        "messages": [
            {"messages": [part for name in ("prompt", "chosen") for part in spoken(row)[name]]}
            for row in pairs
        ],
        "prompt and completion": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
    }[kind]
    trainer = theirs(SFTTrainer, SFTConfig, rows, **options)
    run = ours("sft", rows, chat_template=... if kind == "messages" else "none", **options)
    documents = [document for row in run[2].data.documents for document in row]
    longest = options.get("max_length", 1024)
    assert [one.ids for one in documents] == [ids[:longest] for ids in trainer.train_dataset["input_ids"]]
    same(variant, run, trainer)


@pytest.mark.parametrize(
    "variant, options",
    [
        ("text", {}),
        ("text, centred", {"center_rewards_coefficient": 0.01}),
        ("text, margin", {}),
        ("messages", {}),
    ],
)
def test_reward_model(variant, options, ours, theirs, same, pairs):
    from trl import RewardConfig, RewardTrainer

    rows = [spoken(row) for row in pairs] if variant == "messages" else pairs
    if "margin" in variant:
        rows = [row | {"margin": 0.1 * i} for i, row in enumerate(rows)]
    trainer = theirs(RewardTrainer, RewardConfig, rows, **options)
    run = ours("reward", rows, chat_template=... if variant == "messages" else "none", **options)
    data, found = run[2].data, trainer.train_dataset
    assert [p + a for p, a in zip(data.prompts, data.chosen, strict=True)] == found["chosen_ids"][:]
    assert [p + a for p, a in zip(data.prompts, data.rejected, strict=True)] == found["rejected_ids"][:]
    same(variant, run, trainer)
