"""Learning from samples: the same completions on both sides, the same losses and final weights as TRL."""

from __future__ import annotations

import random

import pytest

from rlx.plugins.contract import Completions

LONGEST, PROMPTS = 8, 2
END, PAD = 256, 257  # of the tokenizer


def completion(prompt, place):
    """The completion of a prompt with this place in its group: any bytes, and an end in most."""
    draw = random.Random(f"{prompt} {place}")
    length = draw.randint(1, LONGEST)
    ids = [draw.randrange(64, 96) for _ in range(length)]
    return ids if length == LONGEST else [*ids, END]


class Replay:
    """A generator that has its completions from elsewhere."""

    def __init__(self):
        self.prompts = []

    def generate(self, prompts, n, sampling, seeds):
        self.prompts += [prompt for prompt in prompts for _ in range(n)]
        ids = [completion(prompt, place) for prompt in prompts for place in range(n)]
        return Completions(ids, None, [one[-1] == END for one in ids])

    def sync(self, policy):
        """Nothing to take over."""

    def close(self):
        """Nothing to give back."""


def parity(completion_ids, **columns):
    """A reward of any size and sign."""
    return [
        (sum(ids) - PAD * ids.count(PAD)) % 11 / 5 - 1 for ids in completion_ids
    ]  # OnlineDPO's are padded


def brevity(completion_ids, **columns):
    """A reward that does not apply to completions of one token and an end."""
    return [None if len(ids) == 2 else 1 / (1 + len(ids)) for ids in completion_ids]


@pytest.fixture
def agree(ours, theirs, same, pairs):
    """Runs both sides and compares them."""

    def check(algo, trainer, config, variant, options, rewards=(parity,), n=4):
        rows, looks = [{"prompt": row["prompt"]} for row in pairs], options.get("num_iterations", 1)
        weights = [1.0, 0.5][: len(rewards)]
        mine = {name: value for name, value in options.items() if name != "reward_weights"}
        replay, seen = Replay(), []
        run = ours(
            algo,
            rows,
            generator=replay,
            reward=list(rewards),
            reward_weight=weights,
            batch_size=PROMPTS,
            num_generations=n,
            max_completion_length=LONGEST,
            log_completions=0,
            **mine,
        )

        def generate(prompt_ids, *rest):
            seen.extend(prompt_ids)
            ids = [completion(prompt, place % n) for place, prompt in enumerate(prompt_ids)]
            return (ids, None) if algo == "grpo" else ids

        peer = theirs(
            trainer,
            config,
            rows,
            {"reward_funcs": list(rewards)},
            reward_weights=weights,
            per_device_train_batch_size=PROMPTS * n,
            max_steps=3 * looks,
            num_generations=n,
            max_completion_length=LONGEST,
            shuffle_dataset=False,
            **options,
        )
        peer._generate_single_turn = generate
        # Losses are means of terms of both signs and of size 1, some exactly 0.
        same(variant, run, peer, scale=1.0)
        assert replay.prompts == seen

    return check


@pytest.mark.parametrize(
    "variant, options",
    [
        ("beta 0.05", {"beta": 0.05}),
        ("beta 0", {"beta": 0.0}),
        ("2 iterations", {"num_iterations": 2, "beta": 0.05}),
        ("epsilon_high, 3 iterations", {"num_iterations": 3, "epsilon": 0.1, "epsilon_high": 0.3}),
        ("normalize_advantages", {"normalize_advantages": True}),
        ("reward_clip_range", {"reward_clip_range": (-0.5, 0.5)}),
        ("temperature 0.7", {"temperature": 0.7, "num_iterations": 2}),
    ],
)
def test_rloo(variant, options, agree):
    from trl import RLOOConfig, RLOOTrainer

    agree("rloo", RLOOTrainer, RLOOConfig, variant, options)


def test_rloo_with_two_rewards(agree):
    from trl import RLOOConfig, RLOOTrainer

    agree("rloo", RLOOTrainer, RLOOConfig, "two rewards, one not always applicable", {}, (parity, brevity))


AGAIN = {"num_iterations": 2, "epsilon": 0.1}


@pytest.mark.parametrize(
    "variant, options",
    [
        ("dapo", {}),
        ("dapo, beta", {"beta": 0.1, **AGAIN}),
        ("dapo, beta, no bias correction", {"beta": 0.1, "use_bias_correction_kl": False, **AGAIN}),
        ("grpo", {"loss_type": "grpo", **AGAIN}),
        ("bnpo", {"loss_type": "bnpo", **AGAIN}),
        ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none", **AGAIN}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0, **AGAIN}),
        ("sequence (GSPO)", {"importance_sampling_level": "sequence", "loss_type": "grpo", **AGAIN}),
        ("sequence, beta", {"importance_sampling_level": "sequence", "beta": 0.1, **AGAIN}),
        ("delta", {"delta": 1.5, **AGAIN}),
        ("epsilon_high", {"epsilon_high": 0.28, **AGAIN}),
        ("scale_rewards batch", {"scale_rewards": "batch", **AGAIN}),
        ("mask_truncated_completions", {"mask_truncated_completions": True, **AGAIN}),
        ("top_entropy_quantile", {"top_entropy_quantile": 0.5}),  # of several looks, TRL measures each anew
        ("entropy_coef", {"entropy_coef": 0.01, **AGAIN}),
        ("off_policy_mask_threshold", {"off_policy_mask_threshold": 0.01, **AGAIN}),
        ("temperature 0.7", {"temperature": 0.7, "beta": 0.1, **AGAIN}),
    ],
)
def test_grpo(variant, options, agree):
    from trl import GRPOConfig, GRPOTrainer

    agree("grpo", GRPOTrainer, GRPOConfig, variant, options)


@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_grpo_with_two_rewards(how, agree):
    from trl import GRPOConfig, GRPOTrainer

    agree(
        "grpo",
        GRPOTrainer,
        GRPOConfig,
        f"two rewards, {how}",
        {"multi_objective_aggregation": how, **AGAIN},
        (parity, brevity),
    )


@pytest.mark.parametrize(
    ("variant", "options"),
    [("sigmoid", {}), ("ipo", {"loss_type": "ipo"}), ("missing_eos_penalty", {"missing_eos_penalty": 1.5})],
)
def test_online_dpo(variant, options, ours, theirs, same, pairs):
    import torch
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    rows, replay, seen = [{"prompt": row["prompt"]} for row in pairs], Replay(), []
    run = ours(
        "online_dpo",
        rows,
        generator=replay,
        reward=[parity],
        max_completion_length=LONGEST,
        log_completions=0,
        temperature=1.0,  # TRL's log-probs are not tempered
        **options,
    )
    trainer = theirs(
        OnlineDPOTrainer,
        OnlineDPOConfig,
        rows,
        {"reward_funcs": [parity]},
        max_new_tokens=LONGEST,
        **options,
    )

    def padded(lists, side):
        longest = max(map(len, lists))
        gaps = [[PAD] * (longest - len(ids)) for ids in lists]
        both = zip(lists, gaps, strict=True)
        ids = torch.tensor([gap + one if side == "left" else one + gap for one, gap in both])
        return ids, (ids != PAD).long()

    def generate(model, prompts, images=None):
        ids = trainer.processing_class(prompts)["input_ids"]
        seen.extend(ids)
        answers = [completion(prompt, place) for place in range(2) for prompt in ids]  # the halves one by one
        return (*padded(2 * ids, "left"), *padded(answers, "right"), None)

    trainer._generate = generate
    same(variant, run, trainer)
    assert replay.prompts[::2] == seen
