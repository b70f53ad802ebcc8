"""Puts the parts of a run together: everything that can be wrong without weights first, then the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlx.core import manifest, plan
from rlx.core.data import PromptData, check_data
from rlx.core.errors import ConfigError
from rlx.core.folder import RunFolder
from rlx.core.models import load_tokenizer, ready_tokenizer
from rlx.core.order import Order
from rlx.core.pretrained import Source, load_config
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.plugins.events import Events, global_hooks
from rlx.plugins.references import make

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.config import RunConfig
    from rlx.core.loop import Run
    from rlx.core.settings import Settings
    from rlx.plugins.contract import Algorithm

DEFAULT_CALLBACKS = ("rich_progress", "log_completions", "plots", "health", "model_card", "trackers")


@dataclass(frozen=True)
class Checked:
    """What is known of a run before its weights are loaded.

    Attributes:
        config: the resolved configuration.
        algorithm: built.
        rewards: the runner, or None.
        tokenizer: with a pad token.
        data: training prompts.
        eval_data: held-out prompts, or None.
        order: rows of each batch.
        model_config: the model's own configuration.
        plan: what will be done, a line each.
    """

    config: RunConfig
    algorithm: Algorithm
    rewards: RewardRunner | None
    tokenizer: Any
    data: PromptData
    eval_data: PromptData | None
    order: Order
    model_config: Any
    plan: list[str]


def check(config: RunConfig, objects: Mapping[str, Any]) -> Checked:
    """Everything that can be known without weights.

    Args:
        config: the resolved configuration.
        objects: a model or tokenizer given from Python in the place of a name.

    Raises:
        RlxError: plugins' veto, unfit data, a reward that cannot be used, sizes that do not fit.
    """
    global_hooks().rlx_validate(config=config)
    settings = config.settings
    algorithm: Algorithm = config.algorithm.make()
    rewards = build_rewards(config)
    report: list[str] = []
    model_config = _model_config(settings, objects)
    tokenizer = _tokenizer(config, objects, algorithm, report)
    data, eval_data = check_data(
        settings,
        tokenizer,
        [component.make() for component in config.transforms],
        columns_needed=rewards.columns_needed if rewards else {},
        max_positions=_max_positions(model_config),
    )
    order = Order(
        len(data),
        settings.batch_size,
        settings.seed,
        settings.shuffle,
        settings.num_train_epochs,
        settings.max_steps,
    )
    lines = plan.overview(config) + report + plan.geometry(algorithm, settings, order) + data.report
    if eval_data is not None:
        lines += [f"evaluation: {line}" for line in eval_data.report]
    if rewards is not None:
        lines += plan.try_rewards(rewards, data.prompts)
    return Checked(config, algorithm, rewards, tokenizer, data, eval_data, order, model_config, lines)


def dry_run(config: RunConfig, objects: Mapping[str, Any]) -> list[str]:
    """Check everything, load nothing, and return the plan."""
    checked = check(config, objects)
    return checked.plan + plan.memory_before_loading(checked, objects.get("model"))


def assemble(config: RunConfig, objects: Mapping[str, Any], *, folder: RunFolder | None = None) -> Run:
    """A run that is ready for its first step.

    Args:
        config: the resolved configuration.
        objects: a model or tokenizer given from Python in the place of a name.
        folder: an existing run folder to go on in; None makes the one that the configuration names.

    Raises:
        RlxError: whatever is wrong; a run folder made here is given back.
    """
    checked = check(config, objects)
    accelerator = build_accelerator(config)
    made = None
    if folder is None and accelerator.is_main_process:
        settings = config.settings
        folder = made = RunFolder.create(settings.output_dir, overwrite=settings.overwrite_output_dir)
    try:
        run = _with_weights(checked, objects, accelerator, folder)
        if folder is not None:
            device = str(accelerator.device)
            processes = accelerator.num_processes
            manifest.begin(
                folder,
                seed=config.settings.seed,
                data=checked.data.fingerprint,
                device=device,
                processes=processes,
            )
            folder.write_text("config.yaml", config.to_yaml())
    except BaseException:
        if made is not None:
            made.discard()
        elif folder is not None:
            folder.close()
        raise
    return run


def _with_weights(
    checked: Checked, objects: Mapping[str, Any], accelerator: Accelerator, folder: RunFolder | None
) -> Run:
    from rlx.core.loop import Run
    from rlx.core.models import load_policy
    from rlx.core.precompute import precompute_all
    from rlx.core.reference import build_reference
    from rlx.core.rollout import Studio
    from rlx.core.update import Updater

    config, algorithm, settings = checked.config, checked.algorithm, checked.config.settings
    model = objects.get("model")
    if model is None:
        model = global_hooks().rlx_load_model(spec=settings)
    policy = load_policy(
        settings,
        accelerator,
        checked.tokenizer,
        model,
        values="values" in algorithm.needs,
        value_model=objects.get("value_model"),
    )
    reference = None
    if algorithm.needs & {"reference", "kl"}:
        reference = build_reference(settings, policy, accelerator, objects.get("reference_model"))
    stops = tuple(sorted({*policy.stop_token_ids, *algorithm.stop_token_ids}))
    studio = Studio(policy, reference, config.generator.make(), checked.rewards, settings, accelerator, stops)
    updates = checked.order.total_steps * algorithm.epochs * algorithm.mini_batches
    updater = Updater(policy, algorithm, settings, accelerator, updates)
    lines = checked.plan + policy.report + plan.weights(policy, reference, algorithm, settings, accelerator)
    data, eval_data = checked.data, checked.eval_data
    if settings.precompute_ref_log_probs:
        data, eval_data = precompute_all(data, eval_data, studio, algorithm, lines.append)
    run = Run(
        config, accelerator, policy, algorithm, studio, updater, data, eval_data,
        checked.order, Events(), folder, lines,
    )  # fmt: skip
    for name in DEFAULT_CALLBACKS:
        run.events.add(make("callback", name), name)
    for component in config.callbacks:
        run.events.add(component.make(), component.name)
    return run


def build_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's view of devices and processes; ``mixed_precision: auto`` is bf16 on a GPU, else none."""
    import torch
    from accelerate import Accelerator

    wanted = config.settings.mixed_precision
    if wanted == "auto":
        wanted = "bf16" if torch.cuda.is_available() else "no"
    return Accelerator(mixed_precision=wanted)


def build_rewards(config: RunConfig) -> RewardRunner | None:
    """The rewards of a run, built; None if it has none."""
    if not config.rewards:
        return None
    named = [NamedReward(component.name, component.make(), weight) for component, weight in config.rewards]
    return RewardRunner(named, config.settings.reward_on_error, config.settings.reward_error_value)


def _tokenizer(config: RunConfig, objects: Mapping[str, Any], algorithm: Algorithm, report: list[str]) -> Any:
    settings, given = config.settings, objects.get("tokenizer")
    if given is not None:
        return ready_tokenizer(
            given, can_stop=bool(settings.stop_strings or algorithm.stop_token_ids), report=report
        )
    if "model" in objects and settings.tokenizer is None:
        raise ConfigError(
            "a model object was given without its tokenizer",
            hint="rlx.run(model=model, tokenizer=tokenizer, …)",
        )
    return load_tokenizer(settings, stop_token_ids=algorithm.stop_token_ids, report=report)


def _model_config(settings: Settings, objects: Mapping[str, Any]) -> Any:
    """The model's own configuration, its weights not needed."""
    if "model" in objects:
        return objects["model"].config
    source = Source.of(
        settings.model,
        role="model",
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
    )
    return load_config(source)


def _max_positions(model_config: Any) -> int | None:
    """The longest sequence that the model can take; None for one without a limit, as state-space models."""
    return getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
