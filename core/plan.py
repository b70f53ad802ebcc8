"""The plan of a run in words: what is trained on what, sizes, memory, and the rewards tried on two rows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from rlx.core.memory import empty_model, estimate, token_budget, too_large
from rlx.core.meter import largest
from rlx.core.models import VALUE, resolve_dtype
from rlx.core.overlap import chunk_size
from rlx.core.recompute import can_recompute, recomputes
from rlx.core.text import redact, safe_text
from rlx.plugins.telling import tells

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
# Why activations are kept, where that is left to us.
SPARED = "a step fits without; switched on if memory runs out with one row"
INCAPABLE = "the model does not support it"


def overview(config: RunConfig) -> list[str]:
    """Algorithm, model, rewards, and every option that is neither a default nor said elsewhere."""
    settings = config.settings
    lines = [
        f"{config.algorithm.name} on {safe_text(settings.model, 80)}, seed {settings.seed}, "
        f"into {settings.output_dir}"
    ]
    if settings.trust_remote_code:
        lines.append("trust_remote_code: Python code that comes with the model will run")
    for component, _ in config.rewards:
        if isinstance(url := component.options.get("url"), str):
            lines.append(
                f"reward {safe_text(component.name, 80)}: prompts, completions and columns go to "
                f"{safe_text(redact(url), 200)}"
            )
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


def try_rewards(rewards: RewardRunner | None, prompts: Prompts) -> list[str]:
    """Call the rewards on two rows, with an empty completion and, where the rows have one, with the answer.

    Raises:
        RewardError: what a reward returned cannot be used; better now than after a batch was sampled.
    """
    if rewards is None:
        return []
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


def overlapped(rewards: RewardRunner, generator: Any, settings: Settings, completions: int) -> list[str]:
    """Which rewards are asked while sampling goes on, where some can be.

    Args:
        rewards: of the run.
        generator: its class, or itself.
        settings: of the run.
        completions: of a batch, on one process.
    """
    asked = rewards.independent if settings.overlap_rewards and tells(generator) else []
    if not asked or chunk_size(asked, completions) >= completions:
        return []
    names = ", ".join(reward.name for reward in asked)
    return [f"asked while completions are still sampled, {chunk_size(asked, completions)} at a time: {names}"]


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


def sizes(policy: Policy, reference: Reference | None) -> dict[str, Any]:
    """What is in memory beside the policy's own weights, as ``estimate`` takes it."""
    return {
        "reference": "none" if reference is None else reference.kind,
        "reference_model": None if reference is None else reference.model,
        "value": policy.value,
        "trained": [p for name, p in policy.trainable().items() if not name.startswith(VALUE)],
    }


def checkpointing(
    policy: Policy, reference: Reference | None, settings: Settings, accelerator: Accelerator
) -> str:
    """Switch gradient checkpointing on where that is left to us and a process needs it; what was chosen."""
    on, asked = recomputes(*policy.trunks), settings.gradient_checkpointing
    if on or asked != "auto":
        return checkpointing_line(on, "as asked for" if asked is on else "as the model was given")
    if not can_recompute(*policy.trunks):
        return checkpointing_line(False, INCAPABLE)
    why = too_large(policy.model, settings, **sizes(policy, reference), device=accelerator.device)
    if not largest(accelerator, int(bool(why))):
        return checkpointing_line(False, SPARED)
    policy.with_gradient_checkpointing()
    return checkpointing_line(True, why or "as another process needs it")


def checkpointing_line(on: bool, why: str) -> str:
    """Whether activations are recomputed, and who says so."""
    return f"gradient checkpointing: {'on' if on else 'off'}, {why}"


def budget(policy: Policy, reference: Reference | None, settings: Settings, accelerator: Accelerator) -> int:
    """Tokens of a micro-batch that fit on every process."""
    mine = token_budget(policy.model, settings, **sizes(policy, reference), device=accelerator.device)
    return int(-largest(accelerator, -mine))


def weights(
    policy: Policy,
    reference: Reference | None,
    algorithm: Algorithm,
    settings: Settings,
    accelerator: Accelerator,
    tokens: int,
) -> list[str]:
    """Parameters, devices and memory, once the weights are loaded; tokens are those of a micro-batch."""
    trained = sum(parameter.numel() for parameter in policy.trainable().values())
    everything = sum(parameter.numel() for parameter in policy.model.parameters())
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")
    where = f"{accelerator.device.type}, {accelerator.num_processes} process(es)"
    halves = sum(p.numel() for p in policy.trainable().values() if p.element_size() < 4)
    lossy = (
        f"{halves:,} of the trained parameters are in half precision, where small updates round to nothing; "
        "float32 weights with mixed_precision: bf16 learn at any learning rate"
    )
    kind = "none" if reference is None else reference.kind
    moves = f", moved every {settings.ref_model_sync_steps} steps" if settings.sync_ref_model else ""
    return [
        *([lossy] if halves else []),
        f"{everything:,} parameters in {dtype} on {where}; {trained:,} trained, value function included",
        f"reference: {kind}{moves}",
        *estimate(
            policy.model,
            settings,
            token_budget=tokens,
            generation_rows=generation_rows(algorithm, settings),
            **sizes(policy, reference),
        ).lines(),
        micro_batch_line(tokens, settings),
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
        dtype, classifier = resolve_dtype(settings, device), "reward" in algorithm.needs
        model = empty_model(checked.model_config, settings, dtype, classifier=classifier)
    kind = "none"
    if algorithm.needs & {"reference", "kl"}:
        adapted = "adapter" if settings.adapter else "adapter off" if settings.lora_r else "copy"
        kind = "model" if settings.reference_model else adapted
    sizes: dict[str, Any] = {"reference": kind, "device": device}
    on, why = settings.gradient_checkpointing is True, "as asked for"
    if settings.gradient_checkpointing == "auto":
        able = can_recompute(model)
        found = too_large(model, settings, **sizes) if able else ""
        on, why = bool(found), found or (SPARED if able else INCAPABLE)
    sizes["checkpointing"] = on
    tokens = token_budget(model, settings, **sizes)
    rows = generation_rows(algorithm, settings)
    report = estimate(model, settings, token_budget=tokens, generation_rows=rows, **sizes)
    return [*report.lines(), micro_batch_line(tokens, settings), checkpointing_line(on, why)]


def micro_batch_line(tokens: int, settings: Settings) -> str:
    """How large a forward and backward is, and who says so."""
    why = "chosen by free memory" if settings.max_tokens_per_micro_batch is None else "as asked for"
    return f"a micro-batch: at most {tokens} tokens, {why}; halved if memory runs out"


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
