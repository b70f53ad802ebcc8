"""Puts the parts of a run together: everything that can be wrong without weights first, then the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlx.core import manifest, plan
from rlx.core.closing import close_all, made
from rlx.core.data import check_data
from rlx.core.errors import ConfigError, RlxError
from rlx.core.fingerprints import fingerprints
from rlx.core.folder import RunFolder
from rlx.core.geometry import processes
from rlx.core.judging import JudgeRunner
from rlx.core.models import load_tokenizer, ready_tokenizer
from rlx.core.order import Order
from rlx.core.pretrained import Source, load_config
from rlx.core.reference import check_reference_options
from rlx.core.scoring import NamedReward, RewardRunner
from rlx.plugins.events import Events, global_hooks
from rlx.plugins.references import make, resolve

if TYPE_CHECKING:
    from accelerate import Accelerator

    from rlx.core.config import RunConfig
    from rlx.core.data import Data
    from rlx.core.loop import Run
    from rlx.core.models import Policy
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
        judge: the runner, or None.
        tokenizer: with a pad token.
        data: training prompts.
        eval_data: held-out prompts, or None.
        order: rows of each batch.
        model_config: the model's own configuration.
        plan: what will be done, a line each.
        callbacks: name → callback, of those that were chosen, built.
    """

    config: RunConfig
    algorithm: Algorithm
    rewards: RewardRunner | None
    judge: JudgeRunner | None
    tokenizer: Any
    data: Data
    eval_data: Data | None
    order: Order
    model_config: Any
    plan: list[str]
    callbacks: Mapping[str, Any]

    def close(self) -> None:
        """Let rewards, judge and callbacks give back what they hold: workers, connections."""
        close_all(self.rewards, self.judge, *made(self.callbacks.values(), self.config.callbacks))


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
    check_reference_options(settings, algorithm, config.algorithm)
    built: list[Any] = []
    try:
        built.append(rewards := build_rewards(config))
        built.append(judge := build_judge(config))
        callbacks: dict[str, Any] = {}
        for component in config.callbacks:
            callbacks[component.name] = callback = component.make()
            built += made([callback], [component])
        return _check_parts(config, objects, algorithm, rewards, judge, callbacks)
    except BaseException:
        close_all(*built)
        raise


def _check_parts(
    config: RunConfig,
    objects: Mapping[str, Any],
    algorithm: Algorithm,
    rewards: RewardRunner | None,
    judge: JudgeRunner | None,
    callbacks: Mapping[str, Any],
) -> Checked:
    """Tokenizer, data and sizes, and what the rewards say of two rows."""
    settings = config.settings
    report: list[str] = []
    model_config = _model_config(settings, objects)
    tokenizer = _tokenizer(config, objects, algorithm, report)
    data, eval_data = check_data(
        settings,
        tokenizer,
        [component.make() for component in config.transforms],
        eats=algorithm.eats,
        columns_needed=rewards.columns_needed if rewards else {},
        max_positions=_max_positions(model_config),
    )
    if judge is not None:
        judge.check_columns(data.prompts.columns)
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
    if rewards is not None and algorithm.eats == "prompts":
        ready = [reward.name for reward in rewards.rewards if reward.name not in rewards.waiting]
        lines += plan.try_rewards(rewards.only(ready), data.prompts)
        sampler = resolve("generator", config.generator.ref)
        completions = math.ceil(settings.batch_size / processes()) * algorithm.completions_per_prompt
        lines += plan.overlapped(rewards, sampler, settings, completions)
    return Checked(
        config, algorithm, rewards, judge, tokenizer, data, eval_data, order, model_config, lines, callbacks
    )


def dry_run(config: RunConfig, objects: Mapping[str, Any]) -> list[str]:
    """Check everything, load nothing, and return the plan."""
    checked = check(config, objects)
    try:
        return checked.plan + plan.memory_before_loading(checked, objects.get("model"))
    finally:
        checked.close()


def assemble(
    config: RunConfig,
    objects: Mapping[str, Any],
    *,
    folder: RunFolder | None = None,
    reopened: bool = False,
) -> Run:
    """A run that is ready for its first step.

    Args:
        config: the resolved configuration.
        objects: a model or tokenizer given from Python in the place of a name.
        folder: the run folder to go on in, on the main process; used if reopened.
        reopened: the run goes on in its folder; else the one that the configuration names is made.

    Raises:
        RlxError: whatever is wrong; a run folder made here is given back.
    """
    checked = check(config, objects)
    made: RunFolder | None = None
    try:
        accelerator = build_accelerator(config)
        if reopened:
            return _with_weights(checked, objects, accelerator, folder)
        made, checked = _make_folder(checked, accelerator)
        run = _with_weights(checked, objects, accelerator, made)
        begin(run)
    except BaseException:
        if made is not None:
            made.discard()
        checked.close()
        raise
    return run


def begin(run: Run) -> None:
    """Say in the run folder what runs there, once everything was found in order."""
    if run.folder is None:
        return
    manifest.begin(
        run.folder,
        seed=run.settings.seed,
        data=run.data.fingerprint,
        device=str(run.accelerator.device),
        processes=run.accelerator.num_processes,
    )
    run.folder.write_text("config.yaml", run.config.to_yaml())


def _make_folder(checked: Checked, accelerator: Accelerator) -> tuple[RunFolder | None, Checked]:
    """The main process makes the run folder; all processes hear where it is, or why there is none."""
    settings, made = checked.config.settings, None
    outcome: list[Any] = [settings.output_dir]
    if accelerator.is_main_process:
        try:
            made = RunFolder.create(settings.output_dir, overwrite=settings.overwrite_output_dir)
        except RlxError as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if isinstance(outcome[0], RlxError):
        raise outcome[0]
    settings = replace(settings, output_dir=outcome[0])
    return made, replace(checked, config=replace(checked.config, settings=settings))


def _with_weights(
    checked: Checked, objects: Mapping[str, Any], accelerator: Accelerator, folder: RunFolder | None
) -> Run:
    from rlx.core.loop import Run
    from rlx.core.models import load_policy
    from rlx.core.peers import agreed
    from rlx.core.precompute import precompute_all
    from rlx.core.reference import build_reference
    from rlx.core.rollout import Studio
    from rlx.core.streams import rng_scope
    from rlx.core.update import Updater

    config, algorithm, settings = checked.config, checked.algorithm, checked.config.settings
    # Where training samples nothing, no log-prob is tempered; a callback that samples does so as asked.
    measured = settings if algorithm.eats == "prompts" else replace(settings, temperature=1.0)
    model = objects.get("model")
    if model is None:
        model = global_hooks().rlx_load_model(spec=settings)
    with rng_scope(settings.seed, "new weights"):  # those of an adapter, say
        policy = load_policy(
            settings,
            accelerator,
            checked.tokenizer,
            model,
            values="values" in algorithm.needs,
            value_model=objects.get("value_model"),
            classifier="reward" in algorithm.needs,
        )
    reference = None
    if algorithm.needs & {"reference", "kl"}:
        reference = build_reference(settings, policy, accelerator, objects.get("reference_model"))
    tried = _attach(checked, policy)
    stops = tuple(sorted({*policy.stop_token_ids, *algorithm.stop_token_ids}))
    checkpointing = plan.checkpointing(policy, reference, settings, accelerator)
    budget = plan.budget(policy, reference, settings, accelerator)
    studio = Studio(
        policy, reference, config.generator.make(), checked.rewards, settings, accelerator, stops, budget,
        checked.judge, measured.temperature,
    )  # fmt: skip
    updates = checked.order.total_steps * algorithm.epochs * algorithm.mini_batches
    updater = Updater(policy, algorithm, measured, accelerator, updates, budget)
    lines = checked.plan + tried + policy.report
    lines += plan.weights(policy, reference, algorithm, settings, accelerator, budget)
    lines.append(checkpointing)
    data, eval_data = checked.data, checked.eval_data
    if settings.precompute_ref_log_probs:
        data, eval_data = precompute_all(data, eval_data, studio, algorithm, lines.append)
    run = Run(
        config, accelerator, policy, algorithm, studio, updater, data, eval_data,
        checked.order, Events(policy.active, agreed), folder, lines,
        fingerprints=fingerprints(config, getattr(checked.model_config, "_commit_hash", None)),
    )  # fmt: skip
    updater.say = run.say
    _add_callbacks(run, checked.callbacks)
    return run


def _add_callbacks(run: Run, chosen: Mapping[str, Any]) -> None:
    """Those that are always there, the one that an option stands for, and those that were chosen."""
    for name in DEFAULT_CALLBACKS:
        run.events.add(make("callback", name), name, owned=True)
    if run.settings.sync_ref_model and all(one.ref != "sync_ref_model" for one in run.config.callbacks):
        run.events.add(make("callback", "sync_ref_model"), "sync_ref_model", owned=True)
    built = made(chosen.values(), run.config.callbacks)
    for name, callback in chosen.items():
        run.events.add(callback, name, owned=any(callback is one for one in built))


def _attach(checked: Checked, policy: Policy) -> list[str]:
    """Give the policy to rewards and judge that use its weights, and try the rewards; lines for the plan."""
    rewards = checked.rewards
    if checked.judge is not None:
        checked.judge.attach(policy)
    if rewards is None:
        return []
    waiting = rewards.waiting
    rewards.attach(policy)
    data: Any = checked.data
    return (
        plan.try_rewards(rewards.only(waiting), data.prompts) if checked.algorithm.eats == "prompts" else []
    )


def build_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate's view of devices and processes; ``mixed_precision: auto`` is bf16 on a GPU, else none."""
    import torch

    from rlx.core.peers import connect

    wanted = config.settings.mixed_precision
    if wanted == "auto":
        wanted = "bf16" if torch.cuda.is_available() else "no"
    return connect(wanted)


def build_rewards(config: RunConfig) -> RewardRunner | None:
    """The rewards of a run, built; None if it has none."""
    if not config.rewards:
        return None
    named = [NamedReward(component.name, component.make(), weight) for component, weight in config.rewards]
    return RewardRunner(named, config.settings.reward_on_error, config.settings.reward_error_value)


def build_judge(config: RunConfig) -> JudgeRunner | None:
    """The judge of a run, built; None if it has none."""
    if config.judge is None:
        return None
    return JudgeRunner(config.judge.name, config.judge.make(), config.settings.seed)


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
