"""The other side of benchmarks/compare.py: the same steps with TRL, in TRL's environment."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import workload
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

warnings.simplefilter("ignore")


def classes(algo):
    """Trainer and config of an algorithm."""
    import trl

    if algo == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        return PPOTrainer, PPOConfig
    if algo == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    name = {"sft_packed": "SFT", "reward": "Reward", "sft": "SFT"}.get(algo, algo.upper())
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


class Steps(TrainerCallback):
    """Notes the ends of steps."""

    def __init__(self):
        self.watch = None

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.step()


def settings(job, out):
    """TRL's own defaults, but for what the workload says, and for precision and checkpointing if tuned."""
    algo = job["algo"]
    rows = workload.batch_rows(algo) * workload.GENERATIONS.get(algo, 1)
    given = {
        "output_dir": out,
        "per_device_train_batch_size": min(rows, 8),  # its default
        "gradient_accumulation_steps": max(1, rows // 8),
        "max_steps": job["steps"],
        "seed": job.get("seed", 0),
        "learning_rate": workload.CHECK_RATE if job["check"] else workload.RATE,
        "adam_epsilon": 1e-5 if job["check"] else 1e-8,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    if job["tuned"]:
        given |= {"bf16": job["precision"] == "bfloat16", "gradient_checkpointing": False}
    if algo == "sft_packed":
        given |= {"packing": True, "packing_strategy": "wrapped", "max_length": workload.PACKED}
    if algo in ("grpo", "rloo"):
        given |= {
            "num_generations": workload.GENERATIONS[algo],
            "max_completion_length": workload.LONGEST,
            "temperature": 1.0,
            "shuffle_dataset": False,
        }
    if algo == "ppo":
        del given["max_steps"], given["train_sampling_strategy"]
        given |= {
            "total_episodes": 32 * job["steps"],
            "num_ppo_epochs": 1,
            "response_length": workload.LONGEST,
            "stop_token": "eos",
            "temperature": 1.0,
            "num_sample_generations": 0,
            "local_rollout_forward_batch_size": 8 if job["tuned"] else 64,
        }
    return given | job.get("peer_options", {})


def build(job, out, reward):
    """A trainer, ready to train."""
    algo, folder = job["algo"], Path(job["folder"])
    trainer, config = classes(algo)
    words = AutoTokenizer.from_pretrained(folder / "policy")
    rows = workload.rows_for(algo, json.loads((folder / "rows.json").read_text()))

    def classifier(name):
        return AutoModelForSequenceClassification.from_pretrained(
            folder / name, num_labels=1, dtype=torch.float32
        )

    def policy():
        return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)

    given = {"args": config(**settings(job, out)), "processing_class": words}
    if algo == "ppo":
        words.padding_side = "left"
        rows = [{"input_ids": words(row["prompt"])["input_ids"]} for row in rows]
        given |= {
            "model": policy(),
            "ref_model": policy(),
            "reward_model": classifier("judge"),
            "value_model": classifier("classifier"),
        }
    else:
        given["model"] = classifier("classifier") if algo == "reward" else policy()
    if algo in ("grpo", "rloo"):
        given["reward_funcs"] = [reward]
    return trainer(train_dataset=Dataset.from_list(rows), **given)


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    reward, steps, losses, sampled = workload.Parity(), Steps(), [], []
    with tempfile.TemporaryDirectory() as out:
        trainer = build(job, out, reward)
        trainer.add_callback(steps)
        inner, n = trainer.training_step, workload.GENERATIONS.get(job["algo"], 1)

        def training_step(*given, **more):
            loss = inner(*given, **more)
            losses.append(float(loss))
            return loss

        trainer.training_step = training_step
        if job["check"] and job["algo"] in ("grpo", "rloo"):

            def generate(prompt_ids, *rest):
                ids = [workload.replayed(prompt, place % n) for place, prompt in enumerate(prompt_ids)]
                return (ids, None) if job["algo"] == "grpo" else ids

            trainer._generate_single_turn = generate
        if job["algo"] == "ppo":
            count_ppo(trainer, sampled)
        steps.watch = workload.Watch()
        trainer.train()
        result = steps.watch.result()
    parts = max(1, len(losses) // job["steps"])  # micro-batches of a step
    by_step = [sum(losses[at : at + parts]) for at in range(0, len(losses), parts)]
    result |= {"losses": by_step, "tokens": (sampled or reward.tokens)[1:], "phases": {}}
    Path(sys.argv[2]).write_text(json.dumps(result))


def count_ppo(trainer, sampled):
    """Count the tokens up to the end token of what PPO samples: its trainer calls no reward function."""
    from trl.experimental.ppo import ppo_trainer

    sample = ppo_trainer.batch_generation

    def counting(model, queries, *rest):
        out = sample(model, queries, *rest)
        answers = out[0][:, queries.shape[1] :]
        ended = (answers == workload.END).int()
        before = (ended.cumsum(1) - ended) == 0
        sampled.append(int(before.sum()))
        return out

    ppo_trainer.batch_generation = counting


if __name__ == "__main__":
    main()
