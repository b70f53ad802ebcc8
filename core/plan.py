"""The plan of a run in words: what is trained on what, sizes, memory, and the rewards tried on two rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlx.core.text import safe_text

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.batch import Prompts
    from rlx.core.config import RunConfig
    from rlx.core.models import Policy
    from rlx.core.order import Order
    from rlx.core.reference import Reference
    from rlx.core.scoring import RewardRunner
    from rlx.core.settings import Settings
    from rlx.plugins.contract import Algorithm

TRIED_ROWS = 2


def overview(config: RunConfig) -> list[str]:
    """Algorithm, model, rewards, and every option that is neither a default nor said elsewhere."""
    settings = config.settings
    lines = [
        f"{config.algorithm.name} on {safe_text(settings.model, 80)}, seed {settings.seed}, "
        f"into {settings.output_dir}"
    ]
    if settings.trust_remote_code:
        lines.append("trust_remote_code: Python code that comes with the model will run")
    values = config.to_mapping()
    for source in sorted({s for s in config.sources.values() if s.startswith(("algorithm ", "recipe "))}):
        named = [f"{name} {values[name]}" for name, s in config.sources.items() if s == source]
        lines.append(f"set by {source}: {', '.join(named)}")
    return lines


def geometry(algorithm: Algorithm, settings: Settings, order: Order) -> list[str]:
    """How many rows, completions, mini-batches and optimizer steps there are."""
    n = algorithm.completions_per_prompt
    per_batch = algorithm.epochs * algorithm.mini_batches
    completions = settings.batch_size * n
    return [
        f"a batch: {settings.batch_size} prompts × {n} = {completions} completions of at most "
        f"{settings.max_completion_length} tokens; {algorithm.epochs} epochs × {algorithm.mini_batches} "
        f"mini-batches of {completions // algorithm.mini_batches} = {per_batch} optimizer steps",
        f"the run: {order.total_steps} batches, {order.total_steps * per_batch} optimizer steps, "
        f"{order.total_rows / order.length:.2f} passes over {order.length} rows",
    ]


def try_rewards(rewards: RewardRunner, prompts: Prompts) -> list[str]:
    """Call the rewards on two rows, with an empty completion and, where the rows have one, with the answer.

    Raises:
        RewardError: what a reward returned cannot be used; better now than after the weights are loaded.
    """
    rows = prompts.take(range(min(TRIED_ROWS, len(prompts))))
    lines = []
    for name, texts in _stand_ins(rows).items():
        # Token ids stand for the text only in their number: one a word, so that per-token rewards can be
        # told apart.
        scored = rewards.score(rows, texts, [list(range(len(text.split()))) for text in texts])
        values = [" ".join(f"{reward} {value:g}" for reward, value in zip(scored.rewards, row, strict=True))
                  for row in zip(*(v.tolist() for v in scored.rewards.values()), strict=True)]  # fmt: skip
        lines.append(f"reward tried on {name}: {'; '.join(values)}")
    return lines


def _stand_ins(rows: Prompts) -> dict[str, list[str]]:
    found = {"an empty completion": [""] * len(rows)}
    answers = rows.columns.get("answer")
    if answers is not None and all(isinstance(answer, str) for answer in answers):
        found["the text of the column answer"] = list(answers)
    return found


def weights(
    policy: Policy, reference: Reference | None, settings: Settings, accelerator: Accelerator
) -> list[str]:
    """Parameters, devices and memory, once the weights are loaded."""
    trained = sum(parameter.numel() for parameter in policy.trainable().values())
    everything = sum(parameter.numel() for parameter in policy.model.parameters())
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")
    where = f"{accelerator.device.type}, {accelerator.num_processes} process(es)"
    lines = [
        f"{everything:,} parameters in {dtype} on {where}; {trained:,} of them and of the value function are trained",
        f"reference: {'none' if reference is None else reference.kind}",
    ]
    return lines


def memory_before_loading(config: RunConfig) -> list[str]:
    """An estimate from the model's configuration alone."""
    return []


def show(lines: list[str]) -> str:
    """The plan as it is printed."""
    return "\n".join(["plan", *(f"  {line}" for line in lines)])


def summary(metrics: list[dict[str, Any]]) -> str:
    """Reward before and after, where the run evaluated."""
    seen = [line["eval/reward"] for line in metrics if "eval/reward" in line]
    return f"held-out reward {seen[0]:.3f} → {seen[-1]:.3f}" if seen else ""
