"""The plan of a run in words: what is trained on what, sizes, memory, and the rewards tried on two rows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from rlx.core.memory import empty_model, estimate
from rlx.core.models import VALUE, resolve_dtype
from rlx.core.text import safe_text
from rlx.core.update import token_budget

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator

    from rlx.core.assemble import Checked
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
    length = (
        f"the run: {order.total_steps} batches, {order.total_steps * per_batch} optimizer steps, "
        f"{order.total_rows / order.length:.2g} passes over {order.length} rows"
    )
    if algorithm.eats != "prompts":
        return [f"a batch: {settings.batch_size} rows ({algorithm.eats})", length]
    return [
        f"a batch: {settings.batch_size} prompts × {n} = {completions} completions of at most "
        f"{settings.max_completion_length} tokens; {algorithm.epochs} epochs × {algorithm.mini_batches} "
        f"mini-batches of {completions // algorithm.mini_batches} = {per_batch} optimizer steps",
        length,
    ]


def try_rewards(rewards: RewardRunner, prompts: Prompts) -> list[str]:
    """Call the rewards on two rows, with an empty completion and, where the rows have one, with the answer.

    Raises:
        RewardError: what a reward returned cannot be used; better now than after the weights are loaded.
    """
    rows = prompts.take(range(min(TRIED_ROWS, len(prompts))))
    tried: dict[str, dict[str, list[float]]] = {}
    untouched = copy.deepcopy(rewards.state_dict())
    for name, texts in _stand_ins(rows).items():
        # Token ids stand for the text only in their number: one a word, so that per-token rewards can be
        # told apart.
        scored = rewards.score(rows, texts, [list(range(len(text.split()))) for text in texts])
        for reward, values in scored.rewards.items():
            tried.setdefault(reward, {})[name] = values.tolist()
    rewards.load_state_dict(untouched)
    return [_tried(reward, scores) for reward, scores in tried.items()]


def _stand_ins(rows: Prompts) -> dict[str, list[str]]:
    """Completions by what they are called: the empty one, and the answer behind the mark that GSM8K uses."""
    found = {"an empty completion": [""] * len(rows)}
    answers = rows.columns.get("answer", [])
    if answers and all(isinstance(answer, str | int | float) for answer in answers):
        texts = [f"#### {str(answer).rpartition('####')[2].strip()}" for answer in answers]
        found[f"the right answer ({', '.join(safe_text(text, 24) for text in texts)})"] = texts
    return found


def _tried(reward: str, scores: Mapping[str, list[float]]) -> str:
    shown = "; ".join(
        f"{name}: {', '.join('does not apply' if value != value else f'{value:g}' for value in values)}"
        for name, values in scores.items()
    )
    line = f"reward {reward} tried on {len(next(iter(scores.values())))} rows: {shown}"
    if len(scores) > 1 and len({value for values in scores.values() for value in values}) == 1:
        line += f"; all the same, so see what it rewards: rlx reward try {safe_text(reward, 80)} --help"
    return line


def weights(
    policy: Policy,
    reference: Reference | None,
    algorithm: Algorithm,
    settings: Settings,
    accelerator: Accelerator,
) -> list[str]:
    """Parameters, devices and memory, once the weights are loaded."""
    trained = sum(parameter.numel() for parameter in policy.trainable().values())
    everything = sum(parameter.numel() for parameter in policy.model.parameters())
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")
    where = f"{accelerator.device.type}, {accelerator.num_processes} process(es)"
    halves = sum(p.numel() for p in policy.trainable().values() if p.element_size() < 4)
    lossy = (
        f"{halves:,} of the trained parameters are in half precision, where small updates round to nothing; "
        "float32 weights with mixed_precision: bf16 learn at any learning rate"
    )
    return [
        *([lossy] if halves else []),
        f"{everything:,} parameters in {dtype} on {where}; {trained:,} trained, value function included",
        f"reference: {'none' if reference is None else reference.kind}",
        *estimate(
            policy.model,
            settings,
            token_budget=token_budget(settings, accelerator.device),
            generation_rows=generation_rows(algorithm, settings),
            reference="none" if reference is None else reference.kind,
            reference_model=None if reference is None else reference.model,
            value=policy.value,
            trained=[p for name, p in policy.trainable().items() if not name.startswith(VALUE)],
        ).lines(),
    ]


def memory_before_loading(checked: Checked, model: Any) -> list[str]:
    """An estimate of the memory from the model's configuration alone.

    Args:
        checked: what is known of the run.
        model: a model object given from Python, or None.
    """
    settings, algorithm = checked.config.settings, checked.algorithm
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model is None:
        model = empty_model(checked.model_config, settings, resolve_dtype(settings, device))
    kind = "none"
    if algorithm.needs & {"reference", "kl"}:
        kind = "model" if settings.reference_model else "adapter off" if settings.lora_r else "copy"
    report = estimate(
        model,
        settings,
        token_budget=token_budget(settings, device),
        generation_rows=generation_rows(algorithm, settings),
        reference=kind,
        device=device,
    )
    return report.lines()


def generation_rows(algorithm: Algorithm, settings: Settings) -> int:
    """Completions sampled at a time."""
    everything = settings.batch_size * algorithm.completions_per_prompt
    return min(everything, settings.generation_batch_size or everything)


def show(lines: list[str]) -> str:
    """The plan as it is printed."""
    return "\n".join(["plan", *(f"  {line}" for line in lines)])


def summary(metrics: list[dict[str, Any]]) -> str:
    """Reward before and after, where the run evaluated."""
    seen = [line["eval/reward"] for line in metrics if "eval/reward" in line]
    return f"held-out reward {seen[0]:.3f} → {seen[-1]:.3f}" if seen else ""
