"""The core options of a run: one frozen dataclass, the same names as flag, YAML key and keyword.

Standard library only. What an algorithm, reward, transform or callback needs beyond these lives in its own
Config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlx.core.errors import ConfigError
from rlx.core.options import opt

EMBEDDED = "tiny"  # the model that ships inside the package
PLAYGROUND = "wordmath"  # the data set that is generated in code

# Options that only algorithms read that eat one of these (``Algorithm.eats``).
OFFLINE = ("pairs", "labeled", "demonstrations")
READ_BY = {
    "max_prompt_length": ("prompts",),
    "prompt_overflow": ("prompts",),
    "max_length": OFFLINE,
    "truncation_mode": OFFLINE,
    "precompute_ref_log_probs": ("pairs",),
    "packing": ("demonstrations",),
    "packing_strategy": ("demonstrations",),
    "completion_only_loss": ("demonstrations",),
    "assistant_only_loss": ("demonstrations",),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Core options. Algorithms may set other defaults for some of them (``Algorithm.defaults``)."""

    # Components
    algo: Any = opt(
        "ppo", "algorithm: a registered name, module:Attribute or ./file.py:Attribute", panel="Components"
    )
    reward: list[Any] = opt(
        [],
        "reward, may be repeated: a name, module:Attribute, ./file.py:Attribute, URL of a server",
        panel="Components",
    )
    reward_weight: list[float] = opt(
        [], "weight of each reward, in the same order (default 1 each)", panel="Components"
    )
    reward_on_error: str = opt(
        "raise",
        "what an unusable reward does: stop the run, count as None, or count as a value",
        choices=("raise", "none", "value"),
        panel="Components",
    )
    reward_error_value: float = opt(
        0.0, "the score of an unusable reward with reward_on_error: value", panel="Components"
    )
    overlap_rewards: bool = opt(
        True,
        "ask rewards that look at one completion alone while the others are still sampled",
        panel="Components",
    )
    judge: Any = opt(
        None,
        "what compares completions, in the place of rewards, for algorithms that can",
        panel="Components",
    )
    transform: list[Any] = opt(
        [], "data transform, may be repeated; none given: chosen by the columns", panel="Components"
    )
    callback: list[Any] = opt([], "callback beside the default ones, may be repeated", panel="Components")
    generator: Any = opt("native", "what samples completions", panel="Components")
    no_plugin: list[str] = opt(
        [], "plugin that is not even imported, may be repeated", commas=True, panel="Components"
    )
    strict_plugins: bool = opt(False, "a plugin that fails to load stops the run", panel="Components")

    # Model
    model: str = opt(
        EMBEDDED, "policy: a local folder, a hub id, or 'tiny', the model inside the package", panel="Model"
    )
    model_revision: str | None = opt(None, "branch, tag or commit on the hub", panel="Model")
    tokenizer: str | None = opt(None, "tokenizer, when it does not lie beside the model", panel="Model")
    trust_remote_code: bool = opt(False, "run the Python code that comes with the model", panel="Model")
    dtype: str = opt(
        "auto",
        "weights: auto is float32, and bfloat16 for the frozen base of an adapter on GPU",
        panel="Model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    attn_implementation: str | None = opt(
        None, "attention backend of transformers (default: its own choice)", panel="Model"
    )
    reference_model: str | None = opt(
        None, "reference: a folder or hub id (default: the policy as it was at the start)", panel="Model"
    )
    reference_adapter: str | None = opt(
        None, "folder of a LoRA adapter of the policy's base that is the reference", panel="Model"
    )
    sync_ref_model: bool = opt(
        False, "move the reference after the policy as it learns", source="arXiv:2404.09656", panel="Model"
    )
    ref_model_mixup_alpha: float = opt(
        0.6,
        "sync_ref_model: reference ← alpha · policy + (1 − alpha) · reference; 1 copies the policy",
        gt=0,
        le=1,
        source="arXiv:2404.09656, equations 2 and 3",
        panel="Model",
    )
    ref_model_sync_steps: int = opt(
        512, "sync_ref_model: steps between two such moves", gt=0, source="arXiv:2404.09656", panel="Model"
    )
    value_model: str | None = opt(
        None, "separate value model: a folder or hub id (default: a head on the policy)", panel="Model"
    )
    value_learning_rate: float | None = opt(
        None, "learning rate of the value head or model (default: learning_rate)", gt=0, panel="Model"
    )
    gradient_checkpointing: Literal["auto", True, False] = opt(
        "auto",
        "recompute activations in the backward pass: less memory, slower; auto where no step fits without",
        panel="Model",
    )
    upcast_norms: bool = opt(False, "keep normalisation layers in float32", panel="Model")
    generation_dtype: str = opt(
        "none",
        "precision of the weights while sampling",
        choices=("none", "bfloat16", "float16", "float32"),
        panel="Model",
    )
    disable_dropout: bool = opt(True, "switch dropout off in the policy", panel="Model")

    # LoRA
    lora_r: int = opt(
        0, "rank of the LoRA adapter; 0 trains all weights", ge=0, source="arXiv:2106.09685", panel="LoRA"
    )
    lora_alpha: float = opt(16.0, "scale of the adapter: alpha / r", gt=0, panel="LoRA")
    lora_dropout: float = opt(0.0, "dropout on the adapter's input", ge=0, lt=1, panel="LoRA")
    lora_target_modules: list[str] = opt(
        ["all-linear"], "modules that get an adapter", commas=True, panel="LoRA"
    )
    adapter: str | None = opt(None, "folder of a LoRA adapter to start from and train on", panel="LoRA")

    # Data
    dataset: Any = opt(
        PLAYGROUND,
        "a file (jsonl, json, csv, parquet, also .gz), a folder, a hub id, a registered name",
        panel="Data",
    )
    dataset_config: str | None = opt(None, "configuration of a hub data set", panel="Data")
    dataset_split: str = opt("train", "split of a hub or registered data set", panel="Data")
    eval_dataset: Any = opt(
        None,
        "like dataset, for evaluation (a registered data set brings its own held-out split)",
        panel="Data",
    )
    columns: dict[str, str] = opt(
        {}, "column mapping, wanted=found, may be repeated: --columns prompt=question", panel="Data"
    )
    system_prompt: str | None = opt(None, "system message put before every prompt", panel="Data")
    chat_template: str = opt(
        "auto",
        "auto is the tokenizer's; a Jinja template, a file with one, chatml, or none for plain text",
        panel="Data",
    )
    precompute_ref_log_probs: bool = opt(
        False, "take the reference's log-probs of preference pairs once, before training", panel="Data"
    )
    max_prompt_length: int = opt(512, "longest prompt", gt=0, unit="tokens", panel="Data")
    prompt_overflow: str = opt(
        "error", "a prompt that is longer", choices=("error", "drop", "truncate_left"), panel="Data"
    )
    max_length: int = opt(
        1024, "longest prompt and completion, or text, to learn from", gt=0, unit="tokens", panel="Data"
    )
    truncation_mode: str = opt(
        "keep_start",
        "what is over max_length: cut completions at the end, prompts at the start, or leave the row out",
        choices=("keep_start", "keep_end", "drop"),
        panel="Data",
    )
    packing: bool = opt(
        False, "put short demonstrations together into rows of max_length tokens", panel="Data"
    )
    packing_strategy: str = opt(
        "bfd",
        "best-fit decreasing; the same with long documents split instead of cut; or rows filled to the brim",
        choices=("bfd", "bfd_split", "wrapped"),
        source="arXiv:2404.10830",
        panel="Data",
    )
    completion_only_loss: bool | None = opt(
        None, "learn the completion only (default: where demonstrations have a prompt)", panel="Data"
    )
    assistant_only_loss: bool = opt(False, "learn the assistant's turns of a conversation only", panel="Data")
    on_bad_row: str = opt("error", "a row that cannot be used", choices=("error", "drop"), panel="Data")
    max_bad_rows: float = opt(0.01, "share of rows that on_bad_row: drop may drop", ge=0, le=1, panel="Data")
    max_rows: int | None = opt(None, "use only the first rows of the data set", gt=0, panel="Data")
    max_eval_rows: int | None = opt(512, "use only the first rows of the evaluation data", gt=0, panel="Data")
    shuffle: bool = opt(True, "shuffle the rows, anew in every epoch", panel="Data")

    # Sampling
    max_completion_length: int = opt(256, "longest completion", gt=0, unit="tokens", panel="Sampling")
    temperature: float = opt(
        1.0, "softmax temperature of sampling and of the log-probs that enter ratios", gt=0, panel="Sampling"
    )
    top_p: float = opt(1.0, "nucleus sampling", gt=0, le=1, source="arXiv:1904.09751", panel="Sampling")
    top_k: int = opt(0, "sample among the k most likely tokens; 0 for all", ge=0, panel="Sampling")
    min_p: float = opt(
        0.0,
        "drop tokens below this share of the most likely one",
        ge=0,
        le=1,
        source="arXiv:2407.01082",
        panel="Sampling",
    )
    repetition_penalty: float = opt(
        1.0, "divide the logits of tokens seen before", gt=0, source="arXiv:1909.05858", panel="Sampling"
    )
    stop_strings: list[str] = opt([], "end a completion after this text, may be repeated", panel="Sampling")
    generation_batch_size: int | None = opt(
        None, "completions sampled at a time (default: as many as memory allows)", gt=0, panel="Sampling"
    )
    recompute_logps: bool = opt(
        False, "recompute the sampling log-probs in a forward of their own", panel="Sampling"
    )

    # Training
    learning_rate: float = opt(1e-6, "peak learning rate", ge=0, panel="Training")
    batch_size: int = opt(
        32, "rows (prompts, pairs) of one batch, over all processes", gt=0, panel="Training"
    )
    per_device_train_batch_size: int | None = opt(
        None,
        "with gradient_accumulation_steps and the processes: another way to say batch_size",
        gt=0,
        panel="Training",
    )
    gradient_accumulation_steps: int | None = opt(
        None, "see per_device_train_batch_size", gt=0, panel="Training"
    )
    max_tokens_per_micro_batch: int | None = opt(
        None,
        "tokens of one forward and backward (default: as memory allows, up to 2048 on CPU, 65536 on GPU)",
        gt=0,
        unit="tokens",
        panel="Training",
    )
    share_prefix: bool = opt(
        True,
        "compute a prompt that several sequences share once, and without padding, where the model can",
        panel="Training",
    )
    max_steps: int | None = opt(
        None, "stop after so many batches (default: num_train_epochs decides)", gt=0, panel="Training"
    )
    num_train_epochs: float = opt(1.0, "passes over the data", gt=0, panel="Training")
    lr_scheduler_type: str = opt(
        "linear",
        "shape of the learning rate after the warm-up",
        panel="Training",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    warmup_steps: int = opt(0, "optimizer steps of linear warm-up", ge=0, panel="Training")
    warmup_ratio: float = opt(0.0, "warm-up as a share of all optimizer steps", ge=0, lt=1, panel="Training")
    optim: str = opt("adamw", "optimizer", choices=("adamw", "sgd"), panel="Training")
    adam_beta1: float = opt(0.9, "decay of the first moment", ge=0, lt=1, panel="Training")
    adam_beta2: float = opt(0.999, "decay of the second moment", ge=0, lt=1, panel="Training")
    adam_epsilon: float = opt(1e-8, "added to the denominator", gt=0, panel="Training")
    weight_decay: float = opt(0.0, "decoupled weight decay", ge=0, panel="Training")
    max_grad_norm: float = opt(1.0, "clip the gradient's norm; 0 for no clipping", ge=0, panel="Training")
    nonfinite: str = opt(
        "raise",
        "a loss or gradient that is not finite: stop, or skip the step (at most 3 in a row)",
        choices=("raise", "skip"),
        panel="Training",
    )
    mixed_precision: str = opt(
        "auto",
        "autocast of the forward pass: auto is bf16 on GPU, none on CPU",
        choices=("auto", "no", "bf16"),
        panel="Training",
    )
    seed: int = opt(0, "seed of every random stream", ge=0, panel="Training")

    # Run
    output_dir: str = opt("", "run folder (default: runs/<algo>-<model>-<time>)", panel="Run")
    overwrite_output_dir: bool = opt(False, "replace a finished run in output_dir", panel="Run")
    logging_steps: int = opt(10, "steps between two log lines", gt=0, panel="Run")
    eval_steps: int | None = opt(
        None,
        "steps between two evaluations (default: only before the first and after the last)",
        gt=0,
        panel="Run",
    )
    save_steps: int | None = opt(
        None, "steps between two checkpoints (default: only when interrupted)", gt=0, panel="Run"
    )
    save_total_limit: int | None = opt(2, "checkpoints kept", gt=0, panel="Run")
    log_completions: int = opt(
        8,
        "completions written to completions.jsonl at every log line; 0 for none, -1 for all",
        ge=-1,
        panel="Run",
    )
    report_to: list[str] = opt(
        [], "trackers, through accelerate (tensorboard, wandb, trackio, …)", commas=True, panel="Run"
    )
    track_completions: bool = opt(
        False, "send the samples of log_completions to the trackers too, prompts and all", panel="Run"
    )
    plots: bool = opt(True, "write PNG plots into the run folder", panel="Run")
    progress: str = opt(
        "auto", "live panel or plain lines", choices=("auto", "rich", "plain", "none"), panel="Run"
    )

    def __post_init__(self) -> None:
        if self.reward_weight and len(self.reward_weight) != len(self.reward):
            raise ConfigError(
                "reward_weight needs one number a reward",
                code="E-CONFIG-CONFLICT",
                got=f"{len(self.reward)} rewards, {len(self.reward_weight)} weights",
                hint="give --reward-weight as often as --reward, or not at all",
            )
        if self.reference_model and self.reference_adapter:
            raise ConfigError(
                "reference_model and reference_adapter are both set; there is one reference",
                code="E-CONFIG-CONFLICT",
                hint="keep one of the two",
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs is for a reference that stays, and sync_ref_model moves it",
                code="E-CONFIG-CONFLICT",
                hint="leave out one of the two",
            )
        if self.sync_ref_model and self.reference_model and (self.lora_r or self.adapter):
            raise ConfigError(
                "sync_ref_model cannot mix an adapter into a reference_model, which has none",
                code="E-CONFIG-CONFLICT",
                got=f"reference_model: {self.reference_model}, and a policy that is an adapter",
                hint="leave reference_model out (the reference is then a copy of the adapter), or lora_r: 0",
            )
        if self.adapter and self.lora_r:
            raise ConfigError(
                "adapter and lora_r are both set: train the given adapter on, or start a new one",
                code="E-CONFIG-CONFLICT",
                hint="keep one of the two",
            )
        if self.track_completions and not self.report_to:
            raise ConfigError(
                "track_completions is set, and report_to names no tracker",
                code="E-CONFIG-CONFLICT",
                hint="--report-to wandb, or leave track_completions out",
            )
        if self.packing_strategy != "bfd" and not self.packing:
            raise ConfigError(
                "packing_strategy is set, and packing is off",
                code="E-CONFIG-CONFLICT",
                got=f"packing_strategy: {self.packing_strategy}",
                hint="--packing true, or with transform packing its own option strategy",
            )
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                "warmup_steps and warmup_ratio are both set",
                code="E-CONFIG-CONFLICT",
                hint="keep one of the two",
            )
