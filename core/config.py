"""The configuration of a run: core options, the algorithm with its options, and the other components.

Whatever is given (file, flags, Python keywords) becomes one flat mapping, ``from_mapping`` checks all of it
at once and says where each value came from. Precedence: core defaults < the algorithm's defaults < the data
set's recipe < file < flags. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rlx.core.arguments import parse_arguments
from rlx.core.components import (
    Component,
    Spec,
    check_spec,
    config_class,
    flatten,
    read_specs,
    shallow,
    short_name,
    take_dotted,
)
from rlx.core.errors import ConfigError, ErrorGroup, PluginError, RlxError
from rlx.core.foreign_names import our_name
from rlx.core.geometry import check_division, join_batch_size, run_folder
from rlx.core.options import build, close, options
from rlx.core.settings import EMBEDDED, PLAYGROUND, READ_BY, Settings
from rlx.core.text import redact, safe_text
from rlx.plugins.references import resolve

__all__ = ["Component", "RunConfig", "from_mapping", "parse_arguments"]

LISTS = {kind: kind for kind in ("reward", "transform", "callback", "generator", "judge")}  # kind → option
SINGLE = ("generator", "judge")
# Two ways to say one thing: giving one of them sets aside a default (never a given value) of the other.
ALTERNATIVES = (
    ("warmup_steps", "warmup_ratio"),
    ("max_steps", "num_train_epochs"),
    ("adapter", "lora_r"),
    ("reference_model", "reference_adapter"),
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run; checked.

    Attributes:
        settings: the core options.
        algorithm: its options are in ``algorithm_config``, typed, and in ``algorithm.options``.
        algorithm_config: instance of the algorithm's Config.
        rewards: each with its weight.
        transforms, callbacks: in order.
        generator: what samples.
        judge: what compares completions, or None.
        sources: option → ``default``, ``algorithm ppo``, ``recipe wordmath``, ``config.yaml:7:1``, ``--flag``
            or
            ``argument``.
    """

    settings: Settings
    algorithm: Component
    algorithm_config: Any
    rewards: list[tuple[Component, float]]
    transforms: list[Component]
    callbacks: list[Component]
    generator: Component
    judge: Component | None = None
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    def to_mapping(self) -> dict[str, Any]:
        """Every option with its value, flat, as ``from_mapping`` takes it; nothing is redacted."""
        return {**shallow(self.settings), **self.algorithm.options}

    def to_yaml(self) -> str:
        """The resolved config as YAML that loads back to an equal config; secrets are redacted.

        An object given in Python is written as its reference if it can be imported, else as a mark that says
        what it was, which does not load.
        """
        import yaml

        plain = redact({name: _plain(value) for name, value in self.to_mapping().items()})
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def from_mapping(values: Mapping[str, Any], where: Mapping[str, str] | None = None) -> RunConfig:
    """Check a flat mapping of options and make a config of it.

    Args:
        values: option → raw value, from Python, YAML or a flag; ``component.option`` for a component's.
        where: option, or path inside it (``reward[0].target``) → where it was given.

    Returns:
        The config.

    Raises:
        ConfigError: for what is wrong; ErrorGroup if it is more than one thing.
        PluginError: for a component that does not load or keep its contract.
    """
    return Draft(values, where or {}).finish()


class Draft:
    """A config in the making: raw values in, problems collected, one config out."""

    def __init__(self, values: Mapping[str, Any], where: Mapping[str, str]) -> None:
        self.given = {name.replace("-", "_"): value for name, value in values.items()}
        self.where = {name.replace("-", "_"): place for name, place in where.items()}
        self.problems: list[RlxError] = []
        self.core = options(Settings)
        self.own: dict[str, Any] = {}
        self.eats = ""  # what the algorithm eats, once it is found
        self.defaults: dict[str, tuple[Any, str]] = {}  # option → value, source

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Note a problem and go on."""
        try:
            yield
        except RlxError as error:
            self.problems.append(error)

    def stop_if_wrong(self) -> None:
        """Raise what was found so far, all of it."""
        problems = flatten(self.problems)
        if problems:
            raise problems[0] if len(problems) == 1 else ErrorGroup(problems)

    def finish(self) -> RunConfig:
        """Everything in order; problems are collected as long as the next step makes sense."""
        self.load_plugins()
        ref, found = self.find_algorithm()
        specs = self.find_components()
        self.refuse_unknown()
        chosen: dict[str, list[Component]] = {kind: [] for kind in LISTS}
        for spec in specs:
            with self.catch():
                chosen[spec.kind].append(check_spec(spec))
        weights = self.weights([spec for spec in specs if spec.kind == "reward"])
        settings, config = self.settings(chosen, weights), self.algorithm_config(ref, found)
        self.stop_if_wrong()
        assert settings is not None and found is not None  # else there was a problem
        name = short_name("algorithm", ref)
        self.check_rewards(name, found, settings)
        self.check_data_options(name, found, settings)
        check_division(found, config, settings, self.where)
        return RunConfig(
            settings,
            Component("algorithm", ref, shallow(config), self.where.get("algo", ""), name),
            config,
            list(zip(chosen["reward"], weights, strict=True)),
            chosen["transform"],
            chosen["callback"],
            chosen["generator"][0],
            next(iter(chosen["judge"]), None),
            self.sources(),
        )

    def load_plugins(self) -> None:
        """Choose which plugins there are before anything is looked up by name."""
        names = ("no_plugin", "strict_plugins")
        given: dict[str, Any] = {name: self.given[name] for name in names if name in self.given}
        if not any(given.values()):
            return
        from rlx.plugins.registry import discover

        with self.catch():
            chosen = build(Settings, given, owner="the run", where=self.where)
            discover(no_plugins=chosen.no_plugin, strict=chosen.strict_plugins)

    def find_algorithm(self) -> tuple[Any, Any]:
        """The algorithm's reference and class, None if there is none; its options and defaults are noted."""
        ref = self.given.get("algo", self.core["algo"].default)
        ref = str(ref) if isinstance(ref, str) else ref
        try:
            found = resolve("algorithm", ref)
            name, self.eats = short_name("algorithm", ref), found.eats
            self.own = options(config_class(found, f"algorithm {name}"))
            shared = sorted(set(self.own) & set(self.core))
            if shared:
                raise PluginError(
                    f"algorithm {name} declares options that are core options: {', '.join(shared)}",
                    code="E-PLUGIN-OPTION",
                    hint="set other defaults with Algorithm.defaults, or choose other names",
                )
            self.take_defaults(found.defaults, f"algorithm {name}")
            with self.catch():
                self.take_recipe(name)
            return ref, found
        except RlxError as error:
            error.where = error.where or self.where.get("algo", "")
            self.problems.append(error)
            return ref, None

    def take_defaults(self, values: Mapping[str, Any], source: str) -> None:
        """One more layer of defaults, above those before."""
        unknown = [name for name in values if name not in self.core and name not in self.own]
        if unknown:
            raise PluginError(
                f"{source} sets a default for an option that does not exist: {', '.join(unknown)}",
                code="E-PLUGIN-OPTION",
            )
        self.defaults.update({name: (value, source) for name, value in values.items()})

    def take_recipe(self, algorithm: str) -> None:
        """Options with which the embedded model learns the playground; for nothing but this pair."""
        dataset = self.given.get("dataset", PLAYGROUND)
        name = dataset.get("name") if isinstance(dataset, Mapping) else dataset
        if self.given.get("model", EMBEDDED) != EMBEDDED or name != PLAYGROUND:
            return
        playground = resolve("dataset", PLAYGROUND)
        self.take_defaults(playground().recipe(algorithm), f"recipe {PLAYGROUND}")

    def find_components(self) -> list[Spec]:
        """Rewards, transforms, callbacks and the generator, with what dotted flags say about them."""
        specs: list[Spec] = []
        for kind, option in LISTS.items():
            raw = self.given.get(option, self.default(option))
            if kind == "judge" and raw is None:
                continue
            found, problems = read_specs(kind, raw, option, self.where)
            specs += found
            self.problems += problems
            if kind in SINGLE and len(found) != 1 and not problems:
                self.problems.append(ConfigError(f"there is one {kind}", where=self.where.get(kind, "")))
        dotted = {name: value for name, value in self.given.items() if "." in name}
        self.problems += take_dotted(dotted, self.where, specs)
        return specs

    def config_of(self, spec: Spec) -> type | None:
        """The Config of a chosen component; None if it has none."""
        found = resolve(spec.kind, spec.ref)
        if not isinstance(found, type) or not hasattr(found, "Config"):
            return None
        return config_class(found, f"{spec.kind} {safe_text(spec.name, 80)}")

    def default(self, option: str) -> Any:
        """The value of an option that is not given."""
        return self.defaults[option][0] if option in self.defaults else self.core[option].default

    def refuse_unknown(self) -> None:
        """Every option that nobody has, with the name that was perhaps meant."""
        unread = {name for name, eats in READ_BY.items() if self.eats and self.eats not in eats}
        known = [*(name for name in self.core if name not in unread), *self.own]
        for name in self.given:
            if name in known or name in self.core or "." in name:
                continue
            ours = our_name(name, known)
            if not self.own and not ours and not close(name, list(self.core)):
                continue  # perhaps an option of the algorithm, which was not found: that is told already
            self.problems.append(
                ConfigError(
                    f"unknown option {safe_text(name, 80)!r}{'' if ours else close(name, known)}",
                    code="E-CONFIG-UNKNOWN",
                    where=self.where.get(name, ""),
                    hint=f"rlx calls it {ours}" if ours else "",
                )
            )

    def weights(self, rewards: list[Spec]) -> list[float]:
        """One weight a reward, given with the rewards or in reward_weight."""
        inside = [spec for spec in rewards if spec.weight is not None]
        listed = self.given.get("reward_weight", [])
        with self.catch():
            if inside and listed:
                raise ConfigError(
                    "reward weights are given twice",
                    code="E-CONFIG-CONFLICT",
                    where=" and ".join(filter(None, (inside[0].where, self.where.get("reward_weight", "")))),
                    hint="keep weight: in the reward, or reward_weight",
                )
            raw = [1.0 if spec.weight is None else spec.weight for spec in rewards] if inside else listed
            weights = build(
                Settings,
                {"reward_weight": raw, "reward": [spec.name for spec in rewards]},
                owner="the run",
                where=self.where,
            ).reward_weight
            return weights or [1.0] * len(rewards)
        return []

    def settings(self, chosen: Mapping[str, list[Component]], weights: list[float]) -> Settings | None:
        """The core options: given ones over the layers of defaults; None if they are wrong."""
        for one, other in (*ALTERNATIVES, *((b, a) for a, b in ALTERNATIVES)):
            if one in self.given and other not in self.given:
                self.defaults.pop(other, None)
        values = {name: value for name, (value, _) in self.defaults.items() if name in self.core}
        values |= {name: value for name, value in self.given.items() if name in self.core}
        for kind, option in LISTS.items():
            written = [component.written() for component in chosen[kind]]
            values[option] = (written or [None])[0] if kind in SINGLE else written
        values["reward_weight"] = weights if len(weights) == len(chosen["reward"]) else []
        where = {name: source for name, (_, source) in self.defaults.items()} | self.where
        with self.catch():
            settings: Settings = build(Settings, values, owner="the run", where=where)
            settings = join_batch_size(settings, given="batch_size" in self.given, where=self.where)
            name = short_name("algorithm", settings.algo)
            return dataclasses.replace(settings, output_dir=run_folder(settings, name, self.where))
        return None

    def algorithm_config(self, ref: Any, found: Any) -> Any:
        """The algorithm's Config: given values over the layers of defaults; None if they are wrong."""
        if found is None:
            return None
        values = {name: value for name, (value, _) in self.defaults.items() if name in self.own}
        values |= {name: value for name, value in self.given.items() if name in self.own}
        owner = f"algorithm {short_name('algorithm', ref)}"
        with self.catch():
            return build(found.Config, values, owner=owner, where=self.where)
        return None

    def check_rewards(self, name: str, found: Any, settings: Settings) -> None:
        """An algorithm that samples needs something that scores, or compares where it can learn from that."""
        if settings.judge is not None and not found.judged:
            raise ConfigError(
                f"{name} does not learn from comparisons, so it has no use for a judge",
                code="E-CONFIG-CONFLICT",
                where=self.where.get("judge", ""),
                hint="--algo online_dpo learns from a judge; the callback win_rate measures with one",
            )
        if found.eats == "prompts" and not settings.reward and settings.judge is None:
            raise ConfigError(
                f"{name} learns from a reward, and none is given",
                code="E-CONFIG-MISSING",
                hint=f"rlx run --algo {name} --reward exact_match",
            )

    def check_data_options(self, name: str, found: Any, settings: Settings) -> None:
        """An option that says how to read data of another kind is a mistake, not to be passed over."""
        problems: list[RlxError] = [
            ConfigError(
                f"{option} is an option for {' and '.join(eats)}; {name} eats {found.eats}",
                code="E-CONFIG-CONFLICT",
                where=self.where.get(option, ""),
                got=f"{option}: {getattr(settings, option)}",
                hint="leave it out"
                + (", or --max-prompt-length" if option == "max_length" else "")
                + (", or --max-length" if option == "max_prompt_length" else ""),
            )
            for option, eats in READ_BY.items()
            # A config that was written out names every option.
            if option in self.given and found.eats not in eats
            if getattr(settings, option) != self.default(option)
        ]
        self.problems += problems
        self.stop_if_wrong()

    def sources(self) -> dict[str, str]:
        """Where each option's value came from."""
        out = {}
        for name in (*self.core, *self.own):
            if name in self.given:
                out[name] = self.where.get(name, "argument")
            else:
                out[name] = self.defaults[name][1] if name in self.defaults else "default"
        if self.given.get("per_device_train_batch_size") is not None:
            out["batch_size"] = self.where.get("per_device_train_batch_size", "argument")
        return out


def _plain(value: Any) -> Any:
    """A value that YAML can hold; an object becomes its reference, or a mark."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    if module and name and "<" not in name and module != "__main__":
        return f"{module}:{name}"
    return f"<object given in Python: {type(value).__qualname__}>"
